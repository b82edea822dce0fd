"""The experts of a model in memory, packed and unpacked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from hf_sparse_moe.models.quantization import (
    ExpertsQuantizationConfig,
    ExpertsQuantizer,
    fused_experts,
    packed_names,
    require_bitsandbytes,
)
from hf_sparse_moe.models.quantized_weight import QuantizedWeight


def quantize_experts(model: PreTrainedModel, bits: int = 4) -> PreTrainedModel:
    """
    Keep the experts of `model` in 8 or 4 bits a weight from now on, frozen; everything else stays as it is.

    Works on every model whose experts are fused 3-D parameters of a module called `experts`, which the quantising
    loaders of transformers pass over in silence: this library's, and transformers' own mixtures. Experts are read as
    floats while a product needs them: one expert at a time with `experts_implementation="sparse_moe"` on a CPU, all
    experts of one projection at a time elsewhere. Neither adapters nor biases nor routers are quantised.

    Args:
        model (`PreTrainedModel`): The mixture, loaded as floats; changed in place.
        bits (`int`, defaults to 4): 8 (255 even steps) or 4 (NF4), with a float32 scale for every 64 weights: 1.06 or
            0.56 bytes a weight.

    Returns:
        `PreTrainedModel`: The same model.

    Raises:
        ImportError: bitsandbytes is not installed.
        RuntimeError: bitsandbytes has no kernel for the model's device.
        ValueError: another `bits`; no experts; or experts that are not whole floats in memory.

    Example:
        ```python
        model = quantize_experts(model, bits=4)
        model = get_peft_model(model, expert_lora_config(model, r=16))
        ```
    """
    others = getattr(model, "hf_quantizer", None)  # of the linears, if they are quantised
    config = ExpertsQuantizationConfig(bits, linears=others.quantization_config if others else None)
    require_bitsandbytes()
    weights = check_plain_floats(model)
    while weights:  # holding on to none of the floats
        experts, name, weight = weights.pop()
        setattr(experts, name, nn.Parameter(QuantizedWeight.quantize(weight, bits), requires_grad=False))
    _set_quantizer(model, ExpertsQuantizer(config, pre_quantized=False))  # which saves the model packed
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
    for base in model.modules():  # PEFT's model has it inside
        quantizer = vars(base).get("hf_quantizer")
        if isinstance(base, PreTrainedModel) and isinstance(quantizer, ExpertsQuantizer):
            quantizer.remove_quantization_config(base)
            if quantizer.linears is not None:
                _set_quantizer(base, quantizer.linears)
    return model


def check_plain_floats(model: nn.Module) -> list[tuple[Any, str, torch.Tensor]]:
    """Each 3-D weight with its module and name; raises a `ValueError` unless there are some, all floats in memory."""
    weights = [
        (experts, name, getattr(experts, name))
        for _, experts in fused_experts(model)
        for name in packed_names(experts)
    ]
    if not weights:
        raise ValueError(
            f"`{type(model).__name__}` has no experts that are fused 3-D parameters. Pass a mixture, such as what "
            "`upcycle` returns."
        )
    for experts, name, weight in weights:
        if type(weight.data) is not torch.Tensor or weight.is_meta or not weight.is_floating_point():
            kind = "quantised" if isinstance(weight, QuantizedWeight) else f"{weight.dtype} on {weight.device}"
            raise ValueError(
                f"`{type(experts).__name__}.{name}` is not a plain float tensor in memory ({kind}). Load the model "
                "unquantised, without offloading or a `distributed_config`, and quantise it once."
            )
    return weights


def _set_quantizer(model: Any, quantizer: HfQuantizer) -> None:
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
