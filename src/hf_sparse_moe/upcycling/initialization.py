"""How the experts of one layer start from its dense feed-forward. E experts, I intermediate units, H hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.routers import ROUTER_INIT_STD

from .clustering import balanced_k_means
from .rows import Matrix, Rows, by_rows, mean_and_std, normal_rows, with_rows


@dataclass
class FeedForwardWeights:
    """
    One feed-forward. That of a dense model holds tensors; an expert may hold [`Rows`], which are made when written.

    Args:
        up (`torch.Tensor` or [`Rows`]): (2I, H) with the gate's rows first where gated, else (I, H).
        down (`torch.Tensor` or [`Rows`]): (H, I).
        up_bias, down_bias (`torch.Tensor` or [`Rows`], *optional*): (2I,) or (I,), and (H,).
        gated (`bool`): Whether `up` holds gate and up.
    """

    up: Any
    down: Any
    up_bias: Any
    down_bias: Any
    gated: bool

    @property
    def num_units(self) -> int:
        return self.down.shape[-1]

    @property
    def parts(self) -> int:
        """How many times `up` holds each unit."""
        return 2 if self.gated else 1

    @property
    def matrices(self) -> tuple[Any, Any, Any, Any]:
        return self.up, self.down, self.up_bias, self.down_bias

    def map(self, function: Callable[..., Matrix], *others: FeedForwardWeights) -> FeedForwardWeights:
        """The same function of each matrix, and of what the others have in its place."""
        made: dict[str, Any] = {
            name: function(matrix, *(getattr(other, name) for other in others))
            for name in ("up", "down", "up_bias", "down_bias")
            if (matrix := getattr(self, name)) is not None
        }
        return replace(self, **made)

    def take(self, units: torch.Tensor) -> FeedForwardWeights:
        """A dense model's feed-forward with these intermediate units alone, the whole second bias included."""
        index = torch.cat([units + part * self.num_units for part in range(self.parts)])
        up, down = self.up, self.down
        return FeedForwardWeights(
            Rows(torch.Size((len(index), up.shape[1])), up.dtype, lambda rows: up.index_select(0, index[rows])),
            Rows(torch.Size((len(down), len(units))), down.dtype, lambda rows: _columns(down[rows], units)),
            None if self.up_bias is None else self.up_bias[index],
            self.down_bias,
            self.gated,
        )

    def scale(self, weight: float, bias: float | None = None) -> FeedForwardWeights:
        """The output times `weight`; its bias times `bias`, where that is another."""
        bias = weight if bias is None else bias
        if weight == bias == 1.0:
            return self
        down = by_rows(lambda rows: rows * weight, self.down)
        down_bias = None if self.down_bias is None else self.down_bias * bias
        return replace(self, down=down, down_bias=down_bias)


