"""`skip_experts`: experts that would add little to a token are not computed (NAEE, arXiv 2402.14800, section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_sparse_moe.models.routers import SparseMoeExpertChoiceRouter

from .mixture_layers import MixtureLayer, find_mixture_layers, routing_events, without_wrapper


@dataclass
class Skipped:
    """
    What [`skip_experts`] left out so far.

    Args:
        betas (`tuple[float, ...]`): The threshold of each sparse layer.
        assignments (`int`): Pairs of a token and an expert that the routers chose, pads included.
        skipped (`int`): Those that were not computed.
    """

    betas: tuple[float, ...]
    assignments: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        """Skipped of all assignments."""
        return self.skipped / max(1, self.assignments)


@contextmanager
def skip_experts(
    model: nn.Module, beta: float | Sequence[float] | str, batches: Iterable[Mapping[str, Any]] | None = None
) -> Iterator[Skipped]:
    """
    Leave out, token by token, each expert whose weight is below `beta` times that of the token's best expert.

    The experts that stay share its weight in proportion. Its product is not computed, except with the `batched_mm`
    backend, which multiplies by zero; what routers, monitors and statistics see is unchanged. For inference: no
    gradient is promised. Saves nothing where steps are of few tokens, whose experts' weights must be read anyway.

    Args:
        model (`nn.Module`): A mixture of this package or of transformers.
        beta (`float`, `list[float]` or `str`): From 0, which skips nothing, to 1, which leaves the best expert alone,
            one for all sparse layers or one for each; or `"median"`: of each layer the median ratio of the second
            weight to the first, so that half of the tokens skip theirs.
        batches (`Iterable`, *optional*): Model inputs to measure the median on.

    Returns:
        [`Skipped`]: counts what was left out.

    Raises:
        ValueError: another `beta`, one expert a token, a router whose experts choose their tokens, an adapter, or
            experts that cannot skip (a stock architecture with a loop of its own).

    Example:
        ```python
        with skip_experts(model, "median", batches) as skipped:
            model.generate(**inputs)
        print(skipped.share)
        ```
    """
    layers = find_mixture_layers(model)
    for layer in layers:
        if layer.top_k < 2:
            raise ValueError(f"`{layer.name}` has one expert a token, which cannot be skipped.")
        if any(isinstance(module, SparseMoeExpertChoiceRouter) for module in layer.router.modules()):
            raise ValueError(f"The experts of `{layer.name}` choose their tokens: a token has no weakest one to skip.")
        if without_wrapper(layer.experts) is not layer.experts:
            raise ValueError(f"The experts of `{layer.name}` have an adapter. Merge it first: `merge_and_unload()`.")
        if not hasattr(layer.experts, "_is_expert_parallel"):
            raise ValueError(
                f"The experts of `{layer.name}`, a `{type(layer.experts).__name__}`, always compute all that were "
                "chosen. `import_stock` makes a mixture of this package where it can."
            )
    if beta == "median":
        if batches is None:
            raise ValueError('`beta="median"` is measured: pass `batches`, model inputs of the text to come.')
        beta = _median_ratios(model, layers, batches)
    betas: list[Any] = [beta] * len(layers) if isinstance(beta, int | float) else list(beta)
    if len(betas) != len(layers) or not all(isinstance(each, int | float) and 0 <= each <= 1 for each in betas):
        raise ValueError(f'`beta={beta!r}` is not allowed: it must be from 0 to 1, one a layer, or "median".')
    skipped = Skipped(tuple(betas))
    with ExitStack() as stack:
        for layer, limit in zip(layers, betas, strict=True):
            experts: Any = layer.experts
            before = {name: value for name, value in vars(experts).items() if name == "forward"}
            stack.callback(vars(experts).update, before | {"_is_expert_parallel": experts._is_expert_parallel})
            stack.callback(vars(experts).pop, "forward")
            experts._is_expert_parallel = True  # so that backends leave out index E
            # Around `forward`, not as a hook: those who watch the routing see what the router chose.
            vars(experts)["forward"] = partial(_without_weak, experts.forward, layer.num_experts, limit, skipped)
        yield skipped


def _without_weak(
    forward: Any,
    num_experts: int,
    beta: float,
    skipped: Skipped,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts' own forward without the weak assignments, whose index becomes E."""
    weak = top_k_weights < beta * top_k_weights.amax(dim=-1, keepdim=True)
    kept = top_k_weights.masked_fill(weak, 0.0)
    total, left = (weights.sum(dim=-1, keepdim=True) for weights in (top_k_weights, kept))
    kept = kept * (total / left.clamp(min=torch.finfo(kept.dtype).tiny))
    skipped.assignments += weak.numel()
    skipped.skipped += int(weak.sum())
    return forward(hidden_states, top_k_index.masked_fill(weak, num_experts), kept)


@torch.no_grad()
def _median_ratios(model: nn.Module, layers: list[MixtureLayer], batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """Of each layer, over all tokens but pads, the median of w2 / w1."""
    ratios: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    training = model.training
    model.eval()
    try:
        for batch in batches:
            for event in routing_events(model, layers, batch):
                best = event.routing.top_k_weights.float().topk(2, dim=-1).values
                ratio = best[:, 1] / best[:, 0]
                ratios[event.layer.name].append(ratio if event.token_mask is None else ratio[event.token_mask])
    finally:
        model.train(training)
    return [torch.cat(found).median().item() if found else 0.0 for found in ratios.values()]
