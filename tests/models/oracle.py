"""The mixture's formula, one token and one expert at a time, in float64: what every fast path must equal."""

from __future__ import annotations

import torch

from hf_sparse_moe.models.moe_block import SparseMoeBlock


def block_oracle(block: SparseMoeBlock, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    y = sum over the K best experts e of w_e FFN_e(x), plus the shared experts.

    s = softmax(Wx) or sigmoid(Wx); w_e = s_e, divided by the chosen ones' sum if `norm_topk_prob`, times
    `routed_scaling_factor`; FFN(x) = down(act(gate(x)) * up(x)) or down(act(up(x))). Gradients reach `block`.

    Args:
        block (`SparseMoeBlock`): Its parameters are read, none of its code is called but the activation.
        hidden_states (`torch.Tensor` of shape `(..., H)`): The tokens.

    Returns:
        `torch.Tensor` of the same shape, float64.
    """
    config, experts = block.config, block.experts
    outputs = []
    for x in hidden_states.reshape(-1, hidden_states.shape[-1]).double():
        logits = block.gate.weight.double() @ x
        scores = logits.softmax(dim=-1) if config.scoring_func == "softmax" else logits.sigmoid()
        chosen = scores.argsort(descending=True)[: config.num_experts_per_tok].tolist()
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        y = torch.zeros_like(x)
        for e in chosen:
            weight = config.routed_scaling_factor * scores[e] / total
            y = y + weight * _feed_forward(
                x,
                getattr(experts, experts.up_name)[e],
                getattr(experts, f"{experts.up_name}_bias")[e] if experts.biased else None,
                experts.down_proj[e],
                experts.down_proj_bias[e] if experts.biased else None,
                experts.act_fn,
                experts.gated,
            )
        if block.shared_experts is not None:
            up, down = block.shared_experts.up_proj, block.shared_experts.down_proj
            y = y + _feed_forward(x, up.weight, up.bias, down.weight, down.bias, experts.act_fn, experts.gated)
        outputs.append(y)
    return torch.stack(outputs).reshape(hidden_states.shape)


def _feed_forward(x, up_weight, up_bias, down_weight, down_bias, act_fn, gated: bool) -> torch.Tensor:
    up = up_weight.double() @ x + (0 if up_bias is None else up_bias.double())
    if gated:
        half = len(up) // 2
        intermediate = act_fn(up[:half]) * up[half:]
    else:
        intermediate = act_fn(up)
    return down_weight.double() @ intermediate + (0 if down_bias is None else down_bias.double())
