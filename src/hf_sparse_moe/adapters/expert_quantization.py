"""Experts in 8 or 4 bits a weight, frozen, under adapters that train (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .expert_lora import expert_modules
from .quantized_weight import QuantizedWeight


def quantize_experts(model: PreTrainedModel, bits: Literal[8, 4] = 4) -> PreTrainedModel:
    """
    Keep the experts of `model` in 8 or 4 bits a weight from now on, frozen; everything else stays as it is.

    Works on every model whose experts are fused 3-D parameters of a module called `experts`, which the quantising
    loaders of transformers pass over in silence: this library's, and transformers' own mixtures. Experts are read as
    floats while a product needs them: one expert at a time with `experts_implementation="auto"` on a CPU, all experts
    of one projection at a time elsewhere. Neither adapters nor biases nor routers are quantised.

    Args:
        model (`PreTrainedModel`): The mixture, loaded as floats and not yet wrapped by PEFT; changed in place.
        bits (`int`, defaults to 4): 8 (255 even steps) or 4 (NF4), with a float32 scale for every 64 weights: 1.06 or
            0.56 bytes a weight.

    Returns:
        `PreTrainedModel`: The same model.

    Raises:
        ImportError: bitsandbytes is not installed.
        RuntimeError: bitsandbytes has no kernel for the model's device.
        ValueError: another `bits`; no experts; or experts that are quantised already, sharded, or not in memory.

    Example:
        ```python
        model = quantize_experts(model, bits=4)
        model = get_peft_model(model, expert_lora_config(model, r=16))
        ```
    """
    if bits not in (8, 4):
        raise ValueError(f"`bits={bits!r}` must be 8 or 4.")
    if find_spec("bitsandbytes") is None:
        raise ImportError('`quantize_experts` needs bitsandbytes. Run: pip install "hf-sparse-moe[quantize]"')
    weights = [
        (experts, name, parameter)
        for experts in expert_modules(model).values()
        for name, parameter in experts.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
    for experts, name, weight in weights:
        _refuse_unsupported(f"{type(experts).__name__}.{name}", weight)
    for device in {weight.device for _, _, weight in weights}:
        _try_kernels(device, bits)
    while weights:  # holding on to none of the floats
        experts, name, weight = weights.pop()
        setattr(experts, name, nn.Parameter(QuantizedWeight.quantize(weight, bits), requires_grad=False))
    return model


def dequantize_experts(model: nn.Module) -> nn.Module:
    """
    Undo [`quantize_experts`], but for what rounding took: the experts are floats again, and stay frozen.

    Args:
        model (`nn.Module`): What [`quantize_experts`] returned, or PEFT's model around it; changed in place.

    Returns:
        `nn.Module`: The same model.

    Raises:
        ValueError: its experts are not quantised.
    """
    weights = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, QuantizedWeight)
    ]
    if not weights:
        raise ValueError(f"`{type(model).__name__}` has no experts that `quantize_experts` has quantised.")
    for module, name in weights:
        setattr(module, name, nn.Parameter(getattr(module, name).dequantize(), requires_grad=False))
    return model


def _refuse_unsupported(name: str, weight: torch.Tensor) -> None:
    if isinstance(weight, QuantizedWeight):
        raise ValueError(f"`{name}` is quantised already. Quantise a model once.")
    if isinstance(weight, DTensor):
        raise ValueError(f"`{name}` is sharded over ranks. Load the model without a `distributed_config`.")
    if weight.is_meta:
        raise ValueError(f"`{name}` is not in memory (device `meta`). Load the model without offloading it.")
    if not weight.is_floating_point() or type(weight.data) is not torch.Tensor:
        raise ValueError(f"`{name}` is quantised by other means ({weight.dtype}). Load the model unquantised.")


def _try_kernels(device: torch.device, bits: int) -> None:
    try:
        QuantizedWeight.quantize(torch.ones(1, 1, 64, device=device), bits).dequantize()
    except RuntimeError as error:
        raise RuntimeError(
            f"bitsandbytes has no {bits}-bit kernel for `{device.type}` tensors here. Move the model to another "
            "device, or install a bitsandbytes that knows this one: `python -m bitsandbytes` says what is missing."
        ) from error
