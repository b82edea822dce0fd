"""Parameter-efficient adapters on experts, through PEFT."""

from .expert_config import load_expert_lora
from .expert_lora import expert_lora_config
from .expert_quantization import dequantize_experts, quantize_experts
from .expert_selection import select_experts


__all__ = ["dequantize_experts", "expert_lora_config", "load_expert_lora", "quantize_experts", "select_experts"]
