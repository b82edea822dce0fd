"""
Train a sparse encoder or decoder to classify: texts, pairs of texts, or (--task tokens) every token. Labels that are
decimal numbers make it a regression.

    python training/run_classification.py --model_name_or_path answerdotai/ModernBERT-base --num_experts 8 \
        --train_file train.csv.gz --validation_file test.csv.gz --text_column text --label_column category \
        --output_dir outputs/intents
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    Trainer,
)
from transformers.utils import ModelOutput

import recipe
from hf_sparse_moe.distributed.resume import ResumableTrainer
from recipe import metrics


TASKS = ("texts", "tokens")


@dataclass
class LabelledArguments(recipe.DataArguments):
    task: str = field(default="texts", metadata={"help": "texts: a label for each text. tokens: for each token."})
    text_column: str = field(default="text", metadata={"help": "The text; with --task tokens a list of words."})
    second_text_column: str | None = field(default=None, metadata={"help": "The second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "The label; with --task tokens a list of labels."})

    class_weights: str | None = field(
        default=None,
        metadata={"help": "balanced: every class counts as much in the loss, however few rows it has."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"`--task={self.task}` must be one of {TASKS}.")
        if self.class_weights not in (None, "balanced"):
            raise ValueError(f"`--class_weights={self.class_weights}` must be balanced, or left out.")


class Labels:
    """The labels of a data set, as class ids or, where they are decimal numbers, as they are."""

    def __init__(self, data: DatasetDict, args: LabelledArguments, config: PreTrainedConfig):
        feature = next(iter(data.values())).features[args.label_column]
        feature = getattr(feature, "feature", feature)  # of a list
        self.names: list[str] | None = getattr(feature, "names", None)  # a data set that numbers its labels itself
        self.numbered = self.names is not None
        self.regression = getattr(feature, "dtype", "").startswith("float")
        if self.regression or self.numbered:
            return
        of_split = {split: set(chain(*self._lists(rows, args))) for split, rows in data.items()}
        found = set().union(*of_split.values())
        self.names = [str(name) for name in sorted(found)]
        known = getattr(config, "label2id", None) or {}
        if set(self.names) <= set(known):  # a checkpoint that was trained on these labels keeps their ids
            self.names = sorted(known, key=known.get)
        elif new := sorted(found - of_split.get("train", found)):
            raise ValueError(
                f"`--label_column={args.label_column}` has {new} in the validation data and never in the training "
                "data, so that no model can learn it. Remove those rows, or pass training data with that label."
            )
        if len(self.names) < 2:
            raise ValueError(f"`--label_column={args.label_column}` has the one label {self.names}: two are needed.")

    @staticmethod
    def _lists(rows: Dataset, args: LabelledArguments) -> list[list]:
        return rows[args.label_column] if args.task == "tokens" else [rows.unique(args.label_column)]

    @property
    def head_fields(self) -> dict:
        """The config's fields for a head of these labels."""
        if self.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        ids = {name: index for index, name in enumerate(self.names)}
        labels = {"id2label": {index: name for name, index in ids.items()}, "label2id": ids}
        return {**labels, "problem_type": "single_label_classification"}

    def encode(self, value: object) -> int | float:
        if self.regression:
            return float(value)
        return int(value) if self.numbered else self.names.index(str(value))

    def balanced_loss(self, rows: Dataset) -> Callable[..., torch.Tensor]:
        """
        Cross-entropy in which every class of the encoded `rows` has the same weight in all, and a row 1 in the mean.
        """
        ids = np.asarray(list(chain(*rows["labels"])) if isinstance(rows[0]["labels"], list) else rows["labels"])
        counts = np.bincount(ids[ids >= 0], minlength=len(self.names))
        weights = torch.tensor(counts.sum() / np.count_nonzero(counts) / np.maximum(counts, 1), dtype=torch.float32)

        def loss(outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: int | None = None) -> torch.Tensor:
            logits = outputs.logits.float().flatten(0, -2)
            of_classes = weights.to(logits.device)
            total = torch.nn.functional.cross_entropy(logits, labels.flatten(), of_classes, reduction="sum")
            return total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

        return loss

    @property
    def of_spans(self) -> bool:
        """Whether the labels of tokens are tags of spans."""
        return all(name == "O" or name[:2] in ("B-", "I-") for name in self.names)

    def metric_names(self, by_token: bool) -> Iterable[str]:
        if self.regression:
            return metrics.regression([0.0], [0.0])
        return metrics.entities([["O"]], [["O"]]) if by_token and self.of_spans else metrics.classification([0], [0])

    def scores(self, prediction: EvalPrediction) -> dict[str, float]:
        """The scores that suit the labels."""
        outputs, references = prediction.predictions, prediction.label_ids
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.regression:
            return metrics.regression(outputs.reshape(-1), references.reshape(-1))
        classes = outputs.argmax(axis=-1)
        if references.ndim == 2 and self.of_spans:
            pairs = zip(classes, references, strict=True)
            tags = [[[self.names[i] for i in ids[row >= 0]] for ids in (guess, row)] for guess, row in pairs]
            guessed, right = zip(*tags, strict=True)
            return metrics.entities(list(guessed), list(right))
        kept = references != -100
        return metrics.classification(classes[kept], references[kept])


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, LabelledArguments, recipe.TrainingArguments
        )
        data = recipe.load_data(data_args)
        text, second, label = data_args.text_column, data_args.second_text_column, data_args.label_column
        recipe.require_columns(data, text_column=text, second_text_column=second, label_column=label)
        check_rows(data, data_args)
        tokenizer = recipe.load_tokenizer(model_args)
        config = recipe.load_config(model_args, tokenizer)
        length = recipe.sequence_length(data_args, tokenizer, config)
        labels = Labels(data, data_args, config)
        by_token, weighted = data_args.task == "tokens", data_args.class_weights is not None
        if weighted and (labels.regression or "train" not in data):
            raise ValueError("`--class_weights` counts the classes of training data. Leave it out.")
        recipe.check_best_metric(args, labels.metric_names(by_token))

        def tokenize(rows: dict[str, list]) -> dict[str, list]:
            texts, pairs = rows[text], None if second is None else rows[second]
            batch = tokenizer(texts, pairs, max_length=length, truncation=True, is_split_into_words=by_token)
            if by_token:
                batch["labels"] = [
                    first_tokens([labels.encode(value) for value in row], batch.word_ids(index))
                    for index, row in enumerate(rows[label])
                ]
            else:
                batch["labels"] = [labels.encode(value) for value in rows[label]]
            return batch

        with args.main_process_first(desc="tokenizing"):
            data = data.map(
                tokenize,
                batched=True,
                num_proc=data_args.num_workers,
                remove_columns=next(iter(data.values())).column_names,
                desc="Tokenizing",
            )
        auto_class = AutoModelForTokenClassification if by_token else AutoModelForSequenceClassification
        model = recipe.load_model(model_args, auto_class, config, tokenizer, args.seed, **labels.head_fields)
        if tokenizer.pad_token is None:  # most decoders; their classification heads look for the last token before it
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id

    collator_class = DataCollatorForTokenClassification if by_token else DataCollatorWithPadding
    trainer_class = Trainer if model_args.distributed_config is None else ResumableTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data.get("train"),
        eval_dataset=data.get("validation"),
        data_collator=collator_class(tokenizer),
        processing_class=tokenizer,
        compute_metrics=labels.scores,
        compute_loss_func=labels.balanced_loss(data["train"]) if weighted else None,
    )
    recipe.train_and_evaluate(
        trainer, data_args, "F1 of classes is the macro average; of tagged spans, seqeval's over whole spans"
    )


