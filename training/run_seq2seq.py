"""
Train a sparse encoder-decoder to write one text from another: translation, summarization, ...

    python training/run_seq2seq.py --model_name_or_path google-t5/t5-small --num_experts 8 \
        --train_file train.jsonl.gz --validation_file dev.jsonl.gz --source_column translation.en \
        --target_column translation.de --source_prefix "translate English to German: " --output_dir outputs/en-de
"""

from dataclasses import dataclass, field

import numpy as np
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import recipe
from hf_sparse_moe.distributed.resume import ResumableSeq2SeqTrainer
from recipe import metrics


@dataclass
class PairArguments(recipe.DataArguments):
    source_column: str = field(
        default="source", metadata={"help": "The column to read; translation.en is the entry en of translation."}
    )
    target_column: str = field(default="target", metadata={"help": "The column to write, as --source_column."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source, as T5 wants it."})
    max_target_length: int | None = field(default=None, metadata={"help": "Tokens of a target; as --max_length."})
    metric: str = field(default="sacrebleu", metadata={"help": "sacrebleu or rouge, of the generated texts."})
    metric_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "How the metric cuts texts into words: sacrebleu by 13a (the default), intl, zh (Chinese) or "
            "char; rouge by zh or char."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_target_length is not None and self.max_target_length < 1:
            raise ValueError(f"`--max_target_length={self.max_target_length}` must be at least 1.")
        if self.metric not in metrics.OF_TEXTS:
            raise ValueError(f"`--metric={self.metric}` must be one of {tuple(metrics.OF_TEXTS)}.")
        allowed = metrics.TOKENIZERS[self.metric]
        if self.metric_tokenizer not in (None, *allowed):
            raise ValueError(
                f"`--metric_tokenizer={self.metric_tokenizer}` of `--metric {self.metric}` must be one of {allowed}. "
                "Without it, the metric cuts words as it does by default."
            )


@dataclass
class GeneratingArguments(recipe.TrainingArguments, Seq2SeqTrainingArguments):
    predict_with_generate: bool = field(default=True, metadata={"help": "Generate in evaluation, for the metric."})


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, PairArguments, GeneratingArguments
        )
        score = metrics.OF_TEXTS[data_args.metric]
        recipe.check_best_metric(args, score(["a"], ["a"]) if args.predict_with_generate else ())
        data = recipe.load_data(data_args)
        source, target = data_args.source_column, data_args.target_column
        recipe.require_columns(data, source_column=source, target_column=target)
        recipe.require_texts(data, source_column=source, target_column=target)
        tokenizer = recipe.load_tokenizer(model_args)
        config = recipe.load_config(model_args, tokenizer)
        length = recipe.sequence_length(data_args, tokenizer, config)
        target_length = min(data_args.max_target_length or length, length)
        # `map` hashes what the function closes over: plain values, and not the module with all that is in it.
        prefix, column = data_args.source_prefix, recipe.column
        # Not from the labels, which are cut at `--max_target_length`.
        references = [text.strip() for text in column(data["validation"], target)] if "validation" in data else []

        def tokenize(rows: dict[str, list]) -> dict[str, list]:
            sources = [prefix + text for text in column(rows, source)]
            batch = tokenizer(sources, max_length=length, truncation=True)
            targets = tokenizer(text_target=column(rows, target), max_length=target_length, truncation=True)
            return {
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "labels": targets["input_ids"],
            }

        with args.main_process_first(desc="tokenizing"):
            data = data.map(
                tokenize,
                batched=True,
                num_proc=data_args.num_workers,
                remove_columns=next(iter(data.values())).column_names,
                desc="Tokenizing",
            )
        model = recipe.load_model(model_args, AutoModelForSeq2SeqLM, config, tokenizer, args.seed)
        if args.generation_max_length is None:
            args.generation_max_length = target_length

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        ids = np.where(prediction.predictions == -100, tokenizer.pad_token_id, prediction.predictions)
        generated = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        # Several processes repeat the first rows in the last batch; `--dataloader_drop_last` leaves the last rows out.
        count = min(len(generated), len(references))
        return score(generated[:count], references[:count], data_args.metric_tokenizer)

    trainer_class = Seq2SeqTrainer if model_args.distributed_config is None else ResumableSeq2SeqTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=compute_metrics if args.predict_with_generate else None,
    )
    register_fsdp_forward_method(model, "generate")  # it calls the encoder by itself
    cut = f"words cut by {data_args.metric_tokenizer}" if data_args.metric_tokenizer else "its default tokenizer"
    recipe.train_and_evaluate(trainer, data_args, f"{data_args.metric} of generated texts, {cut}")


if __name__ == "__main__":
    main()
