"""
Train a sparse encoder by masked language modelling: a dense checkpoint upcycled, a mixture taken further, or one from
scratch.

    python training/run_mlm.py --model_name_or_path answerdotai/ModernBERT-base --num_experts 8 \
        --train_file "corpus/*.jsonl.gz" --output_dir outputs/modernbert-8x --bf16
"""

from dataclasses import dataclass, field
from functools import partial

from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    default_data_collator,
)

import recipe
from hf_sparse_moe.distributed.resume import ResumableTrainer


@dataclass
class MaskedTextArguments(recipe.TextArguments):
    mlm_probability: float = field(default=0.15, metadata={"help": "The share of tokens that is masked."})


def masked_once(blocks: Dataset, tokenizer, mlm_probability: float) -> Dataset:
    """The validation blocks with masks drawn once, so that one evaluation compares with the next."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability, seed=0, return_tensors="np")

    def mask(rows: dict[str, list]) -> dict:
        batch = collator([{"input_ids": ids} for ids in rows["input_ids"]])
        return {name: batch[name] for name in ("input_ids", "labels")}

    return blocks.map(mask, batched=True, desc="Masking validation")


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, MaskedTextArguments, recipe.TrainingArguments
        )
        data = recipe.load_data(data_args)
        tokenizer = recipe.load_tokenizer(model_args)
        config = recipe.load_config(model_args, tokenizer)
        length = recipe.sequence_length(data_args, tokenizer, config)
        mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability)
        with args.main_process_first(desc="packing"):
            blocks, groups = recipe.pack(data, data_args, tokenizer, length, lines=False)
            if "validation" in blocks:
                blocks["validation"] = masked_once(blocks["validation"], tokenizer, data_args.mlm_probability)
        recipe.check_best_metric(args, recipe.perplexity_names(groups))
        model = recipe.load_model(model_args, AutoModelForMaskedLM, config, tokenizer, args.seed)

    def collate(rows: list[dict]) -> dict:
        return default_data_collator(rows) if "labels" in rows[0] else mask(rows)

    trainer_class = Trainer if model_args.distributed_config is None else ResumableTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        data_collator=collate,
        processing_class=tokenizer,
        compute_metrics=partial(recipe.perplexity, groups=groups),
        preprocess_logits_for_metrics=partial(recipe.token_losses, shift=False),
    )
    recipe.train_and_evaluate(trainer, data_args, "perplexity is over the predicted tokens")


if __name__ == "__main__":
    main()
