"""Which mixture an adapter was trained on: its name, and the hashes of its weight files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.hashes import sha256_of
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers

from .checkpoint import mapping


BASE_NAME = "adapter_base.json"


def read_base(folder: Path) -> Mapping[str, Any]:
    """What [`record_base`] wrote beside an adapter; empty where there is nothing."""
    return read_json(folder / BASE_NAME, optional=True)


def record_base(model: Any, folder: str | Path) -> None:
    """Write `adapter_base.json` beside an adapter of `model`; nothing for a base without experts."""
    if is_mixture(model):
        recorded = json.dumps(identify_base(model), indent=1)
        (Path(folder) / BASE_NAME).write_text(recorded + "\n", encoding="utf-8")


def identify_base(model: Any) -> dict[str, Any]:
    """
    What tells a mixture from others: the sha256 of the weight files that it was loaded from, where it was loaded from
    files that are still there.
    """
    model = without_adapter(model)
    name = model.config.name_or_path
    return {
        "name_or_path": public_name(name),
        "revision": None,
        "architecture": type(model).__name__,
        "sha256": _loaded_files(name),
    }


def base_difference(recorded: Mapping[str, Any], sha256: Mapping[str, str]) -> str | None:
    """
    How weight files with these hashes differ from those of the base that [`read_base`] returned: the first one of the
    same name with another hash, in words. None where nothing tells them apart.
    """
    there = mapping(recorded.get("sha256"))
    changed = (name for name in sorted(sha256) if there.get(name, sha256[name]) != sha256[name])
    return next((f"its `{name}` is another file (its sha256 differs)" for name in changed), None)


def file_hashes(folder: str | Path) -> dict[str, str]:
    """The sha256 of each weight file in a folder: of one in the Hub's cache its name says it, others are read once."""
    hashes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        real, status = path.resolve(), path.stat()
        is_blob = real.parent.name == "blobs" and len(real.name) == 64
        hashes[path.name] = real.name if is_blob else _sha256(real, status.st_size, status.st_mtime_ns)
    return hashes


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def _loaded_files(name: str | None) -> dict[str, str]:
    """
    The hashes of the weight files that a model was loaded from, as its config names them. It does not name a revision,
    so of a Hub id they are known only where the cache has one version of them.
    """
    if not name or Path(name).is_dir():
        return file_hashes(name) if name else {}
    repository = repo_folder_name(repo_id=name, repo_type="model")
    snapshots = Path(constants.HF_HUB_CACHE, repository, "snapshots").glob("*")
    known = [hashes for snapshot in snapshots if (hashes := file_hashes(snapshot))]
    return known[0] if known and all(hashes == known[0] for hashes in known) else {}


def without_adapter(model: Any) -> PreTrainedModel:
    """The model inside a `PeftModel`, its layers still wrapped; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_mixture(model: Any) -> bool:
    """Whether a model, alone or inside a `PeftModel`, has sparse layers."""
    try:
        return bool(find_mixture_layers(without_adapter(model)))
    except ValueError:
        return False


def public_name(name_or_path: str | None) -> str | None:
    """A Hub id as it is; of a folder its own name, for where it lies is nobody else's business."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    return path.resolve().name if path.is_absolute() or path.exists() else name_or_path
