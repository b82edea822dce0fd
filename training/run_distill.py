"""
Distil a mixture into a student on text: the dense model that `to_dense` made of it, or a pruned or merged mixture.

    hf-sparse-moe to-dense outputs/qwen3-8x outputs/qwen3-dense
    python training/run_distill.py --teacher outputs/qwen3-8x --model_name_or_path outputs/qwen3-dense --dense \
        --train_file "corpus/*.jsonl.gz" --output_dir outputs/qwen3-distilled --bf16

The loss is `teacher_weight` times the divergence from the teacher's next-token distribution at `temperature`, times
its square (arXiv 1503.02531), and the rest the labels' own loss: 0.25 and 0.75 as in arXiv 2101.03961.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, default_data_collator

import recipe


@dataclass
class DistillationArguments(recipe.TextArguments):
    teacher: str | None = field(default=None, metadata={"help": "Folder or Hub id of the mixture to learn from."})
    temperature: float = field(default=1.0, metadata={"help": "By which the logits of both are divided."})
    teacher_weight: float = field(
        default=0.25, metadata={"help": "Of the teacher in the loss; the labels' is the rest."}
    )
    hidden_state_weight: float = field(
        default=0.0,
        metadata={"help": "Of the mean squared difference of all hidden states, relative to the teacher's square."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("Pass the mixture to learn from: `--teacher`.")
        if not self.temperature > 0:
            raise ValueError(f"`--temperature={self.temperature}` must be above 0.")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"`--teacher_weight={self.teacher_weight}` must be from 0 to 1.")
        if self.hidden_state_weight < 0:
            raise ValueError(f"`--hidden_state_weight={self.hidden_state_weight}` must be at least 0.")


class DistillationTrainer(Trainer):
    """In training the loss is the distillation's; in evaluation it is the labels' alone, as of every model."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, settings: DistillationArguments, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.settings = settings
        self.model_accepts_loss_kwargs = False  # the divergence is a mean of its own

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        settings = self.settings
        states = settings.hidden_state_weight > 0
        outputs = model(**inputs, output_hidden_states=states)
        with torch.no_grad():
            taught = self.teacher(**inputs, output_hidden_states=states)
        counts = inputs["labels"][:, 1:] != -100
        loss = (1 - settings.teacher_weight) * outputs.loss
        loss = loss + settings.teacher_weight * divergence(
            outputs.logits[:, :-1][counts], taught.logits[:, :-1][counts], settings.temperature
        )
        if states:
            differences = [
                F.mse_loss(own.float(), other.float()) / other.float().square().mean()
                for own, other in zip(outputs.hidden_states, taught.hidden_states, strict=True)
            ]
            loss = loss + settings.hidden_state_weight * torch.stack(differences).mean()
        return (loss, outputs) if return_outputs else loss


def divergence(logits_TV: torch.Tensor, taught_TV: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean over tokens of KL(teacher, student) at a temperature, times its square, which keeps gradients' size."""
    own, other = (F.log_softmax(each.float() / temperature, dim=-1) for each in (logits_TV, taught_TV))
    return F.kl_div(own, other, log_target=True, reduction="batchmean") * temperature**2


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, DistillationArguments, recipe.TrainingArguments
        )
        data = recipe.load_data(data_args)
        tokenizer = recipe.load_tokenizer(model_args)
        config = recipe.load_config(model_args, tokenizer)
        length = recipe.sequence_length(data_args, tokenizer, config)
        with args.main_process_first(desc="packing"):
            lines = recipe.is_text(data_args)
            blocks, groups = recipe.pack(data, data_args, tokenizer, length, lines)
        recipe.check_best_metric(args, recipe.perplexity_names(groups))
        model = recipe.load_model(model_args, AutoModelForCausalLM, config, tokenizer, args.seed)
        teacher = AutoModelForCausalLM.from_pretrained(data_args.teacher, dtype=model_args.dtype)
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"`--teacher={data_args.teacher}` has {teacher.config.vocab_size} tokens and the student "
                f"{model.config.vocab_size}. Both need one tokenizer."
            )
        if data_args.hidden_state_weight and teacher.config.hidden_size != model.config.hidden_size:
            raise ValueError("`--hidden_state_weight` needs a student with the teacher's `hidden_size`.")

    def collate(rows: list[dict]) -> dict:
        batch = default_data_collator(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    trainer = DistillationTrainer(
        model=model,
        args=args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        data_collator=collate,
        processing_class=tokenizer,
        compute_metrics=partial(recipe.perplexity, groups=groups),
        preprocess_logits_for_metrics=partial(recipe.token_losses, shift=True),
        teacher=teacher,
        settings=data_args,
    )
    recipe.train_and_evaluate(trainer, data_args, "perplexity is over the predicted tokens")


if __name__ == "__main__":
    main()
