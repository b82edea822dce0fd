"""Experts that are packed as they are loaded, and saved so: a quantisation method of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from importlib.util import find_spec
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantized_weight import BLOCK_SIZE, QuantizedWeight


logger = logging.get_logger(__name__)

METHOD = "bitsandbytes_experts"
SCALES = ".absmax"  # what bitsandbytes calls them, behind the name of the codes


class ExpertsQuantizationConfig(QuantizationConfigMixin):
    """
    For `from_pretrained(..., quantization_config=...)`: the experts in 8 or 4 bits a weight, packed as they are read.

    It works for this library's mixtures and for those of transformers whose experts are fused 3-D parameters. What is
    then saved is packed, and loads without this argument. Neither routers nor biases are quantised.

    Args:
        bits (`int`, defaults to 4): 8 (255 even steps) or 4 (NF4), with a float32 scale for every 64 weights: 1.06 or
            0.56 bytes a weight.
        linears (`BitsAndBytesConfig`, *optional*): How the linear layers, such as the attention, are quantised: any
            config of transformers that can quantise on loading. None leaves them as floats.
        block_size (`int`, defaults to 64): The weights that share a scale; there is no other choice.

    Raises:
        ValueError: no kernel has these `bits` or this `block_size`; an argument of another name.
    """

    def __init__(self, bits: int = 4, linears: Any = None, block_size: int = BLOCK_SIZE, **kwargs):
        if bits not in (8, 4):
            raise ValueError(f"`bits={bits!r}` must be 8 or 4.")
        if block_size != BLOCK_SIZE:
            raise ValueError(f"`block_size={block_size!r}` must be {BLOCK_SIZE}.")
        if unknown := kwargs.keys() - {"quant_method"}:
            raise ValueError(f"`ExpertsQuantizationConfig` takes `bits`, `linears` and `block_size`, not {unknown}.")
        self.quant_method: Any = METHOD
        self.bits, self.block_size = bits, block_size
        self.linears = AutoQuantizationConfig.from_dict(linears) if isinstance(linears, dict) else linears

    def to_dict(self) -> dict[str, Any]:
        linears = self.linears.to_dict() if self.linears is not None else None
        return {**vars(self), "linears": linears}


class ExpertsQuantizer(HfQuantizer):
    """Does for the experts what [`ExpertsQuantizationConfig`] says, and lets another quantizer have the linears."""

    quantization_config: ExpertsQuantizationConfig

    def __init__(self, quantization_config: ExpertsQuantizationConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        linears = quantization_config.linears
        self.linears: HfQuantizer | None = None
        if linears is not None:
            self.linears = AutoHfQuantizer.from_config(linears, pre_quantized=self.pre_quantized)

    def validate_environment(self, *args, device_map: Any = None, **kwargs) -> None:
        require_bitsandbytes()
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"`device_map` has {sorted(places)}: packed experts are not offloaded. Leave it out, or name "
                "accelerators that hold the whole model."
            )
        if self.linears is not None:
            self.linears.validate_environment(*args, device_map=device_map, **kwargs)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.linears is None else self.linears.update_dtype(dtype)

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if self.linears is None else self.linears.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return max_memory if self.linears is None else self.linears.adjust_max_memory(max_memory)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        if is_expert_weight(model, param_name):
            return self.quantization_config.bits / 8 + 4 / BLOCK_SIZE
        if self.linears is not None:
            return self.linears.param_element_size(model, param_name, param)
        return param.element_size()

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        if is_expert_weight(model, param_name):
            return not self.pre_quantized
        return self.linears is not None and self.linears.param_needs_quantization(model, param_name, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        if not any(True for _ in fused_experts(model)):
            raise ValueError(
                f"`{type(model).__name__}` has no experts that are fused 3-D parameters. Pass a mixture that has, or "
                "another `quantization_config`."
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("Packed experts do not load with a `distributed_config`. Leave one of the two out.")
        if self.pre_quantized:
            check_packed(kwargs.get("checkpoint_files") or [], self.quantization_config.bits)
        if self.linears is not None:
            self.linears._process_model_before_weight_loading(model, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        if self.linears is not None:
            weight_conversions = self.linears.update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            weights = [f"{path}.{name}" for path, experts in fused_experts(model) for name in packed_names(experts)]
            return [self._packed_one_by_one(conversion, weights) for conversion in weight_conversions]
        names = sorted({f"experts.{name}" for _, experts in fused_experts(model) for name in packed_names(experts)})
        return [*(WeightConverter([f"{n}$", f"{n}{SCALES}$"], n, [_Unpack(self)]) for n in names), *weight_conversions]

    def _packed_one_by_one(self, conversion: Any, weights: list[str]) -> Any:
        """A checkpoint with a matrix an expert, as stock mixtures are stored, is packed before it is joined."""
        joins = [
            (type(operation), getattr(operation, "dim", None)) for operation in getattr(conversion, "operations", ())
        ]
        if joins in _JOINS and any(weight.endswith(conversion.target_patterns[0]) for weight in weights):
            conversion = deepcopy(conversion)
            conversion.operations = [_PackAndJoin(self.quantization_config.bits)]
        return conversion

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> Any:
        return model if self.linears is None else self.linears._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        state: dict[str, torch.Tensor] = {}
        for key, value in model.state_dict().items():
            if isinstance(value, QuantizedWeight):
                state |= {key: value.codes, key + SCALES: value.scales}
            else:
                state[key] = value
        model._weight_conversions = []  # type: ignore[assignment]  # what is packed is saved under the model's own keys
        if self.linears is not None:  # torchao takes its tensors apart too; None where a quantizer leaves all as it is
            plain: Any = SimpleNamespace(state_dict=lambda: state)
            taken_apart, metadata = self.linears.get_state_dict_and_metadata(plain)
            return state if taken_apart is None else taken_apart, metadata
        return state, {}

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        super().remove_quantization_config(model)
        vars(model).pop("_weight_conversions", None)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # the config's, once it was saved
        for _, experts in fused_experts(model):
            for name in packed_names(experts):
                weight = getattr(experts, name)
                if isinstance(weight, QuantizedWeight):
                    floats = weight.dequantize().to(dtype or weight.dtype)
                    setattr(experts, name, nn.Parameter(floats, requires_grad=False))
        return model if self.linears is None else self.linears._dequantize(model, dtype)

    def is_serializable(self) -> bool:
        return self.linears is None or self.linears.is_serializable()

    @property
    def is_trainable(self) -> bool:
        return self.linears is None or self.linears.is_trainable


class _Pack(ConversionOps):
    def __init__(self, quantizer: ExpertsQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, model: Any = None, full_layer_name: Any = None, **kwargs):
        if self.quantizer.linears is not None and not all(is_expert_weight(model, name) for name in input_dict):
            operation = self.quantizer.linears.get_quantize_ops()
            return operation.convert(input_dict, model=model, full_layer_name=full_layer_name, **kwargs)
        packed = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            if not isinstance(weight, QuantizedWeight):
                weight = QuantizedWeight.quantize(weight, self.quantizer.quantization_config.bits)
            packed[name] = nn.Parameter(weight, requires_grad=False)
        return packed


# How transformers joins the matrices of experts, and those of gate and up, in one parameter.
_JOINS = [[(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]]


class _PackAndJoin(ConversionOps):
    def __init__(self, bits: int):
        self.bits = bits

    def convert(self, input_dict: dict[str, Any], *, source_patterns: list[str], target_patterns: list[str], **kwargs):
        parts = [input_dict.pop(pattern)[::-1] for pattern in source_patterns]
        packed = []
        while parts[0]:  # letting go of each expert's floats
            matrix = torch.cat([matrices.pop() for matrices in parts])
            packed.append(QuantizedWeight.quantize(matrix[None], self.bits))
        codes, scales = torch.cat([one.codes for one in packed]), torch.cat([one.scales for one in packed])
        return {target_patterns[0]: QuantizedWeight(codes, scales, packed[0].matrix, packed[0].dtype)}


class _Unpack(ConversionOps):
    def __init__(self, hf_quantizer: ExpertsQuantizer):
        self.hf_quantizer = hf_quantizer  # of this name, so that transformers does not cast what it is given

    def convert(self, input_dict: dict[str, Any], *, source_patterns: list[str], target_patterns: list[str], **kwargs):
        codes, scales = (input_dict[pattern][0] for pattern in source_patterns)
        like = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        if codes.shape[0] != like.shape[0] or scales.shape[-1] != -(-prod(like.shape[1:]) // BLOCK_SIZE):
            return {target_patterns[0]: codes}  # transformers tells of a shape that is another than the config's
        weight = QuantizedWeight(codes, scales, tuple(like.shape[1:]), like.dtype)
        return {target_patterns[0]: nn.Parameter(weight, requires_grad=False)}


def packed_form(key: str, weight: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """The tensors that a file holds of an expert weight `(E, out, in)`, without storage."""
    blocks = -(-prod(weight.shape[1:]) // BLOCK_SIZE)
    codes = torch.empty(len(weight), blocks * BLOCK_SIZE * bits // 8, dtype=torch.uint8, device="meta")
    return {key: codes, key + SCALES: torch.empty(len(weight), blocks, device="meta", dtype=torch.float32)}


def packed_bits(config: Any) -> int | None:
    """In how many bits the experts of a checkpoint are stored, as its config says; None for floats."""
    found = getattr(config, "quantization_config", None)
    found = found if isinstance(found, dict) else getattr(found, "__dict__", {})
    return found.get("bits") if found.get("quant_method") == METHOD else None


def fused_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that hold all experts of a layer as 3-D parameters, as transformers' experts backends know them."""
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and len(packed_names(module)) == 2:
            yield name, module


