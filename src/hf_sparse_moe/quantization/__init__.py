"""Experts in 8 or 4 bits a weight."""

from hf_sparse_moe.models.quantization import ExpertsQuantizationConfig

from .in_memory import dequantize_experts, quantize_experts
from .linears import experts_as_linears


__all__ = ["ExpertsQuantizationConfig", "dequantize_experts", "experts_as_linears", "quantize_experts"]
