"""The backend that is the fastest where the tensors are, chosen call by call."""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .segment_mm import segment_mm_experts_forward


def auto_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    `experts_implementation="auto"`: `segment_mm` on a CPU, transformers' `grouped_mm` elsewhere and in traced graphs.

    A choice by measurement (benchmarks/experts.py): with its own arguments no backend computes anything else. Takes
    what [`segment_mm_experts_forward`] takes.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if hidden_states.device.type == "cpu" and not traced and not self.has_post_expert_norm:
        return segment_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
