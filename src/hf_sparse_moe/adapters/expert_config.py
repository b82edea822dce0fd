"""A `peft.LoraConfig` whose layers on experts are this package's, and whose file plain PEFT reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.files import read_json

from .expert_layer import make_layer


if TYPE_CHECKING:
    from peft import PeftModel

FILE = "expert_lora.json"  # what PEFT's own file has no place for, or refuses on experts
_DOWNLOAD = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")


@cache
def config_class() -> type[Any]:
    """`ExpertLoraConfig`; made on first use, since PEFT is an extra."""
    from peft import LoraConfig

    @dataclass
    class ExpertLoraConfig(LoraConfig):
        """
        Args:
            experts (`dict[str, list[int]]`, *optional*): The adapted experts of each experts module, by its name.
            projections (`list[str]`, *optional*): Which of "gate", "up" and "down" are adapted.
        """

        experts: dict[str, list[int]] | None = None
        projections: list[str] | None = None

        def __post_init__(self):
            super().__post_init__()
            self._register_custom_module({nn.Module: cast(type[nn.Module], make_layer)})  # PEFT only calls it

        def to_dict(self) -> dict[str, Any]:
            """What plain PEFT reads: dropout acts in training only, and PEFT refuses to load it on experts."""
            settings = super().to_dict()
            for name in ("experts", "projections"):
                settings.pop(name)
            settings["lora_dropout"] = 0.0
            return settings

        def save_pretrained(self, save_directory: str, **kwargs) -> None:
            super().save_pretrained(save_directory, **kwargs)
            own = {name: getattr(self, name) for name in ("lora_dropout", "experts", "projections")}
            path = Path(save_directory, FILE)
            path.unlink(missing_ok=True)
            if any(own.values()):
                path.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
            name = str(pretrained_model_name_or_path)
            base = LoraConfig.from_pretrained(name, subfolder=subfolder, **kwargs)
            settings = {field.name: getattr(base, field.name) for field in fields(base) if field.init}
            return cls(**{**settings, **_own_settings(name, subfolder, **kwargs)})

    # `pickle` and `copy` look a class up by these.
    ExpertLoraConfig.__qualname__ = "ExpertLoraConfig"
    return ExpertLoraConfig


def _own_settings(name: str, subfolder: str | None, **download) -> dict[str, Any]:
    folder = Path(name, subfolder or "")
    if folder.is_dir():
        return read_json(folder / FILE, optional=True)
    try:
        return read_json(Path(hf_hub_download(name, FILE, subfolder=subfolder, **download)))
    except EntryNotFoundError:
        return {}


def load_expert_lora(
    model: PreTrainedModel, adapter: str, adapter_name: str = "default", is_trainable: bool = False, **kwargs
) -> PeftModel:
    """
    `PeftModel.from_pretrained` for an adapter of experts, saved here or by plain PEFT, with this package's layers.

    `PeftModel.from_pretrained` itself loads such an adapter too, with PEFT's layers: the same function, slower.

    Args:
        model (`PreTrainedModel`): The mixture that it was trained for.
        adapter (`str`): A folder, or an id on the Hub.
        adapter_name (`str`, defaults to `"default"`): Its name in the model.
        is_trainable (`bool`, defaults to `False`): Whether to go on training it.
        **kwargs: Further arguments of `PeftModel.from_pretrained`.

    Raises:
        ValueError, RuntimeError: it does not fit the model.

    Example:
        ```python
        model = load_expert_lora(model, "adapter")
        ```
    """
    from peft import PeftModel

    where = {name: kwargs[name] for name in _DOWNLOAD if name in kwargs}
    config = config_class().from_pretrained(adapter, **where)
    return PeftModel.from_pretrained(
        model, adapter, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **kwargs
    )


def __getattr__(name: str) -> type:
    if name == "ExpertLoraConfig":
        return config_class()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
