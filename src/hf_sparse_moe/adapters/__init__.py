"""Parameter-efficient adapters on experts, through PEFT."""

from hf_sparse_moe.quantization import dequantize_experts, quantize_experts

from .expert_lora import expert_lora_config
from .expert_lora import load_expert_lora as load_expert_lora
from .expert_selection import select_experts


__all__ = ["dequantize_experts", "expert_lora_config", "quantize_experts", "select_experts"]
