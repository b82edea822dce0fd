"""Which files of a folder may be published: a checkpoint's, and no pickle, training state, link or token."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from hf_sparse_moe.checkpoints.files import COMPANIONS, is_own, read_json, read_text, tensor_names
from hf_sparse_moe.checkpoints.source import Source, weight_files

from .adapter_folder import ADAPTER_WEIGHTS, is_adapter
from .checkpoint import mapping


RESULTS = ".eval_results/*.yaml"
PUBLISHED = ("*.json", "*.md", "*.txt", "*.jinja", "*.yaml", "*.png", "*.svg", RESULTS, *COMPANIONS)
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
        raise ValueError(f"`{folder}` is not a folder. Pass the folder of a saved model.")
    weights = _weights(folder)
    chosen = {*weights, *_code(folder)}
    if len(weights) > 1:
        chosen.add("model.safetensors.index.json")
    found = sorted(
        {path for pattern in (*PUBLISHED, *chosen) for path in folder.glob(pattern) if is_own(path, folder)}
    )
    named = {path.relative_to(folder).as_posix(): path for path in found}
    files = {name: path for name, path in named.items() if name in chosen or _is_published(name)}
    for name in weights:
        if name not in files:
            raise ValueError(f"`{folder / name}` is a link that leads out of its folder. Put the file there itself.")
    published = {name.partition("/")[0] for name in files}
    others = [path for path in sorted(folder.iterdir()) if path.name not in published]
    left_out = [f"{path.name}/" if path.is_dir() else path.name for path in others]
    for name, path in files.items():
        if name not in weights and _TOKEN.search(path.read_bytes()):
            raise ValueError(f"`{path}` holds what looks like a token of the Hub. Remove it, and revoke the token.")
    return files, left_out


def is_pickle(name: str) -> bool:
    """Whether a file of this name may be a pickle."""
    return any(fnmatch(name.rpartition("/")[2].lower(), pattern) for pattern in PICKLES)


def _is_published(name: str) -> bool:
    stale_index = name.endswith(".safetensors.index.json")  # that of the weights in use is named
    hidden = name.startswith(".") and not fnmatch(name, RESULTS)
    return not (stale_index or hidden or is_pickle(name))


def _weights(folder: Path) -> list[str]:
    if is_adapter(folder):
        found = [path for path in (folder / ADAPTER_WEIGHTS,) if path.is_file()]
    else:
        is_model = (folder / "config.json").is_file()
        found = weight_files(Source(folder.resolve().name, folder, None)) if is_model else []
    if found:
        for path in found:
            tensor_names(path)
        return [path.name for path in found]
    deepspeed = any(folder.glob("global_step*")) or (folder / "zero_to_fp32.py").is_file()
    if deepspeed or next(folder.rglob("*.distcp"), None) is not None:
        raise ValueError(
            f"`{folder}` holds a training state of {'DeepSpeed' if deepspeed else 'FSDP'} that is sharded over "
            "processes, and no weights of a whole model. Run "
            f"`hf-sparse-moe consolidate {folder} CONSOLIDATED`, and push that folder."
        )
    if any(is_pickle(path.name) for path in folder.iterdir()):
        raise ValueError(
            f"`{folder}` has its weights in a pickle, which may run code when it is read, and none is published. Load "
            "the model and `save_pretrained` it, which writes safetensors."
        )
    raise ValueError(
        f"`{folder}` is not a checkpoint: it needs a `config.json` with `*.safetensors`, or an adapter. Pass the "
        "folder of a saved model."
    )


def _code(folder: Path) -> set[str]:
    """The Python files that the config's `auto_map` leads to."""
    auto_map = mapping(read_json(folder / "config.json", optional=True).get("auto_map"))
    wanted = [f"{value.partition('.')[0]}.py" for value in auto_map.values() if isinstance(value, str)]
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in found and _CODE_FILE.fullmatch(name) and (folder / name).is_file():
            found.add(name)
            wanted += [f"{module}.py" for module in _CODE.findall(read_text(folder / name))]
    return found
