"""Configs of checkpoints, which may come from anyone and hold anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig

from .files import read_json, tensor_names


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
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # of stock mixtures
_DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


def read_config(source: Source | str | Path, revision: str | None = None, token: bool | str | None = None) -> Any:
    """
    The config of a checkpoint, folder or Hub id, of which nothing else is fetched. Never runs code that came with it,
    and never asks whether to. Raises a `ValueError` where it describes no model that transformers could build.
    """
    name, folder = _name(source), Path(source if isinstance(source, str | Path) else source.folder)
    if not folder.is_dir():
        folder = fetch(name, [CONFIG_NAME], revision, token)
    fields = read_json(folder / CONFIG_NAME)
    for field, value in _fields(fields):
        if (allowed := _allowed_instead(field, value)) is not None:
            raise ValueError(f"The config.json of `{name}` has `{field}={str(value)[:40]}`, which must be {allowed}.")
    with sensible_config(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # A model of many layers would take minutes before the first weight is missed.
        depth = max(int(getattr(config, field, None) or 0) for field in _DEPTHS)
        stored = sum(len(tensor_names(path)) for path in folder.glob("*.safetensors"))
        if stored and depth > stored:
            raise ValueError(
                f"`{name}` has {stored} tensors, but its config.json names {depth} layers. Fetch it again."
            )
    return config


def read_mixture_config(
    source: Source | str | Path, revision: str | None = None, token: bool | str | None = None
) -> SparseMoeConfig:
    """As [`read_config`]; raises a `ValueError` for a dense checkpoint too."""
    config, name = read_config(source, revision, token), _name(source)
    if not isinstance(config, SparseMoeConfig):
        is_stock = any(getattr(config.get_text_config(), field, None) for field in _EXPERT_COUNTS)
        what, command = ("a stock one", "import-stock") if is_stock else ("dense", "upcycle")
        raise ValueError(
            f"`{name}` is not a mixture of this package but {what} (`model_type={config.model_type!r}`). Make one of "
            f"it: hf-sparse-moe {command} {name} <new folder>."
        )
    return config


def usable_positions(config: Any) -> int | None:
    """
    How many tokens the model of a config, sparse or dense, has positions for; None where its config names no bound.
    RoBERTa and its relatives count from behind the padding's position, which leaves the first ones of
    `max_position_embeddings` without use.
    """
    dense: Any = config.dense_config if isinstance(config, SparseMoeConfig) else config
    sides = (getattr(dense, side, None) for side in ("encoder", "decoder"))
    bounds = [usable_positions(side) for side in sides if isinstance(side, PreTrainedConfig)]
    named = getattr(dense, "max_position_embeddings", None)
    if isinstance(named, int) and named > 0:
        bounds.append(named)
        if not getattr(dense, "rope_parameters", None):  # then there may be a table
            with sensible_config(str(dense.name_or_path)), torch.device("meta"):
                modules = AutoModel.from_config(dense).named_modules()
            tables = [module for name, module in modules if "position" in name and hasattr(module, "weight")]
            padded = [table for table in tables if getattr(table, "padding_idx", None) is not None]
            bounds += [len(table.weight) - table.padding_idx - 1 for table in padded]
    return min((bound for bound in bounds if bound is not None), default=None)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config in a folder, or None where there is none; raises as [`read_config`]."""
    if not read_json(folder / GENERATION_CONFIG_NAME, optional=True):
        return None
    with sensible_config(folder, GENERATION_CONFIG_NAME):
        return GenerationConfig.from_pretrained(folder)


@contextmanager
def sensible_config(source: Source | str | Path, file: str = CONFIG_NAME) -> Iterator[None]:
    """Say in one sentence that a config makes no model, whatever it breaks inside transformers."""
    name = _name(source)
    try:
        yield
    except _NONSENSE as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(f"`{name}` does not fit in the free memory of this machine or device.") from error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The {file} of `{name}` does not describe a model that transformers can build with its "
            f"weights ({type(error).__name__}: {reason[:300]}). Fetch it again."
        ) from error


def fetch(repo_id: str, patterns: list[str], revision: str | None, token: bool | str | None) -> Path:
    """The folder of a Hub repository in the cache, with the files that match a pattern, fetched where they are not."""
    if Path(repo_id).exists():
        raise ValueError(f"`{repo_id}` is a file. Pass the folder of a saved model.")
    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"`{repo_id}` is neither a folder nor a Hub id (`user/name`). Check the path.") from None
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`{repo_id}` is not a folder, and cannot be fetched from the Hub: {reason}") from error


def _name(source: Source | str | Path) -> str:
    return str(source if isinstance(source, str | Path) else source.name)


def _fields(value: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """Every value at any depth, by the name of the field that holds it."""
    yield field, value
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _fields(each, inner)
    elif isinstance(value, list) and field != "architectures":
        for each in value:
            yield from _fields(each, field)


def _allowed_instead(field: str, value: Any) -> str | None:
    """What may stand in a field in the place of a value that would hang or run code; None where the value may."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        broken = (most for name, most in _LIMITS.items() if name.fullmatch(field) and not value <= most)
        return next((f"at most {most:,}" for most in broken), None)
    if field == "id2label" and isinstance(value, dict) and len(value) > 100_000:
        return "at most 100,000 labels"
    if field == "architectures" and not all(isinstance(each, str) for each in _as_list(value)):
        return "a list of class names"
    if field == "auto_map" and not isinstance(value, dict | None):
        return "an object"
    if field.endswith("_implementation") and isinstance(value, str) and "/" in value:
        return "the name of an implementation, not of code on the Hub"
    return None


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [None]