def _columns(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """numpy takes columns four times as fast as torch, but knows no bfloat16."""
    bits = matrix.view(_INTEGERS[matrix.dtype.itemsize]).numpy()
    return torch.from_numpy(bits.take(columns.numpy(), axis=1)).view(matrix.dtype)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class LayerStart:
    """
    What one sparse layer starts from.

    Args:
        experts (`Iterable[FeedForwardWeights]`): E of them.
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

    def normal(self, shape: Sequence[int], dtype: torch.dtype, mean: float, std: float) -> Rows:
        """Normal numbers of a stream of their own."""
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        return normal_rows(torch.Size(shape), dtype, mean, std, seed)


def has_constant_weights(config: SparseMoeConfig) -> bool:
    """Whether the weights of every token's experts sum to `routed_scaling_factor`."""
    return config.router_type == "hash" or (config.router_type == "top_k" and config.norm_topk_prob)


def output_scale(config: SparseMoeConfig) -> float:
    """
    What `down` is multiplied by so that equal experts together give one expert's output: 1 over the sum of a token's
    weights. With normalised weights that sum is `routed_scaling_factor`, always; without, or where the experts choose
    their tokens, it is that of an even router, so that the output is near, not equal (softmax k/E, sigmoid k/2).
    """
    if has_constant_weights(config):
        return 1.0 / config.routed_scaling_factor
    even = 0.5 if config.scoring_func == "sigmoid" else 1 / config.num_experts
    return 1.0 / (even * config.mean_experts_per_token * config.routed_scaling_factor)


def copy_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """Every expert is the dense feed-forward (sparse upcycling, arXiv 2212.05055)."""
    config = context.config
    router = context.random_router(config.num_experts, dense.down.shape[0])
    return LayerStart([dense.scale(output_scale(config))] * config.num_experts, router)


def noise_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """`copy`, and on each weight noise of `noise_std` times the root mean square of its dense matrix."""
    config, copied = context.config, dense.scale(output_scale(context.config))
    std = copied.map(lambda matrix: torch.tensor(context.options["noise_std"] * _root_mean_square(matrix)))

    def shake(matrix: Matrix, std: torch.Tensor) -> Rows:
        return by_rows(torch.add, matrix, context.normal(matrix.shape, matrix.dtype, 0.0, std.item()))

    experts = (copied.map(shake, std) for _ in range(config.num_experts))
    return LayerStart(experts, context.random_router(config.num_experts, dense.down.shape[0]))


def _root_mean_square(matrix: Matrix) -> float:
    mean, std = mean_and_std(matrix)
    return (mean**2 + std**2) ** 0.5


def drop_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    `copy`, then in each expert `drop_ratio` of the units are redrawn from a normal with the mean and deviation of the
    dense weights, the same units in gate, up and down (Drop-Upcycling, arXiv 2502.19261).
    """
    config, copied = context.config, dense.scale(output_scale(context.config))
    units, count = dense.num_units, round(context.options["drop_ratio"] * dense.num_units)
    of_up, of_up_bias, of_down = (
        _moments(dense.up, dense.parts),
        _moments(dense.up_bias, dense.parts),
        _moments(copied.down),
    )

    def drop() -> FeedForwardWeights:
        redrawn = torch.randperm(units, generator=context.generator)[:count].sort().values

        def redraw_rows(matrix: Any, moments: list[tuple[float, float]]) -> Any:
            for part, of_part in enumerate(moments):
                fresh = context.normal((count, *matrix.shape[1:]), matrix.dtype, *of_part)
                matrix = with_rows(matrix, redrawn + part * units, fresh)
            return matrix

        fresh = context.normal((len(dense.down), count), dense.down.dtype, *of_down[0])
        down = by_rows(lambda old, new: old.index_copy(1, redrawn, new), copied.down, fresh)
        up, up_bias = redraw_rows(dense.up, of_up), redraw_rows(dense.up_bias, of_up_bias)
        return replace(copied, up=up, down=down, up_bias=up_bias)

    experts = (drop() for _ in range(config.num_experts))
    return LayerStart(experts, context.random_router(config.num_experts, dense.down.shape[0]))


def _moments(matrix: Any, parts: int = 1) -> list[tuple[float, float]]:
    """Mean and deviation of the gate and of the up projection, where there are both."""
    if matrix is None:
        return []
    return [mean_and_std(part) for part in (matrix.chunk(parts) if parts > 1 else [matrix])]


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
    routed, moments = dense.take(units), mean_and_std(dense.up)
    down = torch.zeros((), dtype=dense.down.dtype).expand(routed.down.shape)
    down_bias = None if dense.down_bias is None else torch.zeros_like(dense.down_bias)
    experts = (
        replace(routed, up=context.normal(routed.up.shape, routed.up.dtype, *moments), down=down, down_bias=down_bias)
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


def _require_no_shared_experts(fields: dict[str, Any], method: str) -> None:
    if fields.get("num_shared_experts", 0):
        raise ValueError(
            f"`num_shared_experts={fields['num_shared_experts']}` is not allowed with `method` {method}, which makes "
            'none. Use "graft", or "partition" with `shared_units`.'
        )


def _require_top_k(fields: dict[str, Any], method: str) -> None:
    router = fields.get("router_type", "top_k")
    if router != "top_k":
        raise ValueError(
            f"`router_type={router!r}` is not allowed with `method={method!r}`, whose experts are parts of the dense "
            'feed-forward that only a token\'s best ones make whole. Use "top_k".'
        )


def _split_fields(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    granularity = options["granularity"]
    _require_top_k(fields, "split")
    _require_no_shared_experts(fields, "split")
    for name in ("num_experts", "num_experts_per_tok"):
        if fields[name] % granularity:
            raise ValueError(f"`{name}={fields[name]}` is not a multiple of `granularity={granularity}`.")
    if fields["num_experts"] // fields.get("n_group", 1) % granularity:
        raise ValueError(f"`n_group={fields['n_group']}` cuts through groups of `granularity={granularity}` experts.")
    if not fields.get("norm_topk_prob", True):
        raise ValueError('`norm_topk_prob=False` is not allowed with `method="split"`: groups share one weight.')
    return {"moe_intermediate_size": _share(units, granularity, "granularity")}


def _partition_fields(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    _require_top_k(fields, "partition")
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
            f"`shared_units={shared}` is not a multiple of an expert's {size} units. Choose a multiple, or another "
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
    _require_no_shared_experts(fields, "copy, noise, drop or branches")
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
    "copy": InitializationMethod(copy_experts, "with normalised weights", has_constant_weights),
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
