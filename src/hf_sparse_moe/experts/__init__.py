"""The experts of a layer as one differentiable function, registered with transformers for ours and stock mixtures."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .function import sparse_moe_experts_forward, sparse_moe_recompute_experts_forward


def _renamed(old: str, new: str) -> Any:
    def forward(self: Any, *arguments: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f'`experts_implementation="{old}"` is now "{new}", and goes with the next release.',
                FutureWarning,
                stacklevel=2,
            )
        return ALL_EXPERTS_FUNCTIONS[new](self, *arguments)

    ALL_EXPERTS_FUNCTIONS.register(old, forward)
    return forward


ALL_EXPERTS_FUNCTIONS.register("sparse_moe", sparse_moe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("sparse_moe_recompute", sparse_moe_recompute_experts_forward)
# The names of version 0.1.
auto_experts_forward = _renamed("auto", "sparse_moe")
segment_mm_experts_forward = _renamed("segment_mm", "sparse_moe")
segment_mm_recompute_experts_forward = _renamed("segment_mm_recompute", "sparse_moe_recompute")

__all__ = ["sparse_moe_experts_forward", "sparse_moe_recompute_experts_forward"]
