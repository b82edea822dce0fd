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

    return forward


ALL_EXPERTS_FUNCTIONS.register("sparse_moe", sparse_moe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("sparse_moe_recompute", sparse_moe_recompute_experts_forward)
for _old, _new in (
    ("auto", "sparse_moe"),
    ("segment_mm", "sparse_moe"),
    ("segment_mm_recompute", "sparse_moe_recompute"),
):
    ALL_EXPERTS_FUNCTIONS.register(_old, _renamed(_old, _new))

__all__ = ["sparse_moe_experts_forward", "sparse_moe_recompute_experts_forward"]
