"""Which files of a folder may be published: a checkpoint's, and no pickle, training state, link or token."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

from hf_sparse_moe.checkpoints.folder import COMPANIONS
from hf_sparse_moe.checkpoints.source import Source, tensor_names, weight_files

from .adapter_folder import ADAPTER_WEIGHTS, is_adapter


PUBLISHED = ("*.json", "*.md", "*.txt", "*.jinja", "*.yaml", "*.png", "*.svg", *COMPANIONS)
PUBLISHED_FOLDERS = (".eval_results",)
# Pickles run code when they are read; they may be named as anything, so this is a list of what people meet.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_CODE, _CODE_FILE = re.compile(r"from \.(\w+) import"), re.compile(r"\w+\.py")


def publishable_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """
    The files to publish by their name in the repository, and the names of what is left out.

    Args:
        folder (`Path`): A saved model, or an adapter.

    Raises:
        ValueError: no checkpoint, weights in a pickle or sharded over processes alone, or a file with a token in it.
    """
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is no folder. Pass the folder of a saved model.")
    weights = [path.name for path in _weights(folder)]
    if len(weights) > 1:
        weights.append("model.safetensors.index.json")
    code = _code(folder)
    files: dict[str, Path] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if path.is_dir() and not path.is_symlink() and name in PUBLISHED_FOLDERS:
            inside = [inner for inner in sorted(path.glob("*.yaml")) if _is_own(inner, folder)]
            files |= {f"{name}/{inner.name}": inner for inner in inside}
        elif (name in weights or name in code or _is_published(name)) and _is_own(path, folder):
            files[name] = path
        else:
            left_out.append(f"{name}/" if path.is_dir() else name)
    for name, path in files.items():
        if name not in weights and _TOKEN.search(path.read_bytes()):
            raise ValueError(f"`{path}` holds what looks like a token of the Hub. Take it out, and revoke the token.")
    return files, left_out


def is_pickle(name: str) -> bool:
    """Whether a file of this name may be a pickle."""
    return any(fnmatch(name.rpartition("/")[2].lower(), pattern) for pattern in PICKLES)


def _is_own(path: Path, folder: Path) -> bool:
    """A file that is in the folder, or in the Hub's cache that the folder is a snapshot of: no link to elsewhere."""
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    return path.is_file() and any(path.resolve().is_relative_to(home) for home in homes)


def _is_published(name: str) -> bool:
    stale_index = name.endswith(".safetensors.index.json")  # that of the weights in use is named
    hidden = name.startswith(".")
    return not (stale_index or hidden or is_pickle(name)) and any(fnmatch(name, pattern) for pattern in PUBLISHED)


def _weights(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        if is_adapter(folder) and (folder / ADAPTER_WEIGHTS).is_file():
            tensor_names(folder / ADAPTER_WEIGHTS)
            return [folder / ADAPTER_WEIGHTS]
    elif found := weight_files(Source(folder.resolve().name, folder, None)):
        for path in found:
            tensor_names(path)
        return found
    _refuse_training_state(folder)
    if any(is_pickle(path.name) for path in folder.iterdir()):
        raise ValueError(
            f"`{folder}` has its weights in a pickle, which may run code when it is read, and none is published. Load "
            "the model and `save_pretrained` it, which writes safetensors."
        )
    raise ValueError(
        f"`{folder}` is no checkpoint: a `config.json` with `*.safetensors`, or an adapter. Pass the folder of a "
        "saved model."
    )


def _refuse_training_state(folder: Path) -> None:
    deepspeed = any(folder.glob("global_step*")) or (folder / "zero_to_fp32.py").is_file()
    if deepspeed or next(folder.rglob("*.distcp"), None) is not None:
        raise ValueError(
            f"`{folder}` holds a training state of {'DeepSpeed' if deepspeed else 'FSDP'} that is sharded over "
            "processes, and no weights of a whole model. Run "
            f"`hf-sparse-moe consolidate {folder} CONSOLIDATED`, and push that folder."
        )


def _code(folder: Path) -> set[str]:
    """The Python files that the config's `auto_map` leads to."""
    path = folder / "config.json"
    if not path.is_file():
        return set()
    auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {})
    wanted = [f"{value.partition('.')[0]}.py" for value in auto_map.values() if isinstance(value, str)]
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in found and _CODE_FILE.fullmatch(name) and (folder / name).is_file():
            found.add(name)
            wanted += [f"{module}.py" for module in _CODE.findall((folder / name).read_text(encoding="utf-8"))]
    return found
