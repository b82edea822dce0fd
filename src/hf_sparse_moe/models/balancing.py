"""Losses that keep the load of the experts even. T tokens, E experts, K experts a token."""

from __future__ import annotations

import torch


def expert_counts(
    top_k_index_TK: torch.Tensor, num_experts: int, token_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """
    How many (token, expert) assignments went to each expert.

    Args:
        top_k_index_TK (`torch.LongTensor` of shape `(T, K)`): The experts chosen for each token.
        num_experts (`int`): E.
        token_mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for a token that counts, 0 for a pad.

    Returns:
        `torch.FloatTensor` of shape `(E,)`, without gradient.
    """
    with torch.no_grad():
        index = top_k_index_TK.reshape(-1)
        if token_mask_T is None:
            weight = torch.ones_like(index, dtype=torch.float32)
        else:
            weight = token_mask_T.float().repeat_interleave(top_k_index_TK.shape[-1])
        return torch.zeros(num_experts, dtype=torch.float32, device=index.device).scatter_add_(0, index, weight)


def masked_mean(values: torch.Tensor, token_mask_T: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens (dimension 0) that count; zero where none does."""
    if token_mask_T is None:
        return values.mean(dim=0)
    mask = token_mask_T.to(values.dtype)
    weighted = values * mask.reshape(-1, *[1] * (values.dim() - 1))
    return weighted.sum(dim=0) / mask.sum().clamp(min=1)


def load_balancing_loss(
    router_probs_TE: torch.Tensor, top_k_index_TK: torch.Tensor, token_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """
    E * sum_e f_e P_e of one layer (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

    f_e is expert e's share of the T * K assignments, P_e its mean probability. An even load gives 1, all tokens on one
    expert E. transformers' `load_balancing_loss_func` sums f over the K slots and so reads K where this reads 1; it
    also pools all layers first, so that layers which collapse onto different experts look even.

    Args:
        router_probs_TE (`torch.FloatTensor` of shape `(T, E)`): Probabilities, each row summing to 1.
        top_k_index_TK (`torch.LongTensor` of shape `(T, K)`): The experts chosen for each token.
        token_mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for a token that counts, 0 for a pad.

    Returns:
        `torch.FloatTensor`: a scalar; 0 when no token counts.
    """
    num_experts = router_probs_TE.shape[-1]
    counts_E = expert_counts(top_k_index_TK, num_experts, token_mask_T)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return num_experts * (share_E * masked_mean(router_probs_TE, token_mask_T)).sum()


def router_z_loss(router_logits_TE: torch.Tensor, token_mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the tokens of logsumexp(logits)^2, which keeps router logits small (ST-MoE, arXiv 2202.08906)."""
    return masked_mean(torch.logsumexp(router_logits_TE, dim=-1).square(), token_mask_T)
