"""`expand`: a mixture with more experts, or with another number of them a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_sparse_moe.insight.losses import Evaluation
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.routers import router_scores
from hf_sparse_moe.routing.mixture_layers import MixtureLayer
from hf_sparse_moe.upcycling.recipe import check_argument

from .expert_axes import ExpertRows
from .measurements import ExpertMeasurements, LayerMeasurements
from .mixture import Mixture, router_tensors
from .rewriting import Plan, rewrite


_BIAS = "gate.e_score_correction_bias"


def expand(
    source: PreTrainedModel | str | Path,
    factor: int,
    seed: int = 0,
    router_noise: float = 0.01,
    by: ExpertMeasurements | str | Path | None = None,
    num_experts_per_tok: int | None = None,
    output: str | Path | None = None,
    *,
    evaluation: Evaluation | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
) -> Any:
    """
    Repeat every expert and router row `factor` times, and let a token use `factor` times as many.

    With `router_noise=0` the mixture computes what it computed. Without noise the copies of an expert would be chosen
    together and learn the same forever.

    With `by` the experts that carry more are copied more often, and a token uses as many as before. With sigmoid
    scores the copies sleep: their selection bias is so low that none is chosen, so that the mixture computes what it
    computed, until [`SelectionBiasCallback`] or [`fix_balance`] raises it. Softmax routers have no such bias: there
    the copies are chosen at once and push out a token's last experts, which changes what the mixture computes.

    `num_experts_per_tok` sets how many experts serve a token, also without copies (`factor=1`). The weights of a
    token sum to what they summed to: where they are not normalised, `routed_scaling_factor` keeps their mean on the
    text of `by`.

    Args:
        source ([`SparseMoePreTrainedModel`], `str` or `Path`): A mixture of this package, which is left as it is, or
            the folder or Hub id of one.
        factor (`int`): At least 2, or 1 with `num_experts_per_tok`.
        seed (`int`, defaults to 0): Of the noise.
        router_noise (`float`, defaults to 0.01): Deviation of the noise on the copies' router rows, relative to the
            root mean square of the rows.
        by ([`ExpertMeasurements`], `str` or `Path`, *optional*): What [`measure_experts`] found, or its file. An
            expert carries the sum over its tokens of weight times norm of its output.
        num_experts_per_tok (`int`, *optional*): Experts that serve a token.
        output (`str` or `Path`, *optional*): A folder that does not exist yet, or is empty, to write the mixture to,
            tensor by tensor where `source` is a folder or Hub id: neither mixture is then in memory.
        evaluation (`tuple`, *optional*): Batches and the group of each of their sequences, as for [`measure_experts`],
            on which the receipt tells the loss before and after. Both models are loaded for it.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights, with `output`.
        resume (`bool`, defaults to `False`): With `output`, continue an interrupted call from its finished shards.
        show_progress (`bool`, defaults to `False`): With `output`, a bar with rate and time left, on stderr.

    Returns:
        [`SparseMoePreTrainedModel`] in evaluation mode; with `output`, a [`SurgeryReport`].

    Raises:
        ValueError: not a mixture of this package, one with adapters, another `factor`, more experts a token than there
            are, hash routing with copies, `by` of another model or with groups of experts, or weights that are not
            normalised with another number of experts a token and no `by`.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        larger = expand(model, 2, by=measure_experts(model, batches))
        cheaper = expand(model, 1, num_experts_per_tok=1)
        ```
    """
    check_argument("factor", factor, 2, 2 if num_experts_per_tok is None else 1)
    check_argument("seed", seed, 0, -(2**63), 2**64 - 1)
    check_argument("router_noise", router_noise, 0.0, 0)
    if num_experts_per_tok is not None:
        check_argument("num_experts_per_tok", num_experts_per_tok, 2, 1)
    known = None if by is None else ExpertMeasurements.of(by)

    def grow(mixture: Mixture) -> Plan:
        config = mixture.model.config
        if not isinstance(config, SparseMoeConfig):
            raise ValueError(f"`{mixture.name}` is not a mixture of this package. `import_stock` makes one of it.")
        _check(config, factor, known, num_experts_per_tok)
        layers = mixture.layers
        measured = None
        if known is not None:
            known.check_text(mixture.folder)
            measured = [known.check(each, router_tensors(mixture, each)) for each in layers]
        sleeping = measured is not None and config.scoring_func == "sigmoid"
        as_before = config.num_experts_per_tok * (factor if measured is None else 1)
        top_k = num_experts_per_tok or as_before
        for place, layer in enumerate(layers):
            awake = layer.num_experts * (1 if sleeping else factor) * config.topk_group // config.n_group
            if top_k > awake:
                raise ValueError(
                    f"`num_experts_per_tok={top_k}` is not allowed: a token of layer {place} has {awake} experts to "
                    "choose from."
                )
        copied = [[*range(layer.num_experts)] * (factor - 1) for layer in layers]
        if measured is not None:
            copied = [_by_need(each, len(copies)) for each, copies in zip(measured, copied, strict=True)]
        same_weights = top_k == as_before and (measured is None or sleeping)
        fields: dict[str, Any] = {"num_experts_per_tok": top_k}
        if config.n_group > 1:
            fields |= {"n_group": config.n_group * factor, "topk_group": config.topk_group * factor}
        if not config.norm_topk_prob and config.router_type != "hash":
            ratio = 1 / factor if config.scoring_func == "sigmoid" and not sleeping else 1.0
            ratio = ratio if same_weights else _sum_before(layers, measured, copied, top_k, sleeping)
            fields["routed_scaling_factor"] = config.routed_scaling_factor * ratio
        exact = same_weights and (sleeping or factor == 1 or router_noise == 0)
        told = {"factor": factor, "seed": seed, "router_noise": router_noise, "exact": exact, **fields}
        told["copied"] = {layer.name: copies for layer, copies in zip(layers, copied, strict=True)}
        noise = (seed, router_noise, sleeping)
        rows = {place: _with_copies(layer, place, copied[place], *noise) for place, layer in enumerate(layers)}
        return Plan(rows if factor > 1 else {}, told, fields)

    settings = (max_shard_size, resume, show_progress)
    return rewrite("expanded", grow, source, output, evaluation, revision, token, *settings)


def _check(config: SparseMoeConfig, factor: int, by: Any, top_k: int | None) -> None:
    if config.router_type == "hash" and (factor > 1 or by is not None):
        raise ValueError('`router_type="hash"` gives the ids to other experts when their number changes.')
    if config.router_type == "expert_choice" and (by is not None or top_k is not None):
        raise ValueError(
            '`by` and `num_experts_per_tok` need tokens that choose their experts; with `router_type="expert_choice"` '
            "experts choose. Set `capacity_factor` in the config."
        )
    if by is not None and config.n_group > 1:
        raise ValueError(f"`by` needs one group of experts, and there are {config.n_group}: leave it out.")


def _by_need(measured: LayerMeasurements, count: int) -> list[int]:
    """`count` copies, one after the other of the expert whose copies carry the most each."""
    carried = (measured.reap * measured.tokens).tolist()
    held = [1] * len(carried)
    for _ in range(count):
        most = max(range(len(carried)), key=lambda expert: carried[expert] / held[expert])
        held[most] += 1
    return [expert for expert, copies in enumerate(held) for _ in range(copies - 1)]


def _sum_before(
    layers: list[MixtureLayer],
    measured: list[LayerMeasurements] | None,
    copied: list[list[int]],
    top_k: int,
    sleeping: bool,
) -> float:
    """What the weights of the sampled tokens summed to, divided by what they sum to now."""
    if measured is None:
        raise ValueError(
            "The weights of a token are not normalised, so that another number of experts changes their sum. Pass "
            "`by`, what `measure_experts` finds on some text, to scale them by."
        )

    def total(layer: MixtureLayer, found: LayerMeasurements, experts: list[int], count: int) -> float:
        scores_SE = router_scores(found.tensors["logits"][:, experts], layer.scoring_func)
        index_SK = (scores_SE + found.tensors["selection_bias"][experts]).topk(count, dim=-1).indices
        return scores_SE.gather(1, index_SK).sum().item()

    before, after = 0.0, 0.0
    for layer, found, copies in zip(layers, measured, copied, strict=True):
        old = [*range(layer.num_experts)]
        before += total(layer, found, old, layer.top_k)
        after += total(layer, found, old if sleeping else old + copies, top_k)
    return before / after


def _with_copies(
    layer: MixtureLayer, place: int, copied: list[int], seed: int, router_noise: float, sleeping: bool
) -> ExpertRows:
    """All experts and then the copies, with noise on their router rows."""
    count = layer.num_experts

    def finish(name: str, copies: torch.Tensor) -> torch.Tensor:
        if name == "gate.weight" and router_noise:
            drawn = np.random.SeedSequence((seed % 2**64, place)).generate_state(1)  # torch heeds 32 bits
            generator = torch.Generator().manual_seed(int(drawn[0]))
            std = router_noise * copies[:count].float().square().mean().sqrt()
            noise = torch.randn(copies[count:].shape, generator=generator).to(copies.device)
            copies[count:] += (std * noise).to(copies.dtype)
        if name == _BIAS and sleeping:
            copies[count:] = copies[:count].min() - 1  # scores are below 1
        return copies

    return ExpertRows([[expert] for expert in (*range(count), *copied)], finish=finish)
