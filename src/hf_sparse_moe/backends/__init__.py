"""Faster experts implementations, registered with transformers: ours and stock mixtures may use them alike."""

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils.import_utils import is_triton_available

from .auto import auto_experts_forward
from .segment_mm import segment_mm_experts_forward, segment_mm_recompute_experts_forward


def triton_mm_experts_forward(self: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
    """See `triton_experts.py`, which is imported, and Triton with it, at the first call."""
    if not is_triton_available():
        raise ValueError('`experts_implementation="triton_mm"` needs Triton: `pip install triton`.')
    from .triton_experts import triton_mm_experts_forward as forward

    return forward(self, *args, **kwargs)


ALL_EXPERTS_FUNCTIONS.register("triton_mm", triton_mm_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("segment_mm", segment_mm_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("segment_mm_recompute", segment_mm_recompute_experts_forward)

__all__ = [
    "auto_experts_forward",
    "segment_mm_experts_forward",
    "segment_mm_recompute_experts_forward",
    "triton_mm_experts_forward",
]
