"""How the experts of one layer start from its dense feed-forward. E experts, I intermediate units, H hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.routers import ROUTER_INIT_STD

from .rows import Rows, by_rows, mean_and_std, normal_rows, with_rows


@dataclass
class FeedForwardWeights:
    """One feed-forward. That of a dense model holds tensors; an expert may hold [`Rows`], made when written."""

    up: Any  # (2I, H) with the gate's rows first where gated, else (I, H)
    down: Any  # (H, I)
    up_bias: Any  # (2I,) or (I,), or None
    down_bias: Any  # (H,), or None
    gated: bool
    degree: int = 0  # the output grows with this power of a factor on the units' own rows of `up`; 0 where it does not

    @property
    def parts(self) -> int:
        """How many times `up` holds each unit."""
        return 2 if self.gated else 1

    @property
    def matrices(self) -> dict[str, Any]:
        """Those that there are, by their names."""
        found = {"up": self.up, "down": self.down, "up_bias": self.up_bias, "down_bias": self.down_bias}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    def take(self, units: torch.Tensor) -> FeedForwardWeights:
        """A dense model's feed-forward with these intermediate units alone, the whole second bias included."""
        index = torch.cat([units + part * self.down.shape[1] for part in range(self.parts)])
        up, down = self.up, self.down
        return replace(
            self,
            up=Rows(torch.Size((len(index), up.shape[1])), up.dtype, lambda rows: up.index_select(0, index[rows])),
            down=Rows(torch.Size((len(down), len(units))), down.dtype, lambda rows: _columns(down[rows], units)),
            up_bias=None if self.up_bias is None else self.up_bias[index],
        )

    def scale(self, weight: float, bias: float, evenly: bool = False) -> FeedForwardWeights:
        """
        The output times `weight`, its bias times `bias`; `evenly` where `up` takes as much of the weight as `down`, as
        far as its `degree` lets it, so that neither outgrows its learning rate (arXiv 2410.07524).
        """
        if weight == bias == 1.0:
            return self
        share = weight ** (1 / (1 + self.degree)) if evenly else weight
        made: dict[str, Any] = {"down": by_rows(lambda rows: rows * share, self.down)}
        if self.down_bias is not None:
            made["down_bias"] = self.down_bias * bias
        if evenly and self.degree:
            factors = torch.ones(self.up.shape[0])
            factors[-self.down.shape[1] :] = share  # the gate's rows, which come first, stay
            made["up"] = by_rows(lambda rows, by: rows * by[:, None], self.up, factors)
            if self.up_bias is not None:
                made["up_bias"] = (self.up_bias * factors).to(self.up_bias.dtype)
        return replace(self, **made)


