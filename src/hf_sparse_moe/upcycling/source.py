"""Reading a dense checkpoint, and saying in one sentence why it cannot be read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from .families import sparse_class


def load_dense(
    name_or_path: str, *, revision: str | None = None, dtype: str | torch.dtype = "auto", allow_pickle: bool = False
) -> PreTrainedModel:
    """
    The dense model of a folder or Hub id, with its own head.

    Args:
        name_or_path (`str`): A folder or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): The checkpoint's own, or another.
        allow_pickle (`bool`, defaults to `False`): Whether weights in a pickle (`*.bin`), which may run code, are read.

    Raises:
        ValueError: a missing, sparse, corrupt or pickled checkpoint, or one that is no text model.
    """
    if (folder := Path(name_or_path)).is_dir():
        check_folder(folder, allow_pickle)
    elif folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") != 1:
        raise ValueError(f"`{name_or_path}` is no folder, and no Hub id (`user/name`). Check the path.")
    config = AutoConfig.from_pretrained(name_or_path, revision=revision)
    architecture = (config.architectures or [None])[0]
    auto_class = sparse_class(config, architecture).dense_auto_class
    use_safetensors = None if allow_pickle else True
    model, info = auto_class.from_pretrained(
        name_or_path, revision=revision, dtype=dtype, use_safetensors=use_safetensors, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(
            f"`{name_or_path}` lacks weights that `{type(model).__name__}` needs, such as "
            f"`{sorted(info['missing_keys'])[0]}`. Pass a complete checkpoint."
        )
    return model


def check_folder(folder: Path, allow_pickle: bool) -> None:
    """Raise a `ValueError` unless `folder` holds a config and readable weights."""
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
