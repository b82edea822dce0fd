"""Reading a dense checkpoint, and saying in one sentence why it cannot be read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .config import fetch
from .files import COMPANIONS, check_own, read_json, tensor_names


_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")


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


def find_source(
    source: str | Path,
    revision: str | None = None,
    allow_pickle: bool | None = None,
    token: bool | str | None = None,
) -> Source:
    """
    The checkpoint in a folder, or fetched from the Hub. Raises a `ValueError` for a missing or corrupt one, for links
    that lead out of its folder, and for weights in a pickle, which may run code, unless `allow_pickle`; None where the
    caller has no such argument.
    """
    folder = Path(source)
    if folder.is_dir():
        found = Source(folder.resolve().name, folder, None)
    else:
        wanted = ["*.json", "*.txt", "*.jinja", *COMPANIONS, "*.safetensors", *(["*.bin"] if allow_pickle else [])]
        folder = fetch(str(source), wanted, revision, token)
        found = Source(str(source), folder, folder.name)
    _check_folder(folder, allow_pickle)
    return found


def named_architecture(config: PreTrainedConfig) -> str | None:
    """The class that a checkpoint's config names, if it names one."""
    names = config.architectures
    return names[0] if isinstance(names, list) and names else None


def missing_weight(name: str, model: PreTrainedModel, key: str) -> ValueError:
    """The error for a checkpoint without a tensor that the model needs."""
    return ValueError(
        f"`{name}` lacks weights that `{type(model).__name__}` needs, such as `{key}`. Pass a complete checkpoint."
    )


def weight_files(source: Source) -> list[Path]:
    """The safetensors files that transformers would load, the first one first; none where the weights are a pickle."""
    single, index = source.folder / SAFE_WEIGHTS_NAME, source.folder / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and _FILE_NAME.fullmatch(name) for name in names):
        raise ValueError(f"`{index}` is no index of safetensors files in its folder. Fetch it again.")
    paths = [source.folder / name for name in sorted(set(names))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"`{source.name}` lacks `{path.name}`, which its index names. Fetch it again.")
    return paths


def _check_folder(folder: Path, allow_pickle: bool | None) -> None:
    """What transformers reads by its name must be the folder's own, and the weights whole."""
    for path in (folder / CONFIG_NAME, *sorted(folder.glob("*.json"))):
        check_own(path)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"`{folder}` holds a model and an adapter. Move one of them to a folder of its own.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("*.bin")):
        raise ValueError(f"`{folder}` has no weights (*.safetensors). Pass the folder of a saved model.")
    if not weights and not allow_pickle:
        allow = "pass `allow_pickle=True` (`--allow-pickle`)"
        way = "load and save it with transformers" if allow_pickle is None else allow
        raise ValueError(
            f"`{folder}` has its weights in a pickle (*.bin), which may run code when it is read. Convert it to "
            f"safetensors, or {way} if you trust where it comes from."
        )
    for path in weights:
        tensor_names(path)
