"""What the recipes of this folder share: arguments, data, model and the run itself."""

from .data import (
    DataArguments,
    column,
    is_text,
    load_data,
    require_columns,
    require_rows,
    require_texts,
    sequence_length,
)
from .language_model import TextArguments, pack, perplexity, perplexity_names, token_losses
from .model import ModelArguments, load_config, load_model, load_tokenizer
from .optimization import TrainingArguments, check_best_metric
from .run import parse_arguments, stop_on_bad_input, train_and_evaluate


__all__ = [
    "DataArguments",
    "ModelArguments",
    "TextArguments",
    "TrainingArguments",
    "check_best_metric",
    "column",
    "is_text",
    "load_config",
    "load_data",
    "load_model",
    "load_tokenizer",
    "pack",
    "parse_arguments",
    "perplexity",
    "perplexity_names",
    "require_columns",
    "require_rows",
    "require_texts",
    "sequence_length",
    "stop_on_bad_input",
    "token_losses",
    "train_and_evaluate",
]
