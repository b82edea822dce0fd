"""Tiny checkpoints in folders, for the tests that send and fetch them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_sparse


SHARD = "30KB"


def save_mixture(
    folder: Path, name: str = "bert", dtype: torch.dtype = torch.float32, train: bool = False, **save_arguments
) -> Path:
    """A tiny mixture, a step of training behind it if `train`, with its tokenizer."""
    model = tiny_sparse(name)
    if train:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model.train()(**tiny_inputs(model)).loss.backward()
        optimizer.step()
    model.to(dtype).save_pretrained(folder, **save_arguments)
    words = {"[UNK]": 0, **{f"word{token}": token for token in range(1, VOCAB_SIZE)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
