"""What the files of a PEFT adapter say, and which mixture it was trained on, by name and by hashes of weight files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedModel

from hf_sparse_moe.adapters.expert_lora import FILE as SETTINGS_NAME
from hf_sparse_moe.checkpoints.files import read_json, tensor_names
from hf_sparse_moe.checkpoints.hashes import sha256_of
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers

from .checkpoint import RECORD_NAME, mapping


ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter's files but for the weights. They may come from someone else's repository, and be anything."""

    folder: Path
    config: Mapping[str, Any]  # adapter_config.json
    settings: Mapping[str, Any]  # expert_lora.json, which PEFT does not read
    base: Mapping[str, Any]  # adapter_base.json, see `record_base`
    record: Mapping[str, Any]  # training_record.json, which `ModelCardCallback` writes

    @property
    def base_name(self) -> str | None:
        """The Hub id of its base, or what PEFT names: a base that is recorded without a revision was a folder."""
        recorded = self.base.get("name_or_path") if self.base.get("revision") else None
        name = recorded or self.config.get("base_model_name_or_path")
        return name if name and isinstance(name, str) else None

    @property
    def base_revision(self) -> str | None:
        """The commit of that base, where it is known."""
        revision = self.base.get("revision") or self.config.get("revision")
        return revision if isinstance(revision, str) else None


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    folder = Path(folder)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter(folder: str | Path, name: str | None = None) -> Adapter:
    """The adapter in a folder, or of a `name`. Raises a `ValueError` for none, or damaged files."""
    folder = Path(folder)
    if not is_adapter(folder):
        raise _no_adapter(name or folder)
    beside = (read_json(folder / file, optional=True) for file in (SETTINGS_NAME, BASE_NAME, RECORD_NAME))
    return Adapter(folder, read_json(folder / ADAPTER_CONFIG), *beside)


def check_weights(adapter: Adapter) -> None:
    """Raise a `ValueError` unless the adapter's weights are there, whole and in safetensors."""
    if not (adapter.folder / ADAPTER_WEIGHTS).is_file():
        raise _no_adapter(adapter.folder)
    tensor_names(adapter.folder / ADAPTER_WEIGHTS)


def _no_adapter(name: object) -> ValueError:
    return ValueError(
        f"`{name}` is not an adapter: it needs `{ADAPTER_CONFIG}` and `{ADAPTER_WEIGHTS}`. Pass what "
        "`save_pretrained` of a PeftModel wrote."
    )


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
    How weight files with these hashes differ from those of the base that an adapter recorded: the first one of the
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
