"""The backend that is the fastest where the tensors are, chosen call by call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .segment_mm import compute_dtype, segment_mm_experts_forward, unsupported
from .segments import require_experts


# Rows an expert, on average, below which a forward pass outside of training is faster with `grouped_mm`, whose loop
# over the experts is not in Python. Found with `python benchmarks/experts.py`.
FEW_ROWS = 32
GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def auto_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    `experts_implementation="auto"`: `segment_mm` on a CPU, transformers' `grouped_mm` elsewhere, in traced graphs, and
    for few rows an expert outside of training, as in each step of `generate` (measured by benchmarks/experts.py and
    benchmarks/generate.py). Takes what [`segment_mm_experts_forward`] takes.
    """
    arguments = (self, hidden_states, top_k_index, top_k_weights)
    if unsupported(self, hidden_states) is not None:
        return grouped_mm_experts_forward(*arguments)
    # In training, a reentrant checkpoint runs without gradients first, and has to draw the same dropout later.
    if self.training or not _few_rows_suit_grouped_mm(self, top_k_index):
        return segment_mm_experts_forward(*arguments)
    require_experts(top_k_index, self.num_experts, may_skip=self._is_expert_parallel)
    return grouped_mm_experts_forward(*arguments)


def _few_rows_suit_grouped_mm(experts: Any, top_k_index: torch.Tensor) -> bool:
    if torch.is_grad_enabled() or not 0 < top_k_index.numel() < FEW_ROWS * experts.num_experts:
        return False
    # What a parametrization or quantisation computes at each access is not looked at, and computed once.
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return all(_suits_grouped_mm(experts._parameters.get(name)) for name in names)


def _suits_grouped_mm(weight: torch.Tensor | None) -> bool:
    """It knows no float64 and no autocast, and refuses rows that are no multiple of 16 bytes."""
    return (
        type(weight) is nn.Parameter
        and weight.dtype in GROUPED_MM_DTYPES
        and weight.dtype == compute_dtype(weight)
        and all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    )
