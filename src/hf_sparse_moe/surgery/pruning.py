"""`prune_experts`: a mixture without some of its experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe.checkpoints.folder import check_target
from hf_sparse_moe.checkpoints.reader import NotStreamableError
from hf_sparse_moe.models.routers import SparseMoeHashRouter
from hf_sparse_moe.routing.mixture_layers import MixtureLayer
from hf_sparse_moe.upcycling.receipt import describe_source, versions

from .rewriting import (
    ExpertRows,
    Mixture,
    open_mixture,
    rewrite_in_memory,
    rewrite_on_disk,
    save_rewritten,
)


logger = logging.get_logger(__name__)

METHODS = ("random",)
Keep = int | float | Mapping[int, int | float]


def prune_experts(
    source: PreTrainedModel | str | Path,
    keep: Keep | None = None,
    drop: Mapping[int, Sequence[int]] | Sequence[int] | None = None,
    method: str = "random",
    output: str | Path | None = None,
    seed: int = 0,
    *,
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
        keep (`int`, `float` or `dict`, *optional*): How many experts of a layer stay, or which share of them, such as
            0.75; a `dict` says so for some layers, by their places from 0.
        drop (`dict` or `list[int]`, *optional*): Instead of `keep`, the experts to leave out, `{layer: [3, 7]}`, or
            the same of all layers.
        method (`str`, defaults to `"random"`): Which experts stay.
        output (`str` or `Path`, *optional*): A folder that does not exist yet, or is empty, to write the mixture to,
            tensor by tensor where `source` is a folder or Hub id: neither mixture is then in memory.
        seed (`int`, defaults to 0): Of `method="random"`.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights, with `output`.
        resume (`bool`, defaults to `False`): With `output`, continue an interrupted call from its finished shards.
        show_progress (`bool`, defaults to `False`): With `output`, a bar with rate and time left, on stderr.

    Returns:
        `PreTrainedModel`: The pruned model, in evaluation mode; with `output`, a [`SurgeryReport`].

    Raises:
        ValueError: not a mixture, hash routing, an unknown layer, expert or method, more experts a token than stay,
            groups of experts that lose different numbers, or numbers that the architecture cannot hold.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        pruned = prune_experts(model, drop={0: [3, 7]})
        ```
    """
    if output is not None:
        check_target(output)
    if (keep is None) == (drop is None):
        raise ValueError("Give either `keep`, how many experts stay, or `drop`, which ones go.")
    if method not in METHODS:
        raise ValueError(f"`method={method!r}` is not allowed: it must be one of {METHODS}.")

    def cut(mixture: Mixture) -> tuple[dict[int, ExpertRows], dict[str, Any]]:
        kept = _kept(mixture, keep, drop, method, seed)
        chosen_by = "drop" if keep is None else method
        arguments = {"method": chosen_by, **({"seed": seed} if chosen_by == "random" else {})}
        told = {**arguments, "kept": {mixture.layers[place].name: ids for place, ids in kept.items()}}
        return {place: ExpertRows([[old] for old in ids]) for place, ids in kept.items()}, told

    streams = output is not None and isinstance(source, str | Path)
    if streams:
        mixture = open_mixture(source, into_memory=False, revision=revision, token=token)
        rows, told = cut(mixture)
        try:
            return rewrite_on_disk(
                mixture,
                rows,
                output,  # type: ignore[arg-type]
                told,
                lambda new, sha256, _: _receipt(mixture, new, told, sha256),
                max_shard_size,
                resume,
                show_progress,
            )
        except NotStreamableError as reason:
            logger.warning(f"The mixture is pruned in memory, not streamed: {reason}.")
    mixture = open_mixture(source, into_memory=True, revision=revision, token=token)
    rows, told = cut(mixture)
    model: Any = rewrite_in_memory(mixture, rows)
    model.receipt = _receipt(mixture, model, told, None)
    return model if output is None else save_rewritten(model, mixture.source, output, max_shard_size)


