"""Faster experts implementations, registered with transformers: ours and stock mixtures may use them alike."""

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .auto import auto_experts_forward
from .segment_mm import segment_mm_experts_forward, segment_mm_recompute_experts_forward


ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("segment_mm", segment_mm_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("segment_mm_recompute", segment_mm_recompute_experts_forward)

__all__ = ["auto_experts_forward", "segment_mm_experts_forward", "segment_mm_recompute_experts_forward"]
