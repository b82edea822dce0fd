"""Reading a dense checkpoint, and saying in one sentence why it cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .families import sparse_class
from .folder import COMPANIONS


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
)


@dataclass(frozen=True)
class Source:
    """
    A dense checkpoint on this machine.

    Args:
        name (`str`): The Hub id, or the folder's own name: where it lies on this machine is nobody else's business.
        folder (`Path`): Where its files are.
        revision (`str`, *optional*): The commit of a Hub id.
    """

    name: str
    folder: Path
    revision: str | None


def find_source(name_or_path: str, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """
    The checkpoint in a folder, or fetched from the Hub.

    Raises:
        ValueError: a missing, corrupt or pickled checkpoint.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return _fetch(name_or_path, revision, allow_pickle)
    _check_folder(folder, allow_pickle)
    return Source(folder.resolve().name, folder, None)


def load_dense(source: Source, dtype: str | torch.dtype = "auto", allow_pickle: bool = False) -> PreTrainedModel:
    """
    The dense model of a checkpoint, with its own head.

    Args:
        source ([`Source`]): From [`find_source`].
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): The checkpoint's own, or another.
        allow_pickle (`bool`, defaults to `False`): Whether weights in a pickle, which may run code, are read.

    Raises:
        ValueError: a mixture already, no text model, or an incomplete checkpoint.
    """
    config = read_config(source)
    auto_class = sparse_class(config, named_architecture(config)).dense_auto_class
    use_safetensors = None if allow_pickle else True
    with sensible_config(source):
        model, info = auto_class.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=use_safetensors,
            output_loading_info=True,
            trust_remote_code=False,
        )
    if info["missing_keys"]:
        raise missing_weight(source, model, sorted(info["missing_keys"])[0])
    return model


def named_architecture(config: PreTrainedConfig) -> str | None:
    """The class that a checkpoint's config names, if it names one."""
    return config.architectures[0] if config.architectures else None


def read_config(source: Source) -> PreTrainedConfig:
    """The config of a checkpoint; no code of it is run. Raises a `ValueError` where it is none."""
    with sensible_config(source):
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
        architectures = config.architectures or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise TypeError(f"`architectures` is {architectures!r}")
        # A model of a billion layers would fill the memory before any weight is missed.
        depth = max([getattr(config, name, None) or 0 for name in _DEPTHS])
        stored = sum(len(tensor_names(path)) for path in source.folder.glob("*.safetensors"))
        if stored and depth > stored:
            raise ValueError(
                f"`{source.name}` has {stored} tensors, but its config.json names {depth} layers. Fetch it again."
            )
    return config


_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


@contextmanager
def sensible_config(source: Source) -> Iterator[None]:
    """Say in one sentence that a config makes no model, whatever it breaks inside transformers."""
    try:
        yield
    except _NONSENSE as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The config.json of `{source.name}` does not describe a model that transformers can build with its "
            f"weights ({type(error).__name__}: {reason[:300]}). Fetch it again."
        ) from error


def missing_weight(source: Source, model: PreTrainedModel, key: str) -> ValueError:
    """The error for a checkpoint without a tensor that the model needs."""
    return ValueError(
        f"`{source.name}` lacks weights that `{type(model).__name__}` needs, such as `{key}`. Pass a complete "
        "checkpoint."
    )


def weight_files(source: Source) -> list[Path]:
    """The safetensors files that transformers would load, the first one first; none where the weights are a pickle."""
    single, index = source.folder / SAFE_WEIGHTS_NAME, source.folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    corrupt = ValueError(f"`{index}` is no index of safetensors files in its folder. Fetch it again.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise corrupt from error
    if not names or not all(isinstance(name, str) and _FILE_NAME.fullmatch(name) for name in names):
        raise corrupt
    for name in names:
        if not (source.folder / name).is_file():
            raise ValueError(f"`{source.name}` lacks `{name}`, which its index names. Fetch it again.")
    return [source.folder / name for name in names]


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file. Raises a `ValueError` where it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"`{path}` is truncated or corrupt ({error}). Fetch it again.") from error


def _fetch(repo_id: str, revision: str | None, allow_pickle: bool) -> Source:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"`{repo_id}` is no folder, and no Hub id (`user/name`). Check the path.") from None
    weights = ["*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        snapshot = snapshot_download(
            repo_id, revision=revision, allow_patterns=["*.json", "*.txt", "*.jinja", *COMPANIONS, *weights]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`{repo_id}` is no folder, and cannot be fetched from the Hub: {reason}") from error
    _check_folder(Path(snapshot), allow_pickle)
    return Source(repo_id, Path(snapshot), Path(snapshot).name)


def _check_folder(folder: Path, allow_pickle: bool) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{folder}` has no config.json. Pass the folder of a saved model.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("*.bin")):
        raise ValueError(f"`{folder}` has no weights (*.safetensors). Pass the folder of a saved model.")
    if not weights and not allow_pickle:
        raise ValueError(
            f"`{folder}` has its weights in a pickle (*.bin), which may run code when it is read. Convert it to "
            "safetensors, or pass `allow_pickle=True` (`--allow-pickle`) if you trust where it comes from."
        )
    for path in weights:
        tensor_names(path)