def _receipt(
    mixture: Mixture, new: PreTrainedModel, told: dict[str, Any], sha256: dict[str, str] | None
) -> dict[str, Any]:
    old = mixture.model
    return {
        "pruned": {
            **told,
            "num_experts_per_tok": mixture.layers[0].top_k,
            "parameters": {"before": old.num_parameters(), "after": new.num_parameters()},
            "bytes": {"before": _bytes(old), "after": _bytes(new)},
            "source": describe_source(old, mixture.source, sha256),
            "versions": versions(),
            "from": mixture.receipt,
        }
    }


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _kept(mixture: Mixture, keep: Keep | None, drop: Any, method: str, seed: int) -> dict[int, list[int]]:
    """The experts that stay in each layer that loses some, in their order."""
    layers = mixture.layers
    kept: dict[int, list[int]] = {}
    if drop is not None:
        by_layer = drop if isinstance(drop, Mapping) else dict.fromkeys(range(len(layers)), drop)
        for place, ids in by_layer.items():
            layer = _layer(layers, place, "drop")
            unknown = [e for e in ids if isinstance(e, bool) or e not in range(layer.num_experts)]
            if unknown:
                raise ValueError(
                    f"`drop` names expert {unknown[0]!r} of layer {place}, whose experts are 0 to "
                    f"{layer.num_experts - 1}."
                )
            kept[place] = [expert for expert in range(layer.num_experts) if expert not in ids]
    else:
        by_layer = keep if isinstance(keep, Mapping) else dict.fromkeys(range(len(layers)), keep)
        counts = {place: _count(_layer(layers, place, "keep"), place, wanted) for place, wanted in by_layer.items()}
        kept = {place: _best(layers[place], place, count, seed) for place, count in counts.items()}
    for place, ids in kept.items():
        _check_rest(layers[place], place, ids)
    return {place: ids for place, ids in kept.items() if len(ids) < layers[place].num_experts}


def _layer(layers: list[MixtureLayer], place: Any, argument: str) -> MixtureLayer:
    if place not in range(len(layers)):
        raise ValueError(f"`{argument}` names layer {place!r}; the sparse layers are 0 to {len(layers) - 1}.")
    return layers[place]


def _count(layer: MixtureLayer, place: int, wanted: Any) -> int:
    """`keep` of one layer as a number of experts."""
    is_share = isinstance(wanted, float) and 0 < wanted <= 1
    if not is_share and (not isinstance(wanted, int) or isinstance(wanted, bool)):
        raise ValueError(f"`keep={wanted!r}` is not allowed: it must be a number of experts, or a share such as 0.75.")
    count = round(wanted * layer.num_experts) if is_share else wanted
    if not 1 <= count <= layer.num_experts:
        raise ValueError(f"`keep={wanted!r}` is not allowed: layer {place} has {layer.num_experts} experts.")
    return count


def _best(layer: MixtureLayer, place: int, count: int, seed: int) -> list[int]:
    """The `count` experts with the highest scores, as many of each group that the router chooses by."""
    generator = torch.Generator().manual_seed(seed * 4096 + place)
    scores_E = torch.rand(layer.num_experts, generator=generator)
    groups, _ = router_groups(layer)
    if count % groups:
        raise ValueError(
            f"`keep` leaves layer {place} {count} experts, which its router's {groups} groups cannot share evenly. "
            f"Keep a multiple of {groups}."
        )
    best = scores_E.reshape(groups, -1).topk(count // groups, dim=-1).indices
    first = torch.arange(groups)[:, None] * (layer.num_experts // groups)
    return sorted((best + first).flatten().tolist())


def router_groups(layer: MixtureLayer) -> tuple[int, int]:
    """In how many groups the experts are, and how many of them a token chooses."""
    owners = [*layer.router.modules(), layer.block]
    found = [
        next((value for owner in owners for name in names if type(value := getattr(owner, name, None)) is int), 1)
        for names in (("n_group", "num_group"), ("topk_group",))
    ]
    return found[0], found[1]


def _check_rest(layer: MixtureLayer, place: int, kept: list[int]) -> None:
    hashed = [name for name, tensor in layer.router.state_dict().items() if not tensor.is_floating_point()]
    if hashed or any(isinstance(module, SparseMoeHashRouter) for module in layer.router.modules()):
        raise ValueError(f"The experts of layer {place} cannot be cut: the token's id decides its experts.")
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
