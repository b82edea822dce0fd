"""
Train a mixture of any family to answer questions with a part of the text that comes with them: SQuAD and what has its
form, in English or Chinese. Questions that the text does not answer (SQuAD 2) are learnt where the data have some.

    python training/run_qa.py --model_name_or_path answerdotai/ModernBERT-base --num_experts 8 \
        --train_file train-v1.1.json --validation_file dev-v1.1.json --max_length 384 --output_dir outputs/qa
"""

import logging
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from datasets import DatasetDict
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, EvalPrediction, Trainer

import recipe
from hf_sparse_moe.distributed.resume import ResumableTrainer
from recipe import metrics
from recipe import question_answering as qa


logger = logging.getLogger("recipe")


@dataclass
class QuestionArguments(recipe.DataArguments):
    context_column: str = field(default="context", metadata={"help": "The text that holds the answers."})
    question_column: str = field(default="question", metadata={"help": "The question."})
    answers_column: str = field(
        default="answers",
        metadata={"help": "The answers as SQuAD has them: `text` and `answer_start`; none of a question without one."},
    )
    language: str = field(
        default="en", metadata={"help": "By whose rules answers are compared: en (SQuAD) or zh (CMRC 2018)."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens that two windows of a long text share; a quarter of --max_length."}
    )
    max_answer_length: int = field(default=50, metadata={"help": "Tokens of an answer at most."})
    null_threshold: float = field(
        default=0.0, metadata={"help": "How much better no answer must score than the best one, to be given."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language not in metrics.LANGUAGES:
            raise ValueError(
                f"`--language={self.language}` must be one of {metrics.LANGUAGES}. Take en where words have spaces "
                "between them: it also leaves out a, an, the and ASCII punctuation."
            )
        if self.max_answer_length < 1:
            raise ValueError(f"`--max_answer_length={self.max_answer_length}` must be at least 1.")


def answered(data: DatasetDict, columns: tuple[str, str, str], args: QuestionArguments) -> DatasetDict:
    """The rows of each split that [`qa.with_answers`] leaves; `args` are told that there are fewer."""
    found = DatasetDict({split: qa.with_answers(rows, columns) for split, rows in data.items()})
    for split, rows in found.items():
        if left_out := len(data[split]) - len(rows):
            text = "%d of %d rows of the %s data are left out: their answer is not in the text"
            logger.warning(text, left_out, len(data[split]), split)
            args.whole_split &= split != "validation"
        if len(rows) == 0:
            raise ValueError(f"No answer in `--answers_column={columns[2]}` of the {split} data is in its text.")
    return found


def main() -> None:
    with recipe.stop_on_bad_input():
        model_args, data_args, args = recipe.parse_arguments(
            __doc__, recipe.ModelArguments, QuestionArguments, recipe.TrainingArguments
        )
        data = recipe.load_data(data_args, qa.question_rows)
        columns = (data_args.context_column, data_args.question_column, data_args.answers_column)
        context, question, answers = columns
        recipe.require_columns(data, context_column=context, question_column=question, answers_column=answers)
        recipe.require_texts(data, context_column=context)
        recipe.require_rows(data, lambda value: isinstance(value, str | None), "a question", question_column=question)
        form = '`{"text": [...], "answer_start": [...]}`, both lists, or `[]`'
        recipe.require_rows(data, qa.are_answers, form, answers_column=answers)
        with args.main_process_first(desc="looking for answers"):
            data = answered(data, columns, data_args)
        kinds = {qa.is_unanswerable(row) for row in data["validation"][answers]} if "validation" in data else {True}
        examples = [[] if unanswerable else ["a"] for unanswerable in kinds]
        recipe.check_best_metric(args, metrics.question_answering([""] * len(examples), examples))
        tokenizer = recipe.load_tokenizer(model_args)
        if not tokenizer.is_fast:
            raise ValueError(f"`{type(tokenizer).__name__}` does not say where tokens stand. Use a fast tokenizer.")
        config = recipe.load_config(model_args, tokenizer)
        length = recipe.sequence_length(data_args, tokenizer, config)
        stride = length // 4 if data_args.stride is None else data_args.stride
        room = length - length // 2 - tokenizer.num_special_tokens_to_add(pair=True)
        if not 0 <= stride < room:
            raise ValueError(f"`--stride={stride}` must be from 0 to {room - 1} where `--max_length` is {length}.")
        tokenizer.padding_side = "right"  # or the answers would move
        if tokenizer.pad_token is None:  # most decoders
            tokenizer.pad_token = tokenizer.eos_token
        tokenize = partial(qa.windows, tokenizer=tokenizer, columns=columns, length=length, stride=stride)
        with args.main_process_first(desc="tokenizing"):
            features = data.map(
                tokenize,
                batched=True,
                with_indices=True,
                num_proc=data_args.num_workers,
                remove_columns=next(iter(data.values())).column_names,
                desc="Tokenizing",
            )
        model = recipe.load_model(model_args, AutoModelForQuestionAnswering, config, tokenizer, args.seed)
        if tokenizer.pad_token_id is not None:
            model.config.pad_token_id = tokenizer.pad_token_id

    unanswerable = any(qa.is_unanswerable(row) for rows in data.values() for row in rows[answers])
    threshold = data_args.null_threshold if unanswerable else None

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        starts, ends = prediction.predictions
        found = features["validation"].select_columns(["row", "places", "empty"])
        rows = groupby(zip(starts, ends, found, strict=True), key=lambda window: window[2]["row"])
        given = [
            qa.best_answer(
                data["validation"][row][context],
                [(start, end, window["places"], window["empty"]) for start, end, window in group],
                data_args.max_answer_length,
                threshold,
            )
            for row, group in rows
        ]
        references = [qa.answer_texts(row) for row in data["validation"][answers]]
        return metrics.question_answering(given, references, data_args.language)

    trainer_class = Trainer if model_args.distributed_config is None else ResumableTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=features.get("train"),
        eval_dataset=features.get("validation"),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[:2],
    )
    rules = {"en": "SQuAD's", "zh": "CMRC 2018's"}[data_args.language]
    recipe.train_and_evaluate(trainer, data_args, f"exact match and F1 (0 to 100) by {rules} rules")


if __name__ == "__main__":
    main()
