"""Configs of checkpoints, which may come from anyone and hold anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig

from .files import count_tensors, read_json


if TYPE_CHECKING:
    from .source import Source


# What a config with values of the wrong kind ends in, somewhere inside transformers or torch.
_NONSENSE = (
    StrictDataclassError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    SafetensorError,
)
# The most that a config may ask for, by the name of the field: far above any model, and built in seconds.
_LIMITS = {
    re.compile(r".*layers?|.*depth|.*num_blocks"): 1024,
    re.compile(r"(n|num)_.*experts?"): 4096,
    re.compile(r"num_labels"): 100_000,
    re.compile(r"n_positions|n_ctx|max_.*positions?|max_position_embeddings"): 2**24,
    re.compile(r".*(size|dim|rank|heads|width)|d_.*|n_embd|n_inner|n_head"): 2**27,
}


def read_config(source: Source | str | Path, revision: str | None = None, token: bool | str | None = None) -> Any:
    """
    The config of a checkpoint. Never runs code that came with it, and never asks whether to.

    Args:
        source ([`Source`], `str` or `Path`): A checkpoint, or a folder or Hub id, of which only the config is fetched.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.

    Raises:
        ValueError: no config, or one that describes no model that the installed transformers could build.
    """
    given = source if isinstance(source, str | Path) else source.folder
    folder, name = Path(given), str(given if isinstance(source, str | Path) else source.name)
    if not folder.is_dir():
        folder = _fetched(name, revision, token).parent
    fields = read_json(folder / CONFIG_NAME)
    _check_fields(name, fields)
    with sensible_config(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # A model of many layers would take minutes before the first weight is missed.
        depth = max(int(getattr(config, field, None) or 0) for field in _DEPTHS)
        stored = count_tensors(folder)
        if stored and depth > stored:
            raise ValueError(
                f"`{name}` has {stored} tensors, but its config.json names {depth} layers. Fetch it again."
            )
    return config


def read_mixture_config(
    source: Source | str | Path, revision: str | None = None, token: bool | str | None = None
) -> SparseMoeConfig:
    """As [`read_config`]; raises a `ValueError` for a dense checkpoint too."""
    config = read_config(source, revision, token)
    if not isinstance(config, SparseMoeConfig):
        name = source if isinstance(source, str | Path) else source.name
        raise ValueError(
            f"`{name}` is not a mixture of this package (`model_type={config.model_type!r}`). Make one of a dense "
            f"checkpoint: hf-sparse-moe upcycle {name} <new folder>; of a stock mixture: hf-sparse-moe import-stock."
        )
    return config


_DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config in a folder, or None where there is none; raises as [`read_config`]."""
    if not read_json(folder / GENERATION_CONFIG_NAME, optional=True):
        return None
    with sensible_config(folder, GENERATION_CONFIG_NAME):
        return GenerationConfig.from_pretrained(folder)


@contextmanager
def sensible_config(source: Source | str | Path, file: str = CONFIG_NAME) -> Iterator[None]:
    """Say in one sentence that a config makes no model, whatever it breaks inside transformers."""
    name = source if isinstance(source, str | Path) else source.name
    try:
        yield
    except _NONSENSE as error:
        if is_out_of_memory(error):
            raise MemoryError(f"`{name}` does not fit in the free memory of this machine or device.") from error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The {file} of `{name}` does not describe a model that transformers can build with its "
            f"weights ({type(error).__name__}: {reason[:300]}). Fetch it again."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _fetched(name: str, revision: str | None, token: bool | str | None) -> Path:
    if Path(name).exists():
        raise ValueError(f"`{name}` is a file. Pass the folder of a saved model.")
    try:
        validate_repo_id(name)
        return Path(str(cached_file(name, CONFIG_NAME, revision=revision, token=token)))
    except HFValidationError:
        raise ValueError(f"`{name}` is neither a folder nor a Hub id (`user/name`). Check the path.") from None
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`{name}` is not a folder, and cannot be fetched from the Hub: {reason}") from error


def _check_fields(name: str, fields: dict[str, Any]) -> None:
    """Raise a `ValueError` for what would hang or run code before transformers finds fault with it."""

    def refuse(field: str, value: Any, allowed: str) -> None:
        raise ValueError(f"The config.json of `{name}` has `{field}={str(value)[:40]}`, which must be {allowed}.")

    def check(field: str, value: Any) -> None:
        if isinstance(value, dict):
            if field in ("id2label", "label2id") and len(value) > 100_000:
                refuse(field, f"{len(value)} labels", "at most 100,000 labels")
            for inner, each in value.items():
                check(inner, each)
        elif isinstance(value, list):
            for each in value[:1024]:
                if isinstance(each, dict | list):
                    check(field, each)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for pattern, most in _LIMITS.items():
                if pattern.fullmatch(field) and not value <= most:
                    refuse(field, value, f"at most {most:,}")
        elif isinstance(value, str) and field.endswith("_implementation") and "/" in value:
            refuse(field, value, "the name of an implementation, not of code on the Hub")

    check("", fields)
    names = fields.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(each, str) for each in names)):
        refuse("architectures", names, "a list of class names")
    if not isinstance(fields.get("auto_map", {}), dict | None):
        refuse("auto_map", fields["auto_map"], "an object")