def _columns(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """numpy takes columns four times as fast as torch, but knows no bfloat16."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.dtype.itemsize]
    return torch.from_numpy(matrix.view(integers).numpy().take(columns.numpy(), axis=1)).view(matrix.dtype)


@dataclass
class LayerStart:
    """What one sparse layer starts from."""

    experts: Iterable[FeedForwardWeights]  # E of them
    router: torch.Tensor  # (E, H)
    shared: FeedForwardWeights | None = None  # the shared experts, as one feed-forward


@dataclass
class LayerContext:
    """What a method may use besides the dense weights."""

    config: SparseMoeConfig  # the mixture's, the method's own changes included
    side: str  # "encoder" or "decoder"
    generator: torch.Generator  # the layer's own; the same seed draws the same bits
    options: dict[str, Any]
    activations: torch.Tensor | None = None  # (tokens, I), measured on the data that the caller gave
    branches: list[FeedForwardWeights] = field(default_factory=list)  # the same layer of each, for "branches"
    centroids: torch.Tensor | None = None  # (E, H), router rows measured on each branch's own text

    def random_router(self, dense: FeedForwardWeights, rows: int | None = None) -> torch.Tensor:
        shape = (self.config.num_experts if rows is None else rows, dense.down.shape[0])
        return torch.empty(shape).normal_(mean=0.0, std=ROUTER_INIT_STD, generator=self.generator)

    def normal(self, shape: Sequence[int], dtype: torch.dtype, mean: float, std: float) -> Rows:
        """Normal numbers of a stream of their own."""
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        return normal_rows(torch.Size(shape), dtype, mean, std, seed)


def has_constant_weights(config: SparseMoeConfig, side: str = "encoder") -> bool:
    """Whether the weights of every token's experts sum to `routed_scaling_factor`, on a side of an encoder-decoder."""
    if config.router_type != "top_k" and (config.router_type == "hash" or side == "encoder"):
        return config.router_type == "hash"
    takes_all = config.num_experts_per_tok == config.num_experts and config.scoring_func != "sigmoid"
    return bool(config.norm_topk_prob or takes_all)


def as_expert(
    part: FeedForwardWeights, context: LayerContext, parts: int = 1, evenly: bool = True
) -> FeedForwardWeights:
    """
    One of `parts` of a dense feed-forward, with `down` (and `up`, where `evenly`) scaled so that a token's experts
    together give what it gives.
    """
    scale, unsteady = expert_scale(context.config, context.side)  # of the bias, which every part holds whole
    return part.scale(parts * scale, bias=scale, evenly=evenly and unsteady)


def expert_scale(config: SparseMoeConfig, side: str) -> tuple[float, bool]:
    """
    1 over the sum of the weights of a token's experts, and whether that is a guess. With normalised weights the sum is
    `routed_scaling_factor`, always; without, or where experts choose their tokens, it is that of an even router, so
    that the output is near, not equal (softmax k/E, sigmoid k/2).
    """
    constant = has_constant_weights(config, side)
    count = config.mean_experts_per_token if side == "encoder" else config.num_experts_per_tok
    even = 1.0 if constant else count * (0.5 if config.scoring_func == "sigmoid" else 1 / config.num_experts)
    return 1.0 / (even * config.routed_scaling_factor), not constant


def whole_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    Every expert is a dense feed-forward: that of the model (sparse upcycling, arXiv 2212.05055), or expert e that of
    branch e (Branch-Train-MiX, arXiv 2403.07816).

    With granularity G (arXiv 2410.07524) the units are cut in G shards: each group of G experts holds every shard of
    its feed-forward once, and has G equal router rows (a virtual group), so that the top k picks whole groups.
    """
    config, granularity = context.config, context.options.get("granularity", 1)
    units = torch.arange(dense.down.shape[1]).chunk(granularity)
    experts = [
        as_expert(each if granularity == 1 else each.take(part), context, granularity)
        for each in context.branches or [dense]
        for part in units
    ]
    groups, rows = config.num_experts // granularity, context.centroids
    rows = context.random_router(dense, groups) if rows is None else rows
    return LayerStart(experts * (config.num_experts // len(experts)), rows.repeat_interleave(granularity, dim=0))


def noise_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """`copy`, and on each weight noise of `noise_std` times the root mean square of its dense matrix."""
    copied = as_expert(dense, context)
    stds = {
        name: context.options["noise_std"] * (mean**2 + std**2) ** 0.5
        for name, matrix in copied.matrices.items()
        for mean, std in [mean_and_std(matrix)]
    }

    def shake() -> FeedForwardWeights:
        noisy: dict[str, Any] = {
            name: by_rows(torch.add, matrix, context.normal(matrix.shape, matrix.dtype, 0.0, stds[name]))
            for name, matrix in copied.matrices.items()
        }
        return replace(copied, **noisy)

    experts = (shake() for _ in range(context.config.num_experts))
    return LayerStart(experts, context.random_router(dense))


def drop_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    `copy`, then in each expert `drop_ratio` of the units are redrawn from a normal with the mean and deviation of the
    dense weights, the same units in gate, up and down (Drop-Upcycling, arXiv 2502.19261).
    """
    copied, units = as_expert(dense, context, evenly=False), dense.down.shape[1]
    count = round(context.options["drop_ratio"] * units)
    of_down = mean_and_std(copied.down)
    of_ups = {  # of the gate and of the up projection, where there are both
        name: [mean_and_std(part) for part in matrix.chunk(dense.parts)]
        for name, matrix in dense.matrices.items()
        if name in ("up", "up_bias")
    }

    def drop() -> FeedForwardWeights:
        redrawn = torch.randperm(units, generator=context.generator)[:count].sort().values
        fresh = context.normal((len(dense.down), count), dense.down.dtype, *of_down)
        made: dict[str, Any] = {"down": by_rows(lambda old, new: old.index_copy(1, redrawn, new), copied.down, fresh)}
        for name, moments in of_ups.items():
            made[name] = dense.matrices[name]
            for part, of_part in enumerate(moments):
                fresh = context.normal((count, *made[name].shape[1:]), made[name].dtype, *of_part)
                made[name] = with_rows(made[name], redrawn + part * units, fresh)
        return replace(copied, **made)

    experts = (drop() for _ in range(context.config.num_experts))
    return LayerStart(experts, context.random_router(dense))


def partition_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    The units are divided among the experts, each to exactly one (LLaMA-MoE, arXiv 2406.16554); with `shared_units`,
    the most active ones serve every token as a shared expert. The routed output is multiplied by E / k, so that it is
    the dense one's in expectation, and the dense one's itself at k = E, where the router starts at zero.

    `partition`: `"contiguous"`, `"random"`, `"k_means"` (balanced, on the units' input weights) or `"activation"`
    (balanced k-means on which tokens of the given data a unit fires for, as in MoEfication, arXiv 2110.01786).
    """
    experts, how, activations = context.config.num_experts, context.options["partition"], context.activations
    if how == "activation" and activations is None:
        raise ValueError('`partition="activation"` needs `data`: batches of token ids to measure on.')
    units, shared = torch.arange(dense.down.shape[1]), None
    if count := context.options["shared_units"]:
        activity = dense.down.float().norm(dim=0) if activations is None else activations.abs().mean(dim=0)
        order = activity.argsort(descending=True, stable=True)
        shared, units = dense.take(order[:count].sort().values), order[count:].sort().values
        shared.down_bias = None if shared.down_bias is None else torch.zeros_like(shared.down_bias)
    if how == "contiguous":
        groups = list(units.chunk(experts))
    elif how == "random":
        groups = list(units[torch.randperm(len(units), generator=context.generator)].chunk(experts))
    else:
        features = (
            dense.up[units].float() if activations is None or how == "k_means" else activations[:, units].abs().T
        )
        features = torch.nn.functional.normalize(features, dim=-1)
        labels = balanced_k_means(features, experts, context.generator)
        groups = [units[labels == expert] for expert in range(experts)]
    parts = [as_expert(dense.take(group.sort().values), context, experts) for group in groups]
    if context.config.num_experts_per_tok == experts:
        return LayerStart(parts, torch.zeros(experts, dense.down.shape[0]), shared)
    return LayerStart(parts, context.random_router(dense), shared)


def balanced_k_means(
    features: torch.Tensor, num_clusters: int, generator: torch.Generator, iterations: int = 10
) -> torch.Tensor:
    """
    Assign each of the `features` (points, features) to one of `num_clusters` clusters of exactly equal size: Lloyd's
    iterations, whose assignment takes (point, cluster) pairs by rising distance while the cluster has room.

    Returns:
        `torch.LongTensor` of shape `(points,)`: cluster numbers.
    """
    points = len(features)
    centres = features[torch.randperm(points, generator=generator)[:num_clusters]]
    labels = torch.full((points,), -1)
    for _ in range(iterations):
        assigned, room = [-1] * points, [points // num_clusters] * num_clusters
        for pair in torch.cdist(features, centres).flatten().argsort(stable=True).tolist():
            point, cluster = divmod(pair, num_clusters)
            if assigned[point] < 0 and room[cluster]:
                assigned[point] = cluster
                room[cluster] -= 1
        if assigned == labels.tolist():
            break
        labels = torch.tensor(assigned)
        centres = torch.stack([features[labels == cluster].mean(dim=0) for cluster in range(num_clusters)])
    return labels


def graft_experts(dense: FeedForwardWeights, context: LayerContext) -> LayerStart:
    """
    The dense feed-forward serves every token as a shared expert; the routed experts begin with a zero `down`. With a
    `rank` they have that many units each, low-rank adapters beside it (as in arXiv 2309.05444, here not linear).
    """
    units = dense.down.shape[1]
    routed = dense.take(torch.arange(context.config.moe_intermediate_size or units))
    moments = mean_and_std(dense.up)
    routed.down = torch.zeros((), dtype=dense.down.dtype).expand(routed.down.shape)
    routed.down_bias = None if dense.down_bias is None else torch.zeros_like(dense.down_bias)
    experts = (
        replace(routed, up=context.normal(routed.up.shape, routed.up.dtype, *moments))
        for _ in range(context.config.num_experts)
    )
    return LayerStart(experts, context.random_router(dense), dense)


def _whole_sizes(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    granularity, groups = options.get("granularity", 1), fields.get("n_group", 1)
    for name in ("num_experts", "num_experts_per_tok"):
        if fields.get(name, granularity) % granularity:
            raise ValueError(f"`{name}={fields[name]}` is not a multiple of `granularity={granularity}`.")
    if groups > 1 and fields["num_experts"] // groups % granularity:
        raise ValueError(f"`n_group={groups}` cuts through groups of `granularity={granularity}` experts.")
    size = _share(units, granularity, "granularity")
    if fields.get("moe_intermediate_size") not in (None, size):
        given = fields["moe_intermediate_size"]
        raise ValueError(f"`moe_intermediate_size={given}` is not allowed: experts of this method have {size}.")
    return {} if granularity == 1 else {"moe_intermediate_size": size}


def _partition_sizes(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    shared = options["shared_units"]
    if shared >= units:
        raise ValueError(f"`shared_units={shared}` is not allowed: it must be below the {units} units of a layer.")
    size = _share(units - shared, fields["num_experts"], "num_experts")
    if shared % size:
        raise ValueError(
            f"`shared_units={shared}` is not a multiple of an expert's {size} units. Choose a multiple, or another "
            "`num_experts`."
        )
    return {"moe_intermediate_size": size, "num_shared_experts": shared // size}


def _graft_sizes(fields: dict[str, Any], units: int, options: dict[str, Any]) -> dict[str, Any]:
    rank, given = options["rank"], fields.get("moe_intermediate_size")
    if rank and given not in (None, rank):
        raise ValueError(f"`moe_intermediate_size={given}` and `rank={rank}` exclude each other. Give one.")
    size, name = rank or given or units, "rank" if rank else "moe_intermediate_size"
    return {"moe_intermediate_size": size, "num_shared_experts": _share(units, size, name)}


def _share(units: int, parts: int, name: str) -> int:
    if units % parts:
        divisors = [number for number in range(1, units + 1) if units % number == 0]
        raise ValueError(
            f"{units} intermediate units cannot be divided by `{name}={parts}`. Choose one of {divisors}."
        )
    return units // parts


@dataclass(frozen=True)
class InitializationMethod:
    """How experts start; `options` has by name the default and what else is allowed: words, or least and most."""

    start: Callable[[FeedForwardWeights, LayerContext], LayerStart]
    exact: str  # when the mixture computes what the dense model computes
    is_exact: Callable[[SparseMoeConfig], bool]  # the same, asked of a mixture's config
    # the config fields that the method decides, from the given ones, the dense units and the options
    sizes: Callable[[dict[str, Any], int, dict[str, Any]], dict[str, Any]] = _whole_sizes
    options: dict[str, tuple] = field(default_factory=dict)
    makes_shared_experts: bool = False


NORMALISED = "with normalised weights"
INITIALIZATION_METHODS = {
    "copy": InitializationMethod(whole_experts, NORMALISED, has_constant_weights),
    "noise": InitializationMethod(noise_experts, "no, near", lambda config: False, options={"noise_std": (0.01, 0)}),
    "drop": InitializationMethod(drop_experts, "no", lambda config: False, options={"drop_ratio": (0.5, 0, 1)}),
    "split": InitializationMethod(whole_experts, NORMALISED, has_constant_weights, options={"granularity": (2, 1)}),
    "partition": InitializationMethod(
        partition_experts,
        "only where every token uses all experts",
        lambda config: config.num_experts_per_tok == config.num_experts,
        _partition_sizes,
        {"partition": ("random", "contiguous", "k_means", "activation"), "shared_units": (0, 0)},
        makes_shared_experts=True,
    ),
    "graft": InitializationMethod(
        graft_experts, "yes", lambda config: True, _graft_sizes, {"rank": (0, 0)}, makes_shared_experts=True
    ),
    "branches": InitializationMethod(
        whole_experts,
        "where all branches are equal",
        lambda config: False,
        options={"trunk": ("average", "base"), "granularity": (1, 1)},
    ),
}
