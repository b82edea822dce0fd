"""Parameter-efficient adapters on experts, through PEFT."""

from .expert_config import load_expert_lora
from .expert_lora import expert_lora_config
from .quantize_experts import dequantize_experts, quantize_experts
from .select_experts import select_experts


__all__ = ["dequantize_experts", "expert_lora_config", "load_expert_lora", "quantize_experts", "select_experts"]
