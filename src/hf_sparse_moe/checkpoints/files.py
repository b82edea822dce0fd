"""Which files of a folder are its own, and reading the small ones, whoever wrote them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


MODULES_NAME = "modules.json"  # of sentence-transformers
# What belongs to a checkpoint beside its weights and config, by the names that transformers' own tokenizers and
# processors, and sentence-transformers, look for.
COMPANIONS = (
    "tokenizer*",
    "*vocab*",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "tekken.json",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "word_*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    MODULES_NAME,
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]*_*/*.json",
    "[0-9]*_*/*.safetensors",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
)


def is_own(path: Path, folder: Path) -> bool:
    """
    Whether `path` is a regular file of `folder`: no link that leads elsewhere, no pipe, no device. The snapshots in
    the cache of huggingface_hub consist of links to the blobs beside them, which are their own.
    """
    try:
        home, real = folder.resolve(), path.resolve()
        if not real.is_file():
            return False
    except (OSError, RuntimeError):  # a loop of links
        return False
    if real.is_relative_to(home):
        return True
    repository = home.parent.parent
    is_snapshot = home.parent.name == "snapshots" and re.fullmatch(r"(models|datasets|spaces)--.+", repository.name)
    return bool(is_snapshot) and real.is_relative_to(repository / "blobs")


def copy_own(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files of `source` that are its own and match a pattern; does not replace what `folder` has."""
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        copy = folder / path.relative_to(source)
        if is_own(path, source) and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, and never through a link."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with new.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def read_json(path: Path, kind: type[dict] | type[list] = dict, optional: bool = False) -> Any:
    """
    What a JSON file beside the weights says: a `dict`, or another `kind`; an empty one where there is no file and it
    is `optional`. Raises a `ValueError` for a file that is not its folder's own, and for JSON of another kind.
    """
    if optional and not path.is_symlink() and not path.exists():
        return kind()
    text = read_text(path)
    try:
        value = json.loads(text)
        if _depth(value) > 64:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"`{path}` is not JSON ({reason}). Repair it, or fetch it again.") from error
    if not isinstance(value, kind):
        wanted = {dict: "an object", list: "a list"}[kind]
        raise ValueError(f"`{path}` holds a JSON {type(value).__name__}, not {wanted}. Repair it, or fetch it again.")
    return value


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(each) for each in inner if isinstance(each, dict | list)), default=0)


def read_text(path: Path) -> str:
    """The text of a file that is its folder's own; raises as [`read_json`]."""
    check_own(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8 text. Repair it, or fetch it again.") from error


def check_own(path: Path) -> None:
    """Raise a `ValueError` unless a file is there and its folder's own."""
    if is_own(path, path.parent):
        return
    if path.is_symlink():
        raise ValueError(
            f"`{path}` is a link that leads out of its folder, or nowhere, and is not followed. Put the file itself "
            "there."
        )
    if path.exists():
        raise ValueError(f"`{path}` is not a regular file. Put the file itself there.")
    raise ValueError(f"`{path.parent}` has no {path.name}. Pass the folder of a saved model.")


def tensor_names(path: Path) -> list[str]:
    """
    The names in a safetensors file, which may lie elsewhere: weights are tensors or nothing. Raises a `ValueError`
    unless the file is regular and whole.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` is not a regular file. Put the file itself there.")
    path.open("rb").close()  # an error that names the file, where it may not be read
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"`{path}` is truncated or corrupt ({error}). Fetch it again.") from error
