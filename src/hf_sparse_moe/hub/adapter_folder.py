"""What a folder with a PEFT adapter says about itself, without PEFT and without its base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_sparse_moe.adapters.expert_lora import FILE as SETTINGS_NAME
from hf_sparse_moe.checkpoints.files import read_json, tensor_names

from .adapter_base import base_experts, read_base
from .checkpoint import RECORD_NAME, mapping


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+?)((?:\.base_layer)*)\.lora_(A|B)\.weight")
_ALL = ("gate", "up", "down")


@dataclass(frozen=True)
class AdaptedExperts:
    """The adapter of one sparse layer."""

    name: str  # of the experts module
    experts: list[int] | None  # those that are adapted; None is all of them
    num_experts: int  # of the layer
    projections: list[str]  # of "gate", "up" and "down"
    rank: int  # of each expert
    trainable: int  # numbers that training moves; the file holds zeros for the rest
    moved: list[int]  # the experts that it changes: their B is not zero


@dataclass(frozen=True)
class Adapter:
    """An adapter's files. They may come from someone else's repository, and be anything."""

    config: Mapping[str, Any]  # adapter_config.json
    settings: Mapping[str, Any]  # expert_lora.json, which PEFT does not read
    base: Mapping[str, Any]  # adapter_base.json, see `record_base`
    record: Mapping[str, Any]  # training_record.json, which `ModelCardCallback` writes
    experts: list[AdaptedExperts] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)  # numbers in each other module that it adapts
    dtype: str = ""

    @property
    def trainable(self) -> int:
        """All numbers that training moves."""
        return sum(layer.trainable for layer in self.experts) + sum(self.others.values())


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
    """Read an adapter. Raises a `ValueError` for no adapter, or damaged files."""
    folder = Path(folder)
    check_adapter(folder, str(folder))
    config, settings = read_json(folder / ADAPTER_CONFIG), read_json(folder / SETTINGS_NAME, optional=True)
    base, tensors = read_base(folder), load_file(folder / ADAPTER_WEIGHTS)
    factors: dict[str, dict[str, dict[str, torch.Tensor]]] = {}  # of each module: nesting, then A and B
    others: dict[str, int] = {}
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key)
        if found and found[1].rpartition(".")[2] == "experts":
            factors.setdefault(found[1], {}).setdefault(found[2], {})[found[3]] = tensor
        else:
            module = key.removeprefix("base_model.model.").partition(".lora_")[0].removesuffix(".weight")
            others[module] = others.get(module, 0) + tensor.numel()
    if not base and factors and config.get("rank_pattern"):
        raise ValueError(
            f"`{folder}` has ranks that differ from layer to layer and no adapter_base.json, so its experts cannot be "
            "counted. Push it, which writes that file."
        )
    try:
        experts = list(_adapted(factors, config, settings, base_experts(base)))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(
            f"`{folder}` does not fit together: its tensors are not what its {ADAPTER_CONFIG} describes "
            f"({type(error).__name__}). Save or fetch it again."
        ) from error
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return Adapter(
        config, settings, base, read_json(folder / RECORD_NAME, optional=True), experts, others, ", ".join(dtypes)
    )


def _adapted(
    factors: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]],
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    base: Mapping[str, int],
) -> Iterator[AdaptedExperts]:
    chosen = mapping(settings.get("experts"))
    for name, nested in factors.items():
        some = next(iter(nested.values()))["A"]
        num_experts = base.get(name.rpartition(".")[0]) or some.shape[0] // int(config["r"])
        rank = some.shape[0] // num_experts
        if rank * num_experts != some.shape[0] or not (config.get("rank_pattern") or rank == config["r"]):
            raise ValueError(f"{some.shape[0]} rows are not those of {num_experts} experts")
        moved = torch.zeros(num_experts, dtype=torch.bool)
        for pair in nested.values():
            moved |= pair["B"].unflatten(1, (-1, num_experts)).ne(0).any(0).any(0)
        experts, projections = chosen.get(name), _projections(name, config, settings)
        trainable = 0
        for nesting, pair in nested.items():
            is_up = nesting != "" if len(nested) > 1 else "down" not in projections
            half = is_up and "gate_up_proj" in _targets(name, config) and len({"gate", "up"} & set(projections)) == 1
            trainable += pair["A"].numel() + pair["B"].numel() // (2 if half else 1)
        if experts:
            trainable = trainable * len(experts) // num_experts
        changed = moved.nonzero().flatten().tolist()
        yield AdaptedExperts(name, experts, num_experts, projections, rank, trainable, changed)


def _targets(name: str, config: Mapping[str, Any]) -> set[str]:
    """The parameters of an experts module that the config names, by a suffix or in full."""
    targets = [target.rpartition(".") for target in config.get("target_parameters") or ()]
    return {parameter for module, _, parameter in targets if f".{name}".endswith(f".{module}")}


def _projections(name: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    parameters, wanted = _targets(name, config), settings.get("projections") or _ALL
    reached = {"gate", "up"} if "gate_up_proj" in parameters else {"up"} & {name[:2] for name in parameters}
    reached |= {"down"} if "down_proj" in parameters else set()
    return [projection for projection in _ALL if projection in reached and projection in wanted]
