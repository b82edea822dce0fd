"""What belongs to a checkpoint beside its weights and config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import logging

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig

from .config import read_config
from .files import COMPANIONS, copy_own, read_json


def copy_companions(source: Path, folder: Path) -> None:
    """
    Copy the tokenizer, processors, modules of sentence-transformers and licences of a checkpoint; does not replace
    what `folder` has. AutoTokenizer may tell the tokenizer's class by the model type, which is another one in
    `folder`: there `tokenizer_config.json` names the class.
    """
    copy_own(source, folder, COMPANIONS)
    config = read_config(source)
    if (tokenizer := tokenizer_in(folder, config)) is None:
        return
    fields = read_json(folder / TOKENIZER_CONFIG_FILE, optional=True)
    named = fields.get("tokenizer_class")
    if not isinstance(named, str) or tokenizer_class_from_name(named) is not type(tokenizer):
        fields["tokenizer_class"] = type(tokenizer).__name__
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        (folder / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")


def tokenizer_in(folder: Path, config: Any) -> Any:
    """The tokenizer in a folder as that of a model of `config`; None where none can be loaded."""
    with _without_warnings():
        try:
            dense = config.dense_config if isinstance(config, SparseMoeConfig) else config
            tokenizer = AutoTokenizer.from_pretrained(folder, config=dense, trust_remote_code=False)
        except Exception:  # noqa: BLE001  tokenizers raises nothing narrower; there is nothing to name then
            return None
    names = {TOKENIZER_CONFIG_FILE, *tokenizer.vocab_files_names.values()}
    return tokenizer if any((folder / name).is_file() for name in names) else None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers warns of the source's tokenizer when the mixture is loaded, and need not do so twice."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
