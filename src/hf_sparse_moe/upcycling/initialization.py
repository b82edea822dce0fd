"""How the experts of one layer start from its dense feed-forward. E experts, I intermediate units, H hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.routers import ROUTER_INIT_STD

from .clustering import balanced_k_means


@dataclass
class FeedForwardWeights:
    """
    One feed-forward.

    Args:
        up (`torch.Tensor`): (2I, H) with the gate's rows first where gated, else (I, H).
        down (`torch.Tensor`): (H, I).
        up_bias, down_bias (`torch.Tensor`, *optional*): (2I,) or (I,), and (H,).
        gated (`bool`): Whether `up` holds gate and up.
    """

    up: torch.Tensor
    down: torch.Tensor
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    gated: bool

    @property
    def num_units(self) -> int:
        return self.down.shape[-1]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> FeedForwardWeights:
        """The same function of each tensor."""
        up_bias, down_bias = (None if bias is None else function(bias) for bias in (self.up_bias, self.down_bias))
        return FeedForwardWeights(function(self.up), function(self.down), up_bias, down_bias, self.gated)

    def take(self, units: torch.Tensor) -> FeedForwardWeights:
        """The feed-forward of these intermediate units alone, the whole second bias included."""
        rows = torch.cat([units, units + self.num_units]) if self.gated else units
        up_bias = None if self.up_bias is None else self.up_bias[rows]
        return FeedForwardWeights(self.up[rows], self.down[:, units], up_bias, self.down_bias, self.gated)

    def scale(self, weight: float, bias: float | None = None) -> FeedForwardWeights:
        """The output times `weight`; its bias times `bias`, where that is another."""
        bias = weight if bias is None else bias
        if weight == bias == 1.0:
            return self
        down_bias = None if self.down_bias is None else self.down_bias * bias
        return FeedForwardWeights(self.up, self.down * weight, self.up_bias, down_bias, self.gated)


@dataclass
class LayerStart:
    """
    What one sparse layer starts from.

    Args:
        experts (`Iterable[FeedForwardWeights]`): E of them; those that are drawn are drawn as they are asked for, so
            that a stream never holds a whole layer.
        router (`torch.Tensor`): (E, H).
        shared ([`FeedForwardWeights`], *optional*): The shared experts, as one feed-forward.
    """

    experts: Iterable[FeedForwardWeights]
    router: torch.Tensor
    shared: FeedForwardWeights | None = None


@dataclass
class LayerContext:
    """
    What a method may use besides the dense weights.

    Args:
        config ([`SparseMoeConfig`]): The mixture's config, the method's own changes included.
        generator (`torch.Generator`): The layer's own; the same seed draws the same bits.
        options (`dict`): The method's options.
        activations (`torch.Tensor`, *optional*): (tokens, I), measured on the data that the caller gave.
        branches (`list[FeedForwardWeights]`): The same layer of each branch, for `"branches"`.
        centroids (`torch.Tensor`, *optional*): (E, H), router rows measured on each branch's own text.
    """

    config: SparseMoeConfig
    generator: torch.Generator
    options: dict[str, Any]
    activations: torch.Tensor | None = None
    branches: list[FeedForwardWeights] = field(default_factory=list)
    centroids: torch.Tensor | None = None

    def random_router(self, rows: int, hidden: int) -> torch.Tensor:
        return torch.empty(rows, hidden).normal_(mean=0.0, std=ROUTER_INIT_STD, generator=self.generator)

    def normal_like(self, tensor: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        """Drawn in float32, so that the bits do not depend on the dtype of the checkpoint."""
        return torch.empty(tensor.shape).normal_(mean, std, generator=self.generator).to(tensor.dtype)


def output_scale(config: SparseMoeConfig) -> float:
    """
    What `down` is multiplied by so that equal experts together give one expert's output: 1 over the sum of a token's
    weights. With normalised weights that sum is `routed_scaling_factor`, always; without, it is that of an even
    router, so that the output is near, not equal (softmax k/E, sigmoid k/2).
    """
    if config.norm_topk_prob:
        return 1.0 / config.routed_scaling_factor
    even = 1 / config.num_experts if config.scoring_func == "softmax" else 0.5
    return 1.0 / (even * config.num_experts_per_tok * config.routed_scaling_factor)


def copy_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """Every expert is the dense feed-forward (sparse upcycling, arXiv 2212.05055)."""
    config = context.config
    router = context.random_router(config.num_experts, dense.down.shape[0])
    return LayerStart([dense.scale(output_scale(config))] * config.num_experts, router)


def noise_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """`copy`, and on each weight noise of `noise_std` times the root mean square of its dense matrix."""
    start = copy_experts(dense, context)
    relative = context.options["noise_std"]

    def shake(tensor: torch.Tensor) -> torch.Tensor:
        rms = tensor.float().square().mean().sqrt().item()
        return context.normal_like(tensor, 0.0, relative * rms).add_(tensor)

    return LayerStart((expert.map(shake) for expert in start.experts), start.router)


def drop_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    `copy`, then in each expert `drop_ratio` of the units are redrawn from a normal with the mean and deviation of the
    dense weights, the same units in gate, up and down (Drop-Upcycling, arXiv 2502.19261).
    """
    start = copy_experts(dense, context)
    return LayerStart(_redrawn(start.experts, context), start.router)


