"""Parameter-efficient adapters on experts, through PEFT."""

from .expert_config import load_expert_lora
from .expert_lora import expert_lora_config
from .select_experts import select_experts


__all__ = ["expert_lora_config", "load_expert_lora", "select_experts"]
