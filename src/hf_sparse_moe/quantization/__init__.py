"""Experts in 8 or 4 bits a weight."""

from hf_sparse_moe.models.quantization import ExpertsQuantizationConfig

from .in_memory import dequantize_experts, quantize_experts


__all__ = ["ExpertsQuantizationConfig", "dequantize_experts", "quantize_experts"]
