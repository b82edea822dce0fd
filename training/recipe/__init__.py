"""What the recipes of this folder share: arguments, data, model and the run itself."""

from .data import DataArguments, column, is_text, load_data, require_columns, sequence_length
from .language_model import TextArguments, pack, perplexity, token_losses
from .model import ModelArguments, load_config, load_model, load_tokenizer
from .optimization import TrainingArguments
from .run import parse_arguments, stop_on_bad_input, train_and_evaluate


__all__ = [
    "DataArguments",
    "ModelArguments",
    "TextArguments",
    "TrainingArguments",
    "column",
    "is_text",
    "load_config",
    "load_data",
    "load_model",
    "load_tokenizer",
    "pack",
    "parse_arguments",
    "perplexity",
    "require_columns",
    "sequence_length",
    "stop_on_bad_input",
    "token_losses",
    "train_and_evaluate",
]
