"""The experts modules of a mixture: two fused 3-D parameters each, as transformers' experts backends know them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

PROJECTIONS = ("gate", "up", "down")


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """
    The experts of all layers, below adapters too, by name.

    Raises:
        ValueError: there are none, or not all are fused 3-D parameters.
    """
    named: list[tuple[str, Any]] = [one for one in model.named_modules() if one[0].rpartition(".")[2] == "experts"]
    found = {name: below_adapters(module) for name, module in named}
    if not found:
        raise ValueError(f"`{type(model).__name__}` has no experts. Pass a mixture, such as what `upcycle` returns.")
    missed = [name for name, module in found.items() if not follows_interface(module)]
    if missed:
        raise ValueError(
            f"{len(missed)} of {len(found)} experts modules of `{type(model).__name__}` do not hold two "
            f"fused 3-D parameters (first: `{missed[0]}`), so only a part would be reached. Pass a model with fused "
            "experts that are not quantised by other means than `quantize_experts`."
        )
    return found


def follows_interface(module: nn.Module) -> bool:
    """Whether a module has the shape that transformers' experts backends know."""
    names = {name for name, parameter in module.named_parameters(recurse=False) if len(shape_of(parameter)) == 3}
    return hasattr(module, "has_gate") and names == {first_projection(module), "down_proj"}


def tell_of_experts_left_out(peft_config: Any, model: nn.Module) -> None:
    """What PEFT calls "all-linear" are the modules of a linear class, which fused experts are not."""
    found: list[Any] = [module for module in model.modules() if follows_interface(module)]
    if found and not getattr(peft_config, "target_parameters", None):
        number = sum(int(shape_of(module.down_proj)[0]) for module in found)
        logger.warning_once(
            f'`target_modules="all-linear"` leaves out the {number} experts in the {len(found)} sparse layers of '
            f"`{type(model).__name__}`, which are no linear modules. To adapt them with the attention: "
            "`get_peft_model(model, expert_lora_config(model, attention=True))`."
        )


def below_adapters(module: Any) -> Any:
    """What PEFT has wrapped; another module as it is."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def first_projection(experts: Any) -> str:
    """The name of the parameter before the activation."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Of all of it, which ZeRO-3 hides; what torch shares out (`DTensor`) tells it itself."""
    return getattr(parameter, "ds_shape", parameter.shape)
