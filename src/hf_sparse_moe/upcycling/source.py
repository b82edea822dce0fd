"""Reading a dense checkpoint, and saying in one sentence why it cannot be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from .families import sparse_class


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
    config = AutoConfig.from_pretrained(source.folder)
    auto_class = sparse_class(config, (config.architectures or [None])[0]).dense_auto_class
    use_safetensors = None if allow_pickle else True
    model, info = auto_class.from_pretrained(
        source.folder, dtype=dtype, use_safetensors=use_safetensors, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"`{source.name}` lacks weights that `{type(model).__name__}` needs, such as "
            f"`{sorted(info['missing_keys'])[0]}`. Pass a complete checkpoint."
        )
    return model


def _fetch(repo_id: str, revision: str | None, allow_pickle: bool) -> Source:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(f"`{repo_id}` is no folder, and no Hub id (`user/name`). Check the path.") from None
    weights = ["*.safetensors", *(["*.bin"] if allow_pickle else [])]
    try:
        snapshot = snapshot_download(
            repo_id, revision=revision, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", *weights]
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
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except SafetensorError as error:
            raise ValueError(f"`{path}` is truncated or corrupt ({error}). Fetch it again.") from error
