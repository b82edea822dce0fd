"""Parameter-efficient adapters on experts, through PEFT."""

from .expert_lora import expert_lora_config


__all__ = ["expert_lora_config"]
