"""Which mixture an adapter was trained on: the shapes of its experts, and the hashes of its weight files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedModel

from hf_sparse_moe.adapters.expert_modules import shape_of
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.hashes import sha256_of
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers, without_wrapper

from .checkpoint import mapping


BASE_NAME = "adapter_base.json"


def read_base(folder: Path) -> Mapping[str, Any]:
    """
    The record beside an adapter; empty where there is none. Those of version 0.1 also hold routers and samples of
    weights, which are not compared any more. Raises a `ValueError` for a file that [`record_base`] did not write.
    """
    recorded = read_json(folder / BASE_NAME, optional=True)
    try:
        tensors = [tensor for layer in recorded.get("layers", {}).values() for tensor in layer.values()]
        is_ours = all(isinstance(size, int) and size > 0 for tensor in tensors for size in tensor["shape"])
    except (AttributeError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"`{folder / BASE_NAME}` is not what this package writes. Delete that file, or save the adapter again."
        )
    return recorded


def base_experts(recorded: Mapping[str, Any]) -> dict[str, int]:
    """The number of experts of each sparse layer of the base, by the layer's name."""
    layers = recorded.get("layers", {})
    return {name: next(iter(tensors.values()))["shape"][0] for name, tensors in layers.items() if tensors}


def record_base(model: Any, folder: str | Path, **fields: Any) -> None:
    """
    Write `adapter_base.json` beside an adapter of `model`; nothing for a base without experts. `fields` are what is
    known better than the model says it: `name_or_path`, `revision`, `sha256`.
    """
    if is_mixture(model):
        recorded = json.dumps(identify_base(model) | fields, indent=1)
        (Path(folder) / BASE_NAME).write_text(recorded + "\n", encoding="utf-8")


def identify_base(model: Any) -> dict[str, Any]:
    """
    What tells a mixture from others: the shapes of the experts of each sparse layer, and the sha256 of the weight
    files that it was loaded from, where it was loaded from files that are still there.
    """
    model = without_adapter(model)
    return {
        "name_or_path": public_name(model.config.name_or_path),
        "revision": None,
        "architecture": type(model).__name__,
        "sha256": _loaded_files(model.config.name_or_path),
        "layers": _layers(model),
    }


def base_difference(recorded: Mapping[str, Any], model: PreTrainedModel) -> str | None:
    """
    How `model` differs from the base that [`read_base`] returned, in words; None where nothing tells them apart. A
    base that was changed in memory, or whose files have other names, is compared by the shapes of its experts alone.
    """
    found = identify_base(model)
    layers, wanted = found["layers"], mapping(recorded.get("layers"))
    if wanted and layers.keys() != wanted.keys():
        return f"it has {len(layers)} sparse layers, and that base {len(wanted)} or others"
    for name, tensors in layers.items():
        for tensor, described in tensors.items():
            shape = mapping(wanted.get(name)).get(tensor, described)["shape"]
            if shape != described["shape"]:
                return f"`{tensor}` of `{name}` has the shape {described['shape']}, and had {shape} there"
    return files_difference(recorded, found["sha256"])


def files_difference(recorded: Mapping[str, Any], sha256: Mapping[str, str]) -> str | None:
    """The first weight file of the same name with another hash, in words."""
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
    return bool(_layers(without_adapter(model)))


def public_name(name_or_path: str | None) -> str | None:
    """A Hub id as it is; of a folder its own name, for where it lies is nobody else's business."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    return path.resolve().name if path.is_absolute() or path.exists() else name_or_path


def _layers(model: PreTrainedModel) -> dict[str, dict[str, dict[str, list[int]]]]:
    """The shapes of the experts' matrices, by layer and parameter."""
    try:
        layers = find_mixture_layers(model)
    except ValueError:
        return {}
    shapes = {}
    for layer in layers:
        parameters = without_wrapper(layer.experts).named_parameters(recurse=False)
        found = {name: list(shape_of(parameter)) for name, parameter in parameters}
        shapes[layer.name] = {name: {"shape": shape} for name, shape in found.items() if len(shape) == 3}
    return shapes
