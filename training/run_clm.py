"""
Train a sparse decoder on text: a dense checkpoint upcycled, a mixture taken further, or one from scratch.

    python training/run_clm.py --model_name_or_path Qwen/Qwen3-0.6B --num_experts 8 --train_file "corpus/*.jsonl.gz" \
        --output_dir outputs/qwen3-8x --bf16
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM, Trainer, default_data_collator, pipeline, set_seed

import recipe
from hf_sparse_moe.distributed.resume import ResumableTrainer


@dataclass
class GenerationArguments(recipe.TextArguments):
    prompts: list[str] | None = field(
        default=None, metadata={"help": "What the trained model goes on with, in `samples.json`."}
    )
    prompt_tokens: int = field(default=60, metadata={"help": "How many tokens it writes after a prompt."})


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, GenerationArguments, recipe.TrainingArguments
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

    def collate(rows: list[dict]) -> dict:
        batch = default_data_collator(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    trainer_class = Trainer if model_args.distributed_config is None else ResumableTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        data_collator=collate,
        processing_class=tokenizer,
        compute_metrics=partial(recipe.perplexity, groups=groups),
        preprocess_logits_for_metrics=partial(recipe.token_losses, shift=True),
    )
    recipe.train_and_evaluate(trainer, data_args, "perplexity is over the predicted tokens")
    if data_args.prompts and trainer.is_world_process_zero():
        write_samples(Path(args.output_dir), data_args.prompts, data_args.prompt_tokens)


def write_samples(folder: Path, prompts: list[str], new_tokens: int) -> None:
    """What the saved model makes of the prompts, drawn by its generation config, with a seed."""
    set_seed(0)
    write = pipeline("text-generation", str(folder), device="cpu")
    texts = [write(prompt, max_new_tokens=new_tokens)[0]["generated_text"] for prompt in prompts]
    (folder / "samples.json").write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
