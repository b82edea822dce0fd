"""Which mixture an adapter was trained on: the shapes that its config gives, and the hashes of its weight files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.hashes import sha256_of
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, find_mixture_layers, without_wrapper

from .checkpoint import mapping


if TYPE_CHECKING:
    from peft import PeftModel

BASE_NAME = "adapter_base.json"
ROUTER = "router"


def read_base(folder: Path) -> Mapping[str, Any]:
    """
    The record beside an adapter; empty where there is none. Records of version 0.1 also hold samples of the base's
    weights, which are not compared any more.

    Raises:
        ValueError: a file that [`record_base`] did not write.
    """
    recorded = read_json(folder / BASE_NAME, optional=True)
    try:
        for tensors in recorded["layers"].values() if recorded else ():
            for described in tensors.values():
                experts, *_ = described["shape"]
                if not all(isinstance(size, int) for size in described["shape"]) or experts < 1:
                    raise ValueError(f"`shape` is {described['shape']}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`{folder / BASE_NAME}` is not what this package writes ({type(error).__name__}). Delete that file, or "
            "save the adapter again."
        ) from error
    return recorded


def record_base(model: Any, folder: str | Path, **fields: Any) -> None:
    """
    Write `adapter_base.json` beside an adapter of `model`; nothing for a base without experts. `fields` are what is
    known better than the model says it: `name_or_path`, `revision`, `sha256`.
    """
    if is_mixture(model):
        recorded = json.dumps(identify_base(model) | fields, indent=1)
        (Path(folder) / BASE_NAME).write_text(recorded + "\n", encoding="utf-8")


def identify_base(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """
    What tells a mixture from others: of each sparse layer the shapes of its router and experts, and the sha256 of the
    weight files that it was loaded from, where it was loaded from files that are still there.
    """
    model = without_adapter(model)
    return {
        "name_or_path": public_name(model.config.name_or_path),
        "revision": None,
        "architecture": type(model).__name__,
        "sha256": _loaded_files(model.config.name_or_path),
        "layers": {
            layer.name: {part: {"shape": list(tensor.shape)} for part, tensor in _tensors(layer)}
            for layer in _layers(model)
        },
    }


def base_difference(recorded: Mapping[str, Any], model: PreTrainedModel) -> str | None:
    """
    How `model` differs from the base that [`read_base`] returned, in words; None where nothing tells them apart. A
    base that was changed in memory, or whose files have other names, is compared by the shapes of its layers alone.
    """
    found, wanted = identify_base(model), mapping(recorded.get("layers"))
    if wanted and not found["layers"]:
        return "it has no sparse layer"
    if wanted and found["layers"].keys() != wanted.keys():
        return f"it has {len(found['layers'])} sparse layers, and that base {len(wanted)} or others"
    for name, tensors in found["layers"].items():
        for tensor in sorted(tensors.keys() & mapping(wanted.get(name)).keys()):
            shape, own = wanted[name][tensor]["shape"], tensors[tensor]["shape"]
            if shape[0] != own[0]:
                return f"`{name}` has {own[0]} experts, and had {shape[0]} there"
            if shape != own:
                return f"`{tensor}` of `{name}` has the shape {tuple(own)}, and had {tuple(shape)} there"
    return files_difference(recorded, found["sha256"])


def files_difference(recorded: Mapping[str, Any], sha256: Mapping[str, str]) -> str | None:
    """The first weight file of the same name with another hash, in words."""
    there = mapping(recorded.get("sha256"))
    changed = [name for name in sorted(there.keys() & sha256.keys()) if there[name] != sha256[name]]
    changed = [name for name in changed if name.endswith(".safetensors")]
    return f"its `{changed[0]}` is another file (its sha256 differs)" if changed else None


def file_hashes(folder: str | Path) -> dict[str, str]:
    """The sha256 of each weight file in a folder: of one in the Hub's cache its name says it, others are read once."""
    hashes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.is_file():
            real, status = path.resolve(), path.stat()
            is_blob = real.parent.name == "blobs" and len(real.name) == 64
            hashes[path.name] = real.name if is_blob else _sha256(real, status.st_size, status.st_mtime_ns)
    return hashes


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def _loaded_files(name_or_path: str | None) -> dict[str, str]:
    """
    The hashes of the weight files that a model was loaded from, as its config names them. It does not name a revision,
    so of a Hub id they are known only where the cache has one version of them.
    """
    if not name_or_path:
        return {}
    if Path(name_or_path).is_dir():
        return file_hashes(name_or_path)
    repository = repo_folder_name(repo_id=name_or_path, repo_type="model")
    snapshots = Path(constants.HF_HUB_CACHE, repository, "snapshots").glob("*")
    versions = [hashes for snapshot in snapshots if (hashes := file_hashes(snapshot))]
    return versions[0] if versions and all(hashes == versions[0] for hashes in versions) else {}


def without_adapter(model: Any) -> PreTrainedModel:
    """The model inside a `PeftModel`, its layers still wrapped; another model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_mixture(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model, alone or inside a `PeftModel`, has sparse layers."""
    return bool(_layers(model))


def public_name(name_or_path: str | None) -> str | None:
    """A Hub id as it is; of a folder its own name, for where it lies is nobody else's business."""
    if not name_or_path:
        return None
    path = Path(name_or_path)
    return path.resolve().name if path.is_absolute() or path.exists() else name_or_path


def base_experts(base: Mapping[str, Any]) -> dict[str, int]:
    """The number of experts of each sparse layer that is recorded, by the layer's name."""
    layers = mapping(base.get("layers"))
    return {name: next(iter(tensors.values()))["shape"][0] for name, tensors in layers.items() if tensors}


def _layers(model: PreTrainedModel | PeftModel) -> list[MixtureLayer]:
    try:
        return find_mixture_layers(without_adapter(model))
    except ValueError:
        return []


def _tensors(layer: MixtureLayer) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with one entry an expert, the router's weight and those of the experts; none that is quantised."""
    router = without_wrapper(layer.router)
    weights = getattr(router, "original_module", router).parameters()  # PEFT trains a copy beside the original
    for weight in weights:
        if weight.dim() == 2 and len(weight) == layer.num_experts:
            yield ROUTER, weight
            break
    for name, weight in without_wrapper(layer.experts).named_parameters(recurse=False):
        if weight.dim() == 3 and type(weight.data) is torch.Tensor and weight.is_floating_point():
            yield name, weight
