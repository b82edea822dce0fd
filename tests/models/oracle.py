"""The mixture's formulas, one token and one expert at a time, in float64: what every fast path must equal."""

from __future__ import annotations

import math

import torch

from hf_sparse_moe.models.moe_block import SparseMoeBlock


Choice = dict[int, torch.Tensor]  # the weight of each expert that serves a token


def block_oracle(
    block: SparseMoeBlock,
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    jitter: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    y = sum over the experts e that serve x of w_e FFN_e(x), plus the shared experts; FFN(x) = down(act(gate(x)) *
    up(x)) or down(act(up(x))). Gradients reach `block`.

    Args:
        block (`SparseMoeBlock`): Its parameters are read, none of its code is called but the activation.
        hidden_states (`torch.Tensor` of shape `(B, S, H)` or `(T, H)`): The tokens; `(T, H)` is one sequence.
        mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 for a pad.
        ids (`torch.Tensor` of shape `(B, S)`, *optional*): The token ids, for hash routing.
        jitter (`torch.Tensor` of shape `(T, H)`, *optional*): What the router's input is multiplied by.

    Returns:
        `torch.Tensor` of the same shape, float64.
    """
    experts = block.experts
    x_TH = hidden_states.reshape(-1, hidden_states.shape[-1]).double()
    length = hidden_states.shape[-2]
    seen_TH = x_TH if jitter is None else x_TH * jitter.double()
    real = [True] * len(x_TH) if mask is None else mask.reshape(-1).bool().tolist()
    token_ids = None if ids is None else ids.reshape(-1).tolist()
    outputs = []
    for x, choice in zip(x_TH, choices(block, seen_TH, length, real, token_ids), strict=True):
        y = torch.zeros_like(x)
        for e, weight in choice.items():
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


def choices(
    block: SparseMoeBlock, x_TH: torch.Tensor, length: int, real: list[bool], ids: list[int] | None
) -> list[Choice]:
    """
    The experts of each token with their weights.

    Args:
        block (`SparseMoeBlock`): Its router's parameters are read.
        x_TH (`torch.Tensor` of shape `(T, H)`): What the router sees.
        length (`int`): S, the tokens of a sequence.
        real (`list[bool]`): Which tokens are no pads.
        ids (`list[int]`, *optional*): The token ids.
    """
    config = block.config
    if config.router_type == "hash":
        return [_hashed(config, token_id) for token_id in ids]
    scores = [_scores(block, x) for x in x_TH]
    if config.router_type == "expert_choice" and block.side == "encoder":
        return _expert_choice(config, scores, length, real)
    chosen = [_best_experts(block, s) for s in scores]
    if block.training and config.capacity_factor is not None:
        served = _within_capacity(config, scores, chosen, real)
    else:
        served = {(t, e) for t, experts in enumerate(chosen) for e in experts}
    result = []
    for t, (s, experts) in enumerate(zip(scores, chosen, strict=True)):
        total = sum(s[e] for e in experts) if config.norm_topk_prob else 1.0
        result.append({e: config.routed_scaling_factor * s[e] / total for e in experts if (t, e) in served})
    return result


def _scores(block: SparseMoeBlock, x: torch.Tensor) -> torch.Tensor:
    gate = block.gate
    if block.config.scoring_func == "cosine":
        q = gate.projection.double() @ x
        temperature = max(gate.temperature.double().squeeze(), torch.tensor(0.01).double())
        logits = [key @ q / (key.norm() * q.norm()) / temperature for key in gate.weight.double()]
        return torch.stack(logits).softmax(dim=-1)
    logits = gate.weight.double() @ x
    return logits.sigmoid() if block.config.scoring_func == "sigmoid" else logits.softmax(dim=-1)


def _best_experts(block: SparseMoeBlock, s: torch.Tensor) -> list[int]:
    """The best first. Of several groups, only experts of the best ones: by their best expert, or two where sigmoid."""
    config = block.config
    biased = s.tolist()
    if config.scoring_func == "sigmoid":
        biased = [
            value + bias for value, bias in zip(biased, block.gate.e_score_correction_bias.tolist(), strict=True)
        ]
    size = config.num_experts // config.n_group
    groups = [range(first, first + size) for first in range(0, config.num_experts, size)]
    counted = 2 if config.scoring_func == "sigmoid" else 1

    def worth(group: range) -> float:
        return sum(sorted((biased[e] for e in group), reverse=True)[:counted])

    allowed = [e for group in sorted(groups, key=worth, reverse=True)[: config.topk_group] for e in group]
    return sorted(allowed, key=lambda e: biased[e], reverse=True)[: config.num_experts_per_tok]


def _within_capacity(config, scores: list, chosen: list[list[int]], real: list[bool]) -> set[tuple[int, int]]:
    """The (token, expert) pairs that an expert has room for."""
    pairs = sum(len(experts) for experts, is_real in zip(chosen, real, strict=True) if is_real)
    capacity = math.ceil(round(config.capacity_factor * pairs / config.num_experts, 9))
    served = set()
    for e in range(config.num_experts):
        wanting = [t for t, experts in enumerate(chosen) if real[t] and e in experts]
        wanting.sort(key=lambda t: scores[t][e].item(), reverse=True)
        served |= {(t, e) for t in wanting[:capacity]}
    return served


def _expert_choice(config, scores: list[torch.Tensor], length: int, real: list[bool]) -> list[Choice]:
    factor = config.num_experts_per_tok if config.capacity_factor is None else config.capacity_factor
    result: list[Choice] = [{} for _ in scores]
    for first in range(0, len(scores), length):
        tokens = [t for t in range(first, first + length) if real[t]]
        capacity = math.ceil(round(factor * len(tokens) / config.num_experts, 9))
        for e in range(config.num_experts):
            for t in sorted(tokens, key=lambda t: scores[t][e].item(), reverse=True)[:capacity]:
                result[t][e] = config.routed_scaling_factor * scores[t][e]
    return result


def _hashed(config, token_id: int) -> Choice:
    first = (token_id * 2654435761) % 2**32 >> 8
    weight = torch.tensor(config.routed_scaling_factor / config.num_experts_per_tok, dtype=torch.float64)
    return {(first + slot) % config.num_experts: weight for slot in range(config.num_experts_per_tok)}


def _feed_forward(x, up_weight, up_bias, down_weight, down_bias, act_fn, gated: bool) -> torch.Tensor:
    up = up_weight.double() @ x + (0 if up_bias is None else up_bias.double())
    if gated:
        half = len(up) // 2
        intermediate = act_fn(up[:half]) * up[half:]
    else:
        intermediate = act_fn(up)
    return down_weight.double() @ intermediate + (0 if down_bias is None else down_bias.double())