def packed_names(experts: nn.Module) -> list[str]:
    """Those of the parameters that are packed."""
    return [name for name, parameter in experts.named_parameters(recurse=False) if parameter.dim() == 3]


def is_expert_weight(model: nn.Module, name: str) -> bool:
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    return hasattr(module, "has_gate") and parameter in packed_names(module)


def tell_of_float_experts(model: PreTrainedModel, config: Any) -> None:
    """Warn where another quantisation of transformers, which knows linear layers alone, has left the experts."""
    weights = [getattr(experts, name) for _, experts in fused_experts(model) for name in packed_names(experts)]
    floats = [weight for weight in weights if type(weight.data) is torch.Tensor and weight.dtype.itemsize > 1]
    if floats:
        held = sum(weight.nbytes for weight in floats)
        share = held / sum(parameter.nbytes for parameter in model.parameters())
        logger.warning_once(
            f"`{type(config).__name__}` leaves the experts of `{type(model).__name__}` as floats: {share:.0%} of "
            f"its memory, {held / 1e6:,.1f} MB. To pack them too: `from_pretrained(..., quantization_config="
            "ExpertsQuantizationConfig(bits=4, linears=that_config))`, with `from hf_sparse_moe import "
            "ExpertsQuantizationConfig`."
        )


def require_bitsandbytes() -> None:
    if find_spec("bitsandbytes") is None:
        raise ImportError('Packed experts need bitsandbytes. Run: pip install "hf-sparse-moe[quantize]"')


def check_packed(files: list[str], bits: int) -> None:
    """Raise a `ValueError` unless files can be read, and hold `bits` for each weight and a scale for each block."""
    shapes: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"`{path}` is cut short or no safetensors file ({error}). Download it again.") from error
    for key, (*_, blocks) in ((key, shape) for key, shape in shapes.items() if key.endswith(SCALES)):
        codes = key.removesuffix(SCALES)
        if "experts." in codes and shapes.get(codes, [0])[-1] * 8 != blocks * BLOCK_SIZE * bits:
            raise ValueError(
                f"`{codes}` is stored as {shapes.get(codes)} with scales of {shapes[key]}, which are not {bits} bits "
                f"in blocks of {BLOCK_SIZE}, as config.json says. Save the model again, or download it again."
            )


# The package's own stand above those that travelled with a checkpoint, and the first of these above the others.
if METHOD not in AUTO_QUANTIZER_MAPPING or __name__.startswith("hf_sparse_moe."):
    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        mapping.pop(METHOD, None)
    register_quantization_config(METHOD)(ExpertsQuantizationConfig)
    register_quantizer(METHOD)(ExpertsQuantizer)
