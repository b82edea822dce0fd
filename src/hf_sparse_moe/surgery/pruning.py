"""`prune_experts`: a mixture without some of its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from math import comb
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.insight.losses import Evaluation
from hf_sparse_moe.models.routers import (
    SparseMoeExpertChoiceRouter,
    SparseMoeHashRouter,
    mask_lower_groups,
    router_scores,
)
from hf_sparse_moe.routing.mixture_layers import MixtureLayer

from .expert_axes import ExpertRows
from .measurements import ExpertMeasurements, LayerMeasurements
from .measuring import MOST_PAIRED_EXPERTS
from .mixture import Mixture, router_tensors
from .rewriting import Plan, rewrite


METHODS = ("reap", "ean", "frequency", "random", "naee")
MOST_SUBSETS = 20_000  # of the experts of a layer, that `method="naee"` tries
Keep = int | float | Mapping[int, int | float]


def prune_experts(
    source: PreTrainedModel | str | Path,
    measured: ExpertMeasurements | str | Path | None = None,
    keep: Keep | None = None,
    drop: Mapping[int, Sequence[int]] | Sequence[int] | None = None,
    method: str = "reap",
    output: str | Path | None = None,
    seed: int = 0,
    *,
    evaluation: Evaluation | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
) -> Any:
    """
    Make a mixture with fewer experts of a mixture of this package or of transformers.

    It computes what the mixture computes under [`disable_experts`] of the experts that went. Everything with an expert
    axis is cut: weights, biases, router rows, selection biases, quantised codes. The number of experts that serve a
    token stays.

    Args:
        source (`PreTrainedModel`, `str` or `Path`): A mixture, which is left as it is, or the folder or Hub id of one.
        measured ([`ExpertMeasurements`], `str` or `Path`, *optional*): What [`measure_experts`] found, or its file, by
            which all methods but `"random"` choose.
        keep (`int`, `float` or `dict`, *optional*): How many experts of a layer stay, or which share of them, such as
            0.75; a `dict` says so for some layers, by their places from 0.
        drop (`dict` or `list[int]`, *optional*): Instead of `keep`, the experts to leave out, `{layer: [3, 7]}`, or
            the same of all layers.
        method (`str`, defaults to `"reap"`): Which experts stay: those with the highest router-weighted norm of their
            outputs (`"reap"`, arXiv 2510.13999), norm of their outputs (`"ean"`) or `"frequency"`; the subset that
            changes the layer's output least on sampled tokens (`"naee"`, arXiv 2402.14800, of few experts); or any
            (`"random"`).
        output (`str` or `Path`, *optional*): A folder that does not exist yet, or is empty, to write the mixture to,
            tensor by tensor where `source` is a folder or Hub id: neither mixture is then in memory.
        seed (`int`, defaults to 0): Of `method="random"`.
        evaluation (`tuple`, *optional*): Batches and the group of each of their sequences, as for [`measure_experts`],
            on which the receipt tells the loss before and after. Both models are loaded for it.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights, with `output`.
        resume (`bool`, defaults to `False`): With `output`, continue an interrupted call from its finished shards.
        show_progress (`bool`, defaults to `False`): With `output`, a bar with rate and time left, on stderr.

    Returns:
        `PreTrainedModel`: The pruned model, in evaluation mode; with `output`, a [`SurgeryReport`].

    Raises:
        ValueError: not a mixture, hash routing, an unknown layer, expert or method, more experts a token than stay,
            groups of experts that lose different numbers, numbers that the architecture cannot hold, or measurements
            of another model.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        measured = measure_experts(model, batches)
        pruned = prune_experts(model, measured, keep=0.75)
        ```
    """
    if (keep is None) == (drop is None):
        raise ValueError("Give either `keep`, how many experts stay, or `drop`, which ones go.")
    if method not in METHODS:
        raise ValueError(f"`method={method!r}` is not allowed: it must be one of {METHODS}.")

    if keep is not None and method != "random" and measured is None:
        raise ValueError(
            f"`method={method!r}` needs `measured`: what `measure_experts` (`hf-sparse-moe measure`) finds."
        )
    known = None if measured is None else ExpertMeasurements.of(measured)

    def cut(mixture: Mixture) -> Plan:
        kept = _kept(mixture, known, keep, drop, method, seed)
        chosen_by = "drop" if keep is None else method
        arguments = {"method": chosen_by, **({"seed": seed} if chosen_by == "random" else {})}
        cut_layers = {mixture.layers[place].name: ids for place, ids in kept.items()}
        counts = {mixture.layers[place].name: mixture.layers[place].num_experts for place in kept}
        told = {**arguments, "kept": cut_layers, "num_experts": counts}
        return Plan({place: ExpertRows([[old] for old in ids]) for place, ids in kept.items()}, told)

    settings = (max_shard_size, resume, show_progress)
    return rewrite("pruned", cut, source, output, evaluation, revision, token, *settings)


def _kept(
    mixture: Mixture, measured: ExpertMeasurements | None, keep: Keep | None, drop: Any, method: str, seed: int
) -> dict[int, list[int]]:
    """The experts that stay in each layer that loses some, in their order."""
    layers = mixture.layers
    kept: dict[int, list[int]] = {}
    if drop is not None:
        by_layer = drop if isinstance(drop, Mapping) else dict.fromkeys(range(len(layers)), tuple(drop))
        for place, chosen in by_layer.items():
            layer, ids = layer_at(layers, place, "drop"), [*chosen]
            unknown = [e for e in ids if isinstance(e, bool) or e not in range(layer.num_experts)]
            if unknown:
                raise ValueError(
                    f"`drop` names expert {unknown[0]!r} of layer {place}, whose experts are 0 to "
                    f"{layer.num_experts - 1}."
                )
            kept[place] = [expert for expert in range(layer.num_experts) if expert not in ids]
    else:
        by_layer = keep if isinstance(keep, Mapping) else dict.fromkeys(range(len(layers)), keep)
        if measured is not None:
            measured.check_text(mixture.folder)
        counts = {
            place: count_of(layer_at(layers, place, "keep"), place, wanted) for place, wanted in by_layer.items()
        }
        for place, count in counts.items():
            layer = layers[place]
            _check_count(layer, place, count)
            found = None if measured is None else measured.check(layer, router_tensors(mixture, layer))
            if method == "naee":
                assert found is not None
                kept[place] = _least_changed(layer, place, found, count)
            else:
                kept[place] = _best(layer, _scores(layer, place, found, method, seed), count)
    for place, ids in kept.items():
        check_rest(layers[place], place, ids)
    return {place: ids for place, ids in kept.items() if len(ids) < layers[place].num_experts}


def layer_at(layers: list[MixtureLayer], place: Any, argument: str) -> MixtureLayer:
    if place not in range(len(layers)):
        raise ValueError(f"`{argument}` names layer {place!r}; the sparse layers are 0 to {len(layers) - 1}.")
    return layers[place]


def count_of(layer: MixtureLayer, place: int, wanted: Any, argument: str = "keep") -> int:
    """`keep` or `into` of one layer as a number of experts."""
    is_count = isinstance(wanted, Integral) and not isinstance(wanted, bool)
    is_share = isinstance(wanted, Real) and not isinstance(wanted, Integral) and 0 < float(wanted) <= 1
    if not is_share and not is_count:
        raise ValueError(
            f"`{argument}={wanted!r}` is not allowed: it must be a number of experts, or a share such as 0.75."
        )
    count = round(float(wanted) * layer.num_experts) if is_share else int(wanted)
    if not 1 <= count <= layer.num_experts:
        raise ValueError(f"`{argument}={wanted!r}` is not allowed: layer {place} has {layer.num_experts} experts.")
    return count


def _check_count(layer: MixtureLayer, place: int, count: int) -> None:
    groups, _ = router_groups(layer)
    if count % groups:
        raise ValueError(
            f"`keep` leaves layer {place} {count} experts, which its router's {groups} groups cannot share evenly. "
            f"Keep a multiple of {groups}."
        )


def _scores(layer: MixtureLayer, place: int, found: LayerMeasurements | None, method: str, seed: int) -> torch.Tensor:
    """`(E,)`."""
    if method == "random":
        return torch.rand(layer.num_experts, generator=torch.Generator().manual_seed(seed * 4096 + place))
    assert found is not None
    return found.score(method)


def _best(layer: MixtureLayer, scores_E: torch.Tensor, count: int) -> list[int]:
    """The `count` experts with the highest scores, as many of each group that the router chooses by."""
    groups, _ = router_groups(layer)
    best = scores_E.reshape(groups, -1).topk(count // groups, dim=-1).indices
    first = torch.arange(groups)[:, None] * (layer.num_experts // groups)
    return sorted((best + first).flatten().tolist())


def _least_changed(layer: MixtureLayer, place: int, found: LayerMeasurements, count: int) -> list[int]:
    """The subset of experts whose weighted outputs on the sampled tokens are closest to those of all experts."""
    groups, _ = router_groups(layer)
    size = layer.num_experts // groups
    of_group = [range(first, first + size) for first in range(0, layer.num_experts, size)]
    subsets = comb(size, count // groups) ** groups
    if "products" not in found.tensors or subsets > MOST_SUBSETS:
        raise ValueError(
            f'`method="naee"` would try {subsets:,} subsets of the {layer.num_experts} experts of layer {place}; it '
            f'tries at most {MOST_SUBSETS:,} of {MOST_PAIRED_EXPERTS} experts. Take `method="reap"`.'
        )
    if any(isinstance(module, SparseMoeExpertChoiceRouter) for module in layer.router.modules()):
        raise ValueError(f'`method="naee"` needs tokens that choose their experts; in layer {place} experts choose.')
    weights_SE, products_SEE = found.tensors["sampled_weights"], found.tensors["products"]

    def change(kept: list[int]) -> float:
        less_SE = weights_SE - _weights_among(layer, found, kept)
        return float(torch.einsum("si,sij,sj->", less_SE, products_SEE, less_SE))

    every = product(*(combinations(group, count // groups) for group in of_group))
    return min(([expert for part in parts for expert in part] for parts in every), key=change)


def _weights_among(layer: MixtureLayer, found: LayerMeasurements, kept: list[int]) -> torch.Tensor:
    """`(S, E)`: the weights that the router would give the sampled tokens' experts if there were only these."""
    logits_SE, weights_SE = found.tensors["logits"], found.tensors["sampled_weights"]

    def choose(kept: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        gone_E = torch.ones(layer.num_experts, dtype=torch.bool)
        gone_E[kept] = False
        scores_SE = router_scores(logits_SE.masked_fill(gone_E, -torch.inf), layer.scoring_func)
        values_SE = (scores_SE + found.tensors["selection_bias"]).masked_fill(gone_E, -torch.inf)
        groups, chosen = router_groups(layer)
        if chosen < groups:
            best = 2 if layer.scoring_func == "sigmoid" else 1
            values_SE = mask_lower_groups(values_SE, groups, chosen, best)
        index_SK = values_SE.topk(layer.top_k, dim=-1).indices
        return torch.zeros_like(scores_SE).scatter(1, index_SK, scores_SE.gather(1, index_SK)), index_SK

    # The router multiplies scores by one number, or by one that makes the weights of every token sum to another.
    whole_SE, index_SK = choose(list(range(layer.num_experts)))
    ratio_SK = weights_SE.gather(1, index_SK) / whole_SE.gather(1, index_SK).clamp(min=1e-20)
    weights = choose(kept)[0]
    if (ratio_SK - ratio_SK.mean()).abs().max() < 1e-3 * ratio_SK.abs().mean():
        return weights * ratio_SK.mean()
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20) * weights_SE.sum(dim=-1, keepdim=True)


def router_groups(layer: MixtureLayer) -> tuple[int, int]:
    """In how many groups the experts are, and how many of them a token chooses."""
    owners = [*layer.router.modules(), layer.block]
    found = [
        next((value for owner in owners for name in names if type(value := getattr(owner, name, None)) is int), 1)
        for names in (("n_group", "num_group"), ("topk_group",))
    ]
    return found[0], found[1]


def check_rest(layer: MixtureLayer, place: int, kept: list[int]) -> None:
    hashed = [name for name, tensor in layer.router.state_dict().items() if not tensor.is_floating_point()]
    if hashed or any(isinstance(module, SparseMoeHashRouter) for module in layer.router.modules()):
        raise ValueError(f"The experts of layer {place} cannot be cut: the token's id decides its experts.")
    if type(layer.experts).__name__ == "NllbMoeExperts":  # in transformers 5.23; they take the router's mask for ids
        raise ValueError(f"The experts of layer {place} cannot be cut: whatever is chosen, only 0 and 1 are called.")
    if layer.top_k > len(kept):
        raise ValueError(
            f"Layer {place} would have {len(kept)} experts, but {layer.top_k} serve each token. Keep more."
        )
    groups, chosen = router_groups(layer)
    size = layer.num_experts // groups
    left = [sum(expert // size == group for expert in kept) for group in range(groups)]
    if len(set(left)) > 1:
        raise ValueError(
            f"The {groups} groups of layer {place} would have {left} experts: its router needs as many in each. "
            "Leave out the same number of each group."
        )
    # Some routers compare groups by the sum of their best two.
    if groups > chosen and left[0] < min(2, size):
        raise ValueError(f"Each of the {groups} groups of layer {place} would have 1 expert. Keep at least 2 in each.")
    if layer.top_k > chosen * left[0]:
        raise ValueError(
            f"Layer {place} would have {left[0]} experts in each of the {chosen} groups that a token chooses, but "
            f"{layer.top_k} serve each token. Keep more."
        )
