"""Experts for a few tokens outside of training, as a step of `generate` has: reads the experts hit and no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .segment_mm import compute_dtype


# Pairs of token and expert up to which a loop in Python is faster than `grouped_mm`, in float32. In bfloat16 it
# is not: there oneDNN compiles a product for each number of rows that it has not seen.
FEW_PAIRS = 32


def suits_few_pairs(experts: Any, top_k_index: torch.Tensor) -> bool:
    """Whether [`few_pairs_experts_forward`] computes this call as the other backends do, and faster."""
    if torch.is_grad_enabled() or experts._is_expert_parallel or not 0 < top_k_index.numel() <= FEW_PAIRS:
        return False
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    weights = [experts._parameters.get(name) for name in names]
    plain = all(type(weight) is nn.Parameter and weight.dtype == torch.float32 for weight in weights)
    return plain and compute_dtype(weights[0]) == torch.float32


def few_pairs_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    y_t = sum over k of w_tk FFN_e(x_t), e the k-th expert of token t, an expert at a time; without gradients.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, H)`): x.
        top_k_index (`torch.Tensor` of shape `(T, K)`): Experts, 0 to E - 1.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): w.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `hidden_states`.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    # Row r serves the pair pair_R[r]; the rows of an expert are neighbours.
    experts_and_pairs = sorted((expert, pair) for pair, expert in enumerate(top_k_index.flatten().tolist()))
    pair_R = torch.tensor([pair for _, pair in experts_and_pairs])
    bounds: dict[int, tuple[int, int]] = {}
    for row, (expert, _) in enumerate(experts_and_pairs):
        bounds[expert] = bounds.get(expert, (row, row))[0], row + 1
    rows_RH = hidden_states.to(self.down_proj.dtype)[pair_R // top_k_index.shape[1]]
    first_RU = _project(self, up_name, rows_RH, bounds)
    activation = self._apply_gate if self.has_gate else self.act_fn
    output_RH = _project(self, "down_proj", activation(first_RU).to(rows_RH.dtype), bounds)
    row_TK = torch.empty_like(pair_R).scatter_(0, pair_R, torch.arange(len(pair_R))).view(top_k_index.shape)
    weights_TK = top_k_weights.to(output_RH.dtype)
    return F.embedding_bag(row_TK, output_RH, per_sample_weights=weights_TK, mode="sum").to(hidden_states.dtype)


def _project(experts: Any, name: str, rows_RI: torch.Tensor, bounds: dict[int, tuple[int, int]]) -> torch.Tensor:
    weight_EOI = getattr(experts, name)
    if experts.is_transposed:
        weight_EOI = weight_EOI.transpose(1, 2)
    output_RO = rows_RI.new_empty(len(rows_RI), weight_EOI.shape[1])
    for expert, (start, stop) in bounds.items():
        weight_OI = weight_EOI[expert]
        if 2 <= stop - start <= 4:  # faster the other way round
            output_RO[start:stop] = (weight_OI @ rows_RI[start:stop].t()).t()
        else:
            torch.mm(rows_RI[start:stop], weight_OI.t(), out=output_RO[start:stop])
        if experts.has_bias:
            output_RO[start:stop] += getattr(experts, f"{name}_bias")[expert]
    return output_RO
