"""Which files of a folder may be published: a checkpoint's, and no pickle, training state, link or token."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from hf_sparse_moe.checkpoints.files import COMPANIONS, is_own, read_json, read_text, tensor_names
from hf_sparse_moe.checkpoints.source import Source, weight_files

from .adapter_files import ADAPTER_WEIGHTS, is_adapter
from .checkpoint import mapping


RESULTS = ".eval_results/*.yaml"
PUBLISHED = ("*.json", "*.md", "*.txt", "*.jinja", "*.yaml", "*.png", "*.svg", RESULTS, *COMPANIONS)
# Pickles run code when they are read; they may be named as anything, so this is a list of what people meet.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz")
INDEX = "model.safetensors.index.json"


def publishable_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """
    The files to publish by their name in the repository, and the names of what is left out. Raises a `ValueError` for
    no checkpoint, weights in a pickle or sharded over processes alone, or a file with a token in it.
    """
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder. Pass the folder of a saved model.")
    weights = _weights(folder)
    chosen = {*weights, *code_files(folder), *([INDEX] if len(weights) > 1 else [])}
    found = {path for pattern in (*PUBLISHED, *chosen) for path in folder.glob(pattern) if is_own(path, folder)}
    named = {path.relative_to(folder).as_posix(): path for path in sorted(found)}
    files = {name: path for name, path in named.items() if name in chosen or _is_published(name)}
    if links := [name for name in weights if name not in files]:
        raise ValueError(f"`{folder / links[0]}` is a link that leads out of its folder. Put the file there itself.")
    for name, path in files.items():
        if name not in weights:
            checked_for_tokens(path)
    published = {name.partition("/")[0] for name in files}
    others = [path for path in sorted(folder.iterdir()) if path.name not in published]
    return files, [f"{path.name}/" if path.is_dir() else path.name for path in others]


def checked_for_tokens(path: Path) -> Path:
    """The path of a file without a token of the Hub in it; else a `ValueError`."""
    if re.search(rb"\bhf_[A-Za-z0-9]{30,}", path.read_bytes()):
        raise ValueError(f"`{path}` holds what looks like a token of the Hub. Remove it, and revoke the token.")
    return path


def is_pickle(name: str) -> bool:
    """Whether a file of this name may be a pickle."""
    return any(fnmatch(name.rpartition("/")[2].lower(), pattern) for pattern in PICKLES)


def code_files(folder: Path) -> list[str]:
    """The Python files that the config's `auto_map` leads to, also those that are not there."""
    auto_map = mapping(read_json(folder / "config.json", optional=True).get("auto_map"))
    wanted, found = [str(value).partition(".")[0] for value in auto_map.values()], set()
    while wanted:
        name = f"{wanted.pop()}.py"
        if name not in found and re.fullmatch(r"\w+\.py", name):
            found.add(name)
            if is_own(folder / name, folder):
                wanted += re.findall(r"from \.(\w+) import", read_text(folder / name))
    return sorted(found)


def _is_published(name: str) -> bool:
    is_stale_index = name.endswith(".safetensors.index.json")  # that of the weights in use is chosen
    is_hidden = name.startswith(".") and not fnmatch(name, RESULTS)
    return not (is_stale_index or is_hidden or is_pickle(name))


def _weights(folder: Path) -> list[str]:
    found: list[Path] = []
    if is_adapter(folder):
        found = [path for path in (folder / ADAPTER_WEIGHTS,) if path.is_file()]
    elif (folder / "config.json").is_file():
        found = weight_files(Source(folder.resolve().name, folder, None))
    for path in found:
        tensor_names(path)
    if found:
        return [path.name for path in found]
    raise ValueError(
        f"`{folder}` is not a checkpoint that can be published: it needs a `config.json` with `*.safetensors`, or an "
        "adapter. A pickle may run code when it is read: load the model and `save_pretrained` it. A training state of "
        f"FSDP or DeepSpeed has no whole weights: run `hf-sparse-moe consolidate {folder} CONSOLIDATED`."
    )