def _redrawn(copies: Iterable[FeedForwardWeights], context: LayerContext) -> Iterator[FeedForwardWeights]:
    for copied in copies:
        expert, units = copied.map(torch.clone), copied.num_units
        redrawn = torch.randperm(units, generator=context.generator)[: round(context.options["drop_ratio"] * units)]
        for part in range(2 if copied.gated else 1):
            rows = redrawn + part * units
            whole = slice(part * units, (part + 1) * units)
            _redraw(expert.up, (rows,), copied.up[whole], context)
            if expert.up_bias is not None and copied.up_bias is not None:
                _redraw(expert.up_bias, (rows,), copied.up_bias[whole], context)
        _redraw(expert.down, (slice(None), redrawn), copied.down, context)
        yield expert


def _redraw(target: torch.Tensor, index: tuple, source: torch.Tensor, context: LayerContext) -> None:
    std, mean = torch.std_mean(source.float())
    target[index] = context.normal_like(target[index], mean.item(), std.item())


def split_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    Fine-grained experts (arXiv 2410.07524). With granularity G the units are cut in G shards; each group of G experts
    holds every shard once, and its G router rows are equal (a virtual group), so that the top k picks whole groups.
    """
    config, granularity = context.config, context.options["granularity"]
    scale = output_scale(config)  # of the bias, which every shard holds whole
    shards = [
        dense.take(units).scale(granularity * scale, bias=scale)
        for units in torch.arange(dense.num_units).chunk(granularity)
    ]
    groups = config.num_experts // granularity
    router = context.random_router(groups, dense.down.shape[0]).repeat_interleave(granularity, dim=0)
    return LayerStart(shards * groups, router)


def partition_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    The units are divided among the experts, each to exactly one (LLaMA-MoE, arXiv 2406.16554); with `shared_units`,
    the most active ones serve every token as a shared expert. The routed output is multiplied by E / k, so that it is
    the dense one's in expectation, and the dense one's itself at k = E, where the router starts at zero.

    `partition`: `"contiguous"`, `"random"`, `"k_means"` (balanced, on the units' input weights) or `"activation"`
    (balanced k-means on which tokens of the given data a unit fires for, as in MoEfication, arXiv 2110.01786).
    """
    config, options = context.config, context.options
    experts, units = config.num_experts, torch.arange(dense.num_units)
    shared = None
    if options["shared_units"]:
        if context.activations is None:
            activity = dense.down.float().norm(dim=0)
        else:
            activity = context.activations.abs().mean(dim=0)
        order = activity.argsort(descending=True, stable=True)
        chosen, units = order[: options["shared_units"]].sort().values, order[options["shared_units"] :].sort().values
        shared = dense.take(chosen)
        shared.down_bias = None if shared.down_bias is None else torch.zeros_like(shared.down_bias)
    how = options["partition"]
    if how == "contiguous":
        groups = list(units.chunk(experts))
    elif how == "random":
        groups = list(units[torch.randperm(len(units), generator=context.generator)].chunk(experts))
    else:
        if how == "k_means":
            features = dense.up[units].float()
        elif context.activations is not None:
            features = context.activations[:, units].abs().T
        else:
            raise ValueError('`partition="activation"` needs `data`: batches of token ids to measure on.')
        features = torch.nn.functional.normalize(features, dim=-1)
        labels = balanced_k_means(features, experts, context.generator)
        groups = [units[labels == expert] for expert in range(experts)]
    scale = output_scale(config)
    parts = [dense.take(group.sort().values).scale(experts * scale, bias=scale) for group in groups]
    hidden = dense.down.shape[0]
    all_chosen = config.num_experts_per_tok == experts
    router = torch.zeros(experts, hidden) if all_chosen else context.random_router(experts, hidden)
    return LayerStart(parts, router, shared)


