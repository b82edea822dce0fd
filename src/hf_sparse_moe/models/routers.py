"""Routers: which experts serve a token, and with what weight. T tokens, H hidden, E experts, K experts a token."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init


ROUTER_INIT_STD = 0.02  # small rows: every expert starts about equally likely


def router_scores(router_logits_TE: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """The scores that experts are chosen by and weighted with: softmax or sigmoid of the logits, in float32."""
    if scoring_func == "sigmoid":
        return router_logits_TE.float().sigmoid()
    return router_logits_TE.float().softmax(dim=-1)


def router_probabilities(router_logits_TE: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """The scores as probabilities over the experts (rows sum to 1), as the load-balancing loss needs them."""
    scores_TE = router_scores(router_logits_TE, scoring_func)
    return scores_TE if scoring_func == "softmax" else scores_TE / scores_TE.sum(dim=-1, keepdim=True)


class SparseMoeTopKRouter(nn.Module):
    """
    Each token takes its `num_experts_per_tok` best experts.

    Scores are the softmax (Switch, Mixtral) or the sigmoid (DeepSeek-V3, arXiv 2412.19437) of `weight @ x`; the
    chosen scores are the weights, divided by their sum where `norm_topk_prob`, times `routed_scaling_factor`.
    Everything is computed in float32, whatever the dtype of the model or of autocast.
    """

    def __init__(self, config: PreTrainedConfig, hidden_size: int):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.jitter_noise = config.router_jitter_noise
        self.weight = nn.Parameter(torch.empty(self.num_experts, hidden_size))

    def reset_parameters(self) -> None:
        """Small random rows; never zeros, or ties would send every token to expert 0."""
        init.normal_(self.weight, mean=0.0, std=ROUTER_INIT_STD)

    def forward(self, hidden_states_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states_TH (`torch.Tensor` of shape `(T, H)`): The tokens.

        Returns:
            `tuple`: router logits `(T, E)`, weights `(T, K)`, both float32, and expert indices `(T, K)`.
        """
        with torch.autocast(device_type=hidden_states_TH.device.type, enabled=False):
            router_input = hidden_states_TH.float()
            if self.training and self.jitter_noise > 0:
                noise = torch.empty_like(router_input).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
                router_input = router_input * noise
            router_logits = nn.functional.linear(router_input, self.weight.float())
        scores = router_scores(router_logits, self.scoring_func)
        top_k_weights, top_k_index = torch.topk(scores, self.top_k, dim=-1)
        if self.norm_topk_prob:
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights * self.routed_scaling_factor, top_k_index

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, scoring_func={self.scoring_func!r}"
