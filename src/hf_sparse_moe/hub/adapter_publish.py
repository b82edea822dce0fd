"""Publishing an adapter: compared with its base first, so that what arrives can be compared with it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.checkpoints.source import find_source

from .adapter_files import ADAPTER_CONFIG, BASE_NAME, Adapter, file_hashes, public_name, read_adapter, record_base
from .adapter_loading import attach, refuse_other_base
from .download import read_head
from .errors import check_repo_id, raise_hub_error
from .fingerprint import FINGERPRINT_NAME, is_wanted, take_fingerprint, write_fingerprint


if TYPE_CHECKING:
    from peft import PeftModel


def save_adapter(model: PeftModel, folder: Path, adapter_name: str = "default") -> Path:
    """Save one adapter of a model with the record of its base, in `folder` or below; returns where."""
    if adapter_name not in model.peft_config:
        raise ValueError(f"`adapter_name={adapter_name!r}` must be one of {', '.join(model.peft_config)}.")
    model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    folder = folder if adapter_name == "default" else folder / adapter_name
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's stock card
    record_base(model, folder)
    return folder


def stage_adapter(
    files: Mapping[str, Path],
    staged: Path,
    base: str | Path | None,
    token: bool | str | None,
    fingerprint: bool | None = None,
) -> None:
    """
    Copy an adapter's files into `staged` as they are published: the base by its public name and revision, with what
    tells it from others, and the fingerprint of both together. Raises a `ValueError` for no base, another one than the
    adapter was trained on, or an adapter that does not fit it.
    """
    if ADAPTER_CONFIG not in files:
        raise ValueError(f"The {ADAPTER_CONFIG} of the adapter is a link that leads out of its folder. Copy the file.")
    for name, path in files.items():
        (staged / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, staged / name)
    adapter = read_adapter(files[ADAPTER_CONFIG].parent)
    name, revision = named_base(adapter, base)
    found, weight_bytes = _found_base(name, revision, token)
    public = found["name_or_path"]
    refuse_other_base(adapter.base, found["sha256"], adapter.folder.name, f"`{public}`")
    config = {**adapter.config, "base_model_name_or_path": public, "revision": found["revision"]}
    (staged / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (staged / FINGERPRINT_NAME).unlink(missing_ok=True)
    if is_wanted(fingerprint, weight_bytes):
        model = load_whole(find_source(name, found["revision"], token=token).folder, torch.float32)
        found["architecture"] = type(model).__name__
        adapted = attach(model, read_adapter(staged))
        write_fingerprint(take_fingerprint(adapted, staged), staged / FINGERPRINT_NAME, adapter.folder)
    (staged / BASE_NAME).write_text(json.dumps({**adapter.base, **found}, indent=1) + "\n", encoding="utf-8")


def _found_base(name: str, revision: str | None, token: bool | str | None) -> tuple[dict[str, Any], int]:
    """The public name, revision and hashes of a base, which is not fetched for them, and the bytes of its weights."""
    if Path(name).is_dir():
        hashes = file_hashes(name)
        found = {"name_or_path": public_name(str(Path(name).resolve())), "revision": None, "sha256": hashes}
        return found, sum((Path(name) / file).stat().st_size for file in hashes)
    check_repo_id(name)
    with raise_hub_error(name, revision):
        head = read_head(name, revision, token)
    weights = [file for file in head.siblings or () if file.lfs and file.rfilename.endswith(".safetensors")]
    hashes = {file.rfilename: file.lfs.sha256 for file in weights if file.lfs}
    return {"name_or_path": name, "revision": head.sha, "sha256": hashes}, sum(file.size or 0 for file in weights)


def named_base(adapter: Adapter, base: str | Path | None, *, from_hub: bool = False) -> tuple[str, str | None]:
    """
    Folder or Hub id, and the revision, of an adapter's base: `base`, or what the adapter names. One that came
    `from_hub`, so that somebody else wrote its files, may not name a folder here.
    """
    named, revision = adapter.base_name, adapter.base_revision
    if base is not None:
        return str(base), revision if str(base) == named else None
    if named is None:
        raise ValueError(
            f"`{adapter.folder.name}` does not name its base. Give it: `base=` (`--base`), a folder or a Hub id."
        )
    if from_hub and Path(named).exists():
        raise ValueError(
            f"The adapter names `{named}` as its base, a folder here and not a Hub id. Give the base: `base=` "
            "(`--base`)."
        )
    return named, revision
