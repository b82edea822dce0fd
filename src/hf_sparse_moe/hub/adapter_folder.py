"""What a folder with a PEFT adapter says about itself, without PEFT and without its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sparse_moe.adapters.expert_lora import FILE as SETTINGS_NAME
from hf_sparse_moe.checkpoints.files import read_json, tensor_names

from .adapter_base import read_base
from .checkpoint import RECORD_NAME


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter's files. They may come from someone else's repository, and be anything."""

    config: Mapping[str, Any]  # adapter_config.json
    settings: Mapping[str, Any]  # expert_lora.json, which PEFT does not read
    base: Mapping[str, Any]  # adapter_base.json, see `record_base`
    record: Mapping[str, Any]  # training_record.json, which `ModelCardCallback` writes


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    folder = Path(folder)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def check_adapter(folder: Path, name: str) -> None:
    """Raise a `ValueError` where a folder holds no adapter in safetensors, or a damaged one."""
    if not is_adapter(folder) or not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"`{name}` is not an adapter: it needs `{ADAPTER_CONFIG}` and `{ADAPTER_WEIGHTS}`. Pass what "
            "`save_pretrained` of a PeftModel wrote."
        )
    tensor_names(folder / ADAPTER_WEIGHTS)


def read_adapter(folder: str | Path) -> Adapter:
    """Read all but the weights. Raises a `ValueError` for no adapter, or damaged files."""
    folder = Path(folder)
    check_adapter(folder, str(folder))
    return Adapter(
        config=read_json(folder / ADAPTER_CONFIG),
        settings=read_json(folder / SETTINGS_NAME, optional=True),
        base=read_base(folder),
        record=read_json(folder / RECORD_NAME, optional=True),
    )