def check_rows(data: DatasetDict, args: LabelledArguments) -> None:
    """Raise a `ValueError` unless every row has its texts, or words, and its label or labels."""
    text, label = {"text_column": args.text_column}, {"label_column": args.label_column}
    feature = next(iter(data.values())).features[args.label_column]
    numbered = isinstance(getattr(feature, "feature", feature), ClassLabel)

    def is_label(value: object) -> bool:
        is_missing = value is None or value != value or (numbered and value == -1)  # NaN; what `datasets` gives
        return not is_missing and not isinstance(value, list | dict)

    if args.task == "texts":
        recipe.require_texts(data, **text, second_text_column=args.second_text_column)
        recipe.require_rows(data, is_label, "a label", **label)
        return

    def are_words(values: object) -> bool:
        return isinstance(values, list) and all(isinstance(value, str) for value in values)

    def are_labels(words: list[str], values: object) -> bool:
        return isinstance(values, list) and len(values) == len(words) and all(map(is_label, values))

    recipe.require_rows(data, are_words, "a list of words, as `--task tokens` takes them,", **text)
    recipe.require_rows(data, are_labels, "a list with as many labels as words", **text, **label)


def first_tokens(word_labels: list[int], word_ids: list[int | None]) -> list[int]:
    """The label of each word on its first token; -100, which no loss counts, on the others."""
    previous = [None, *word_ids]
    return [
        word_labels[word] if word is not None and word != before else -100
        for before, word in zip(previous, word_ids, strict=False)
    ]


if __name__ == "__main__":
    main()
