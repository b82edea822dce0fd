"""
DoRA on experts (arXiv 2402.09353): `y = g_e (W_e x + s B_e A_e x)`, where g_e is, for each output, the trained
magnitude over the norm of that row of `W_e + s B_e A_e`, which is taken for a constant (section 4.3) and never built.

E experts, N adapted ones, T tokens, H hidden, R rows, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .expert_modules import first_projection
from .low_rank_experts import LowRank


class Magnitude(nn.Module):
    """The norms of the rows of N experts: `weight` (N, out)."""

    def __init__(self, norms: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(norms)


@dataclass(frozen=True)
class Dora(LowRank):
    """
    A [`LowRank`] whose outputs, with those of W, are scaled.

    Args:
        gain (`torch.Tensor` of shape `(N, out)`): g of each adapted expert, for `columns` only.
    """

    gain: torch.Tensor | None = None


@torch.no_grad()
def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """The norm of each row of `W + s B A`, of W (out, in), A (r, in) and B (r, out), by products of rank r."""
    weight, a, b = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (weight, a, b))
    crossed = ((weight @ a.mT) * b.mT).sum(-1)
    update = ((b.mT @ (a @ a.mT)) * b.mT).sum(-1)
    return (weight.square().sum(-1) + 2 * scale * crossed + scale**2 * update).clamp_min(1e-30).sqrt()


def dora_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: list[LowRank],
    down: list[LowRank],
) -> torch.Tensor:
    """As `low_rank_experts`, where some adapters are [`Dora`]: one expert after the other, in plain autograd."""
    if experts._is_expert_parallel:
        raise ValueError("DoRA does not work with expert parallelism. Leave `use_dora` out.")
    output = hidden_states.new_zeros(
        hidden_states.shape, dtype=torch.promote_types(hidden_states.dtype, torch.float32)
    )
    for expert in top_k_index.unique().tolist():
        if expert >= experts.num_experts:  # dropped by a router with a capacity
            continue
        token_R, place_R = torch.where(top_k_index == expert)
        first = _project(experts, first_projection(experts), expert, hidden_states[token_R], token_R, up)
        hidden = experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)
        second = _project(experts, "down_proj", expert, hidden, token_R, down)
        if experts.has_post_expert_norm:
            second = experts.post_expert_norm(second)
        weighted = second * top_k_weights[token_R, place_R, None]
        output = output.index_add(0, token_R, weighted.to(output.dtype))
    return output.to(hidden_states.dtype)


def _project(
    experts: Any, name: str, expert: int, inputs: torch.Tensor, token_R: torch.Tensor, adapters: list[LowRank]
) -> torch.Tensor:
    weight = getattr(experts, name)[expert]
    weight, inputs = weight.mT if experts.is_transposed else weight, inputs.to(weight.dtype)
    output = base = F.linear(inputs, weight)
    if experts.has_bias:
        output = output + getattr(experts, f"{name}_bias")[expert]
    for adapter in adapters:
        if expert not in adapter.experts:
            continue
        slot = adapter.experts.index(expert)
        dropped = F.dropout(inputs, adapter.dropout) if adapter.dropout else inputs
        a, b = (factor[slot].to(weight.dtype) for factor in (adapter.a, adapter.b))
        update = F.linear(F.linear(dropped, a), b.mT) * adapter.scale
        if isinstance(adapter, Dora) and adapter.gain is not None:
            gain, without = adapter.gain[slot], F.linear(dropped, weight) if adapter.dropout else base
            update = gain * update + (gain - 1) * without[:, adapter.columns]
        if adapter.tokens is not None:
            update = update * adapter.tokens[token_R]
        output = output.clone()
        output[:, adapter.columns] += update
    return output
