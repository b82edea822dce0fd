"""The experts' formula, one token and one expert at a time, in float64: what every backend must equal."""

from __future__ import annotations

import torch
from torch import nn


def experts_oracle(experts: nn.Module, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """
    y = sum over k of w_k FFN_e(x), e the k-th expert of the token; experts of other ranks (e >= E) add nothing.

    Reads the parameters of any experts class of transformers' interface and calls nothing of it but its activation.
    Gradients reach `experts`. Returns float64.
    """
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    activation = experts._apply_gate if experts.has_gate else experts.act_fn
    outputs = []
    for x, index, weights in zip(hidden_states.double(), top_k_index.tolist(), top_k_weights.double(), strict=True):
        y = torch.zeros_like(x)
        for expert, weight in zip(index, weights, strict=True):
            if expert < experts.num_experts:
                intermediate = activation(_linear(experts, up_name, expert, x))
                y = y + weight * _linear(experts, "down_proj", expert, intermediate)
        outputs.append(y)
    if outputs:
        return torch.stack(outputs)
    return hidden_states.double() + 0 * sum(t.double().sum() for t in (top_k_weights, *experts.parameters()))


def _linear(experts: nn.Module, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[expert].double()
    y = x @ weight if experts.is_transposed else weight @ x
    return y + getattr(experts, f"{name}_bias")[expert].double() if experts.has_bias else y