def graft_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """The dense feed-forward serves every token as a shared expert; the routed experts begin with a zero `down`."""
    config = context.config
    size = config.moe_intermediate_size or dense.num_units
    units = torch.arange(size)
    routed = dense.take(units).map(torch.zeros_like)
    std, mean = (value.item() for value in torch.std_mean(dense.up.float()))
    up_bias = None if dense.up_bias is None else dense.take(units).up_bias
    experts = (
        FeedForwardWeights(
            context.normal_like(routed.up, mean, std), routed.down, up_bias, routed.down_bias, dense.gated
        )
        for _ in range(config.num_experts)
    )
    return LayerStart(experts, context.random_router(config.num_experts, dense.down.shape[0]), dense)


def branch_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """Expert e is the feed-forward of dense checkpoint e (Branch-Train-MiX, arXiv 2403.07816)."""
    scale = output_scale(context.config)
    experts = [branch.scale(scale) for branch in context.branches]
    router = context.centroids
    if router is None:
        router = context.random_router(context.config.num_experts, dense.down.shape[0])
    return LayerStart(experts, router)


def _split_fields(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    granularity = options["granularity"]
    for name in ("num_experts", "num_experts_per_tok"):
        if fields[name] % granularity:
            raise ValueError(f"`{name}={fields[name]}` is not a multiple of `granularity={granularity}`.")
    if not fields.get("norm_topk_prob", True):
        raise ValueError('`norm_topk_prob=False` is not allowed with `method="split"`: groups share one weight.')
    return {"moe_intermediate_size": _share(units, granularity, "granularity")}


def _partition_fields(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    if options["partition"] not in PARTITIONS:
        raise ValueError(f"`partition={options['partition']!r}` is not allowed: it must be one of {PARTITIONS}.")
    if not fields.get("norm_topk_prob", True):
        raise ValueError('`norm_topk_prob=False` is not allowed with `method="partition"`.')
    shared = options["shared_units"]
    if not 0 <= shared < units:
        raise ValueError(f"`shared_units={shared}` is not allowed: it must be at least 0 and below {units}.")
    size = _share(units - shared, fields["num_experts"], "num_experts")
    if shared % size:
        raise ValueError(
            f"`shared_units={shared}` is no multiple of an expert's {size} units. Choose a multiple, or another "
            "`num_experts`."
        )
    return {"moe_intermediate_size": size, "num_shared_experts": shared // size}


def _graft_fields(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    size = fields.get("moe_intermediate_size") or units
    return {"moe_intermediate_size": size, "num_shared_experts": _share(units, size, "moe_intermediate_size")}


def _share(units: int, parts: int, name: str) -> int:
    if units % parts:
        raise ValueError(f"{units} intermediate units cannot be divided by `{name}={parts}`. Choose a divisor.")
    return units // parts


def _no_fields(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    size = fields.get("moe_intermediate_size")
    if size not in (None, units):
        raise ValueError(f"`moe_intermediate_size={size}` is not allowed: experts that start as copies have {units}.")
    return {}


PARTITIONS = ("contiguous", "random", "k_means", "activation")


@dataclass(frozen=True)
class InitializationMethod:
    """
    Args:
        start (`Callable`): A layer's dense weights and its context to a [`LayerStart`].
        fields (`Callable`): Config fields that the method decides, from the given ones, the units and the options.
        options (`dict`): Its options with their defaults.
        exact (`str`): When the mixture computes what the dense model computes, in words.
        is_exact (`Callable`): The same, asked of a mixture's config.
    """

    start: Callable[[FeedForwardWeights, LayerContext], LayerStart]
    exact: str
    is_exact: Callable[[SparseMoeConfig], bool]
    fields: Callable[[dict[str, Any], int, dict[str, Any]], dict[str, Any]] = _no_fields
    options: dict[str, Any] = field(default_factory=dict)


def _always(config: SparseMoeConfig) -> bool:
    return True


def _never(config: SparseMoeConfig) -> bool:
    return False


INITIALIZATION_METHODS = {
    "copy": InitializationMethod(copy_experts, "with normalised weights", lambda config: config.norm_topk_prob),
    "noise": InitializationMethod(noise_experts, "no, near", _never, options={"noise_std": 0.01}),
    "drop": InitializationMethod(drop_experts, "no", _never, options={"drop_ratio": 0.5}),
    "split": InitializationMethod(split_experts, "yes", _always, _split_fields, {"granularity": 2}),
    "partition": InitializationMethod(
        partition_experts,
        "only where every token uses all experts",
        lambda config: config.num_experts_per_tok == config.num_experts,
        _partition_fields,
        {"partition": "random", "shared_units": 0},
    ),
    "graft": InitializationMethod(graft_experts, "yes", _always, _graft_fields),
    "branches": InitializationMethod(
        branch_experts, "where all branches are equal", _never, options={"trunk": "average"}
    ),
}
