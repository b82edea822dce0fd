"""Which experts a task uses: Expert-Specialized Fine-Tuning (arXiv 2407.01906)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.routing.mixture_layers import find_mixture_layers, routing_events

from .expert_modules import below_adapters, expert_modules


@torch.no_grad()
def select_experts(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    share: float = 0.2,
    by: Literal["weight", "count"] = "weight",
) -> dict[str, list[int]]:
    """
    The fewest experts of each layer that carry `share` of a task, for `expert_lora_config(model, experts=...)`.

    ESFT (arXiv 2407.01906, section 3.3): each expert is scored by its mean router weight over the tokens (equation 6,
    with 0.2 as the paper's threshold) or by its share of the assignments (equation 7, there with 0.1); the highest
    scores are taken until they sum to the threshold. Pads do not count. Runs the model in evaluation mode.

    Args:
        model (`PreTrainedModel`): A mixture, this package's or of transformers.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): Some of the task's data, as the forward takes it.
        share (`float`, defaults to 0.2): Of each layer's scores, above 0 and up to 1.
        by (`str`, defaults to `"weight"`): What scores an expert: its router weight, or the count of its tokens.

    Returns:
        `dict[str, list[int]]`: The chosen experts of each experts module, by its name.

    Raises:
        ValueError: no experts, no data, or a `share` or `by` that is not allowed.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share={share}` must lie above 0 and be at most 1.")
    if by not in ("weight", "count"):
        raise ValueError(f'`by={by!r}` must be "weight" or "count".')
    model = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    modules = expert_modules(model)
    names = {module: name for name, module in modules.items()}
    layers = [layer for layer in find_mixture_layers(model) if below_adapters(layer.experts) in names]
    scores = {name: torch.zeros(module.num_experts, dtype=torch.float64) for name, module in modules.items()}
    training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            for event in routing_events(model, layers, inputs):
                index, weights, kept = event.routing.top_k_index, event.routing.top_k_weights, event.routing.kept
                experts = below_adapters(event.layer.experts)
                counts = index < experts.num_experts
                if event.counted_rows is not None:
                    counts = counts & event.counted_rows[:, None]
                if kept is not None:
                    counts = counts & kept
                values = weights.double() if by == "weight" else torch.ones_like(weights, dtype=torch.float64)
                scores[names[experts]].index_add_(0, index[counts].cpu(), values[counts].cpu())
    finally:
        model.train(training)
    if not all(values.sum() > 0 for values in scores.values()):
        raise ValueError("`batches` is empty, or some layer got no token: there is nothing to choose by.")
    return {name: _fewest(values / values.sum(), share) for name, values in scores.items()}


def _fewest(shares: torch.Tensor, wanted: float) -> list[int]:
    sorted_shares, order = shares.sort(descending=True, stable=True)
    before = sorted_shares.cumsum(0) - sorted_shares
    return sorted(order[before < wanted - 1e-12].tolist())
