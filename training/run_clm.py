"""
Train a sparse decoder on text: a dense checkpoint upcycled, a mixture taken further, or one from scratch.

    python training/run_clm.py --model_name_or_path Qwen/Qwen3-0.6B --num_experts 8 --train_file "corpus/*.jsonl.gz" \
        --output_dir outputs/qwen3-8x --bf16
"""

from dataclasses import dataclass, field
from functools import partial

from transformers import AutoModelForCausalLM, Trainer, default_data_collator

import recipe
from hf_sparse_moe.distributed.resume import ResumableTrainer


@dataclass
class TextArguments(recipe.DataArguments):
    text_column: str = field(default="text", metadata={"help": "The column with the text."})


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, TextArguments, recipe.TrainingArguments
        )
        data = recipe.load_data(data_args)
        tokenizer = recipe.load_tokenizer(model_args)
        config = recipe.load_config(model_args, tokenizer)
        length = recipe.sequence_length(data_args, tokenizer, config)
        with args.main_process_first(desc="packing"):
            lines = recipe.is_text(data_args)
            blocks = recipe.pack(data, data_args, tokenizer, data_args.text_column, length, lines)
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
        compute_metrics=recipe.perplexity,
        preprocess_logits_for_metrics=partial(recipe.token_losses, shift=True),
    )
    recipe.train_and_evaluate(trainer, data_args, "perplexity is over the predicted tokens")


if __name__ == "__main__":
    main()
