"""
Memory of a rank, bytes that collectives move in one optimizer step, and the time that both take.

Sources: data parallelism and its three stages of sharding, ZeRO (arXiv 1910.02054, sections 5 and 7) and PyTorch FSDP
(arXiv 2304.11277); tensor parallelism, Megatron-LM (arXiv 1909.08053); expert parallelism with two all-to-alls a
layer, GShard (arXiv 2006.16668) and DeepSeek-V3 (arXiv 2412.19437); activations, Korthikanti et al. (arXiv
2205.05198); collectives, Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH".

The bytes are those that DDP and transformers' `DistributedConfig` move: `benchmarks/collectives.py` counts them.
Routing is taken as even. H hidden, I intermediate, E experts, K experts a token.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .layouts import Layout
from .machine import Machine
from .shape import ModelShape, Weight
from .workload import Workload


COUNT_BYTES = 8  # of the expert counts that ranks tell each other ahead of the tokens
DDP_BUCKETS = 1  # DDP keeps a second copy of the gradients, unless `gradient_as_bucket_view=True`


@dataclass(frozen=True)
class Collective:
    """
    Collectives of one kind and purpose in one step.

    Args:
        kind (`str`): `"all_gather"`, `"reduce_scatter"`, `"all_reduce"` or `"all_to_all"`.
        purpose (`str`): What they are for.
        bytes (`float`):
            Of a rank in a step: of the whole tensor that is gathered, scattered or reduced, or of all rows that a rank
            dispatches, to itself too.
        calls (`int`): How many there are.
        ranks (`int`): Of a group.
        stride (`int`): Between the numbers of two neighbours in a group.
        hidden (`bool`): Whether the engine may run them beside computation.
    """

    kind: str
    purpose: str
    bytes: float
    calls: int
    ranks: int
    stride: int = 1
    hidden: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends: a ring gathers or scatters in n - 1 parts of n, and reduces in twice as many."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.bytes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. `gathered` are layers that FSDP holds whole for a while, `buckets` copies for communication."""

    weights: float
    gradients: float
    states: float
    gathered: float
    buckets: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.states + self.gathered + self.buckets + self.activations


def tokens_of_rank(layout: Layout, workload: Workload) -> int:
    """The global batch is the same for all layouts: a tensor-parallel group shares the sequences of its ranks."""
    return workload.tokens_per_gpu * layout.tp


# ---- memory -------------------------------------------------------------------------------------------------------


def memory_of_rank(shape: ModelShape, layout: Layout, workload: Workload) -> Memory:
    """
    The peak, as the backward pass begins. A stage of ZeRO divides what it shards by the ranks. FSDP's root and what
    its plan keeps stay gathered, two more layers are (one at work, one fetched ahead), and one layer's gradient is
    whole.
    """
    sizes = workload.bytes
    activations = activation_bytes(shape, layout, workload)
    if layout.engine == "fsdp":
        local = sum(sharded_numbers(weight, layout) for weight in shape.weights if not weight.tied)
        staying, largest = gathered_numbers(shape, layout)
        gathered = (staying + 3 * largest) * sizes.computed
        return Memory(
            local * sizes.stored, local * sizes.stored, local * workload.state_bytes, gathered, 0, activations
        )
    numbers, ranks = shape.num_parameters, layout.gpus
    if layout.engine == "zero2":
        master = numbers / ranks * sizes.stored if sizes.stored != sizes.computed else 0.0
        states = numbers / ranks * workload.state_bytes + master
        return Memory(numbers * sizes.computed, numbers / ranks * sizes.computed, states, 0, 0, activations)
    cast = numbers * sizes.computed if sizes.stored != sizes.computed else 0  # that autocast keeps in a step
    weights, buckets = numbers * sizes.stored, numbers * sizes.stored * DDP_BUCKETS if ranks > 1 else 0
    return Memory(weights, weights, numbers * workload.state_bytes, cast, buckets, activations)


def sharded_numbers(weight: Weight, layout: Layout) -> int:
    """Numbers of a weight that a rank stores: FSDP cuts the first dimension, and pads it to a whole cut a rank."""
    first, *rest = weight.local_shape(layout.tp, layout.ep) or (1,)
    ranks = layout.efsdp if weight.experts and layout.ep > 1 else layout.fsdp
    return math.ceil(first / ranks) * math.prod(rest)


def unit_of(weight: Weight, layout: Layout) -> str:
    """The module that FSDP gathers a weight with."""
    return weight.experts if layout.ep > 1 and weight.experts else weight.unit


def gathered_numbers(shape: ModelShape, layout: Layout) -> tuple[int, int]:
    """Numbers of what stays gathered in a step, and of the largest layer of the others, its experts with it."""
    staying, layers = 0, Counter[str]()
    for weight in shape.weights:
        numbers = math.prod(weight.local_shape(layout.tp, layout.ep))
        if weight.unit in shape.stays and not (weight.experts and layout.ep > 1):
            staying += numbers
        else:
            layers[weight.unit] += numbers
    return staying, max(layers.values(), default=0)


def activation_bytes(shape: ModelShape, layout: Layout, workload: Workload) -> float:
    """
    What autograd keeps of a rank's tokens, attention scores not stored (a fused kernel). A layer keeps the inputs of
    its products, both norms in float32, and for each of the K experts of a token the rows dispatched and the
    intermediate ones; the head keeps logits, and their float32 copy and gradient. With checkpointing, of each layer
    its input alone, and one layer whole.
    """
    size, split = workload.bytes.computed, layout.tp
    dispatched = split if layout.ep > 1 else 1  # expert parallelism gives each rank of a group its own tokens
    attention = size * (shape.hidden + (3 * shape.query + 3 * shape.key_value) / split)
    norms = 2 * (4 + size) * shape.hidden
    intermediate = (4 if shape.gated else 2) * shape.intermediate
    experts = size * shape.num_experts_per_tok * (2 * shape.hidden / dispatched + intermediate / split)
    router = 4 * shape.hidden + 8 * shape.num_experts
    layer = attention + norms + size * shape.hidden + experts + router
    head = shape.vocabulary * (size + 8)
    if workload.gradient_checkpointing:
        layers = shape.num_layers * size * shape.hidden + layer
    else:
        layers = shape.num_layers * layer
    return tokens_of_rank(layout, workload) * (layers + head)


# ---- traffic ------------------------------------------------------------------------------------------------------


def traffic(shape: ModelShape, layout: Layout, workload: Workload) -> list[Collective]:
    """The collectives of one optimizer step without accumulation; those of a few bytes (norms, losses) left out."""
    collectives = [
        *_data_parallel(shape, layout, workload),
        *_expert_parallel(shape, layout, workload),
        *_tensor_parallel(shape, layout, workload),
    ]
    if shape.global_balance:
        numbers = shape.num_sparse_layers * (shape.num_experts + 1) + 1
        collectives.append(Collective("all_reduce", "loads of the balance loss", 4 * numbers, 1, layout.gpus))
    return [collective for collective in collectives if collective.ranks > 1 and collective.calls]


def _data_parallel(shape: ModelShape, layout: Layout, workload: Workload) -> Iterator[Collective]:
    """DDP reduces each gradient. ZeRO-2 scatters it and gathers the new weights. FSDP gathers weights twice."""
    sizes, gpus, numbers = workload.bytes, layout.gpus, shape.num_parameters
    if layout.engine == "ddp":
        calls = math.ceil(numbers * sizes.stored / (25 * 2**20))  # DDP's buckets
        yield Collective("all_reduce", "gradients", numbers * sizes.stored, calls, gpus, hidden=True)
    elif layout.engine == "zero2":
        calls = math.ceil(numbers / 5e8)  # DeepSpeed's buckets
        yield Collective("reduce_scatter", "gradients", numbers * sizes.computed, calls, gpus, hidden=True)
        yield Collective("all_gather", "weights", numbers * sizes.computed, calls, gpus)
    else:
        yield from _fully_sharded(shape, layout, workload)


def _fully_sharded(shape: ModelShape, layout: Layout, workload: Workload) -> Iterator[Collective]:
    sizes, stays = workload.bytes, shape.stays
    for of_experts in (False, True):
        ranks, stride = (layout.efsdp, layout.ep) if of_experts else (layout.fsdp, layout.tp)
        numbers: dict[str, int] = defaultdict(int)
        for weight in shape.weights:
            if of_experts == bool(weight.experts and layout.ep > 1):
                numbers[unit_of(weight, layout)] += ranks * sharded_numbers(weight, layout)
        gathers = {unit: 1 if unit in stays else 2 for unit in numbers}
        gathered = sum(gathers[unit] * count for unit, count in numbers.items())
        purpose = "experts" if of_experts else "layers"
        calls = sum(gathers.values())
        yield Collective("all_gather", purpose, gathered * sizes.computed, calls, ranks, stride, hidden=True)
        reduced, calls = sum(numbers.values()), len(numbers)
        purpose = f"gradients of {purpose}"
        yield Collective("reduce_scatter", purpose, reduced * sizes.reduced, calls, ranks, stride, hidden=True)
        replica = ranks * stride
        shard = reduced / ranks * sizes.reduced
        yield Collective("all_reduce", f"{purpose}, replicas", shard, calls, layout.replicas, replica, hidden=True)


def _expert_parallel(shape: ModelShape, layout: Layout, workload: Workload) -> Iterator[Collective]:
    """Dispatch and combine, each forward and backward, and once more where layers are computed again."""
    if layout.ep == 1:
        return
    tokens = workload.tokens_per_gpu  # the ranks of a tensor-parallel group dispatch a part of its tokens each
    rows = tokens * shape.num_experts_per_tok * shape.hidden * workload.bytes.computed
    layers, forwards = shape.num_sparse_layers, 2 if workload.gradient_checkpointing else 1
    for purpose in ("dispatch", "combine"):
        calls = layers * (forwards + 1)
        yield Collective("all_to_all", purpose, rows * calls, calls, layout.ep)
    counts = layers * forwards * shape.num_experts * COUNT_BYTES
    yield Collective("all_to_all", "counts of the dispatch", counts, layers * forwards, layout.ep)
    whole = tokens_of_rank(layout, workload) * workload.bytes.computed
    gathered = layers * whole * (2 * shape.hidden + shape.num_experts_per_tok)
    yield Collective("all_gather", "tokens over TP", gathered, layers * 3, layout.tp)


def _tensor_parallel(shape: ModelShape, layout: Layout, workload: Workload) -> Iterator[Collective]:
    whole = tokens_of_rank(layout, workload) * workload.bytes.computed
    numbers: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for each in shape.tensor_parallel:
        if each.of_experts and layout.ep > 1:
            continue
        again = workload.gradient_checkpointing and each.in_layer and not (each.backward or each.of_experts)
        times = 2 if again else 1  # a layer is computed again up to its last product, so without the experts' sum
        numbers[each.kind] += times * each.numbers * (whole if each.per_token else workload.bytes.stored)
        calls[each.kind] += times
    for kind, size in numbers.items():
        yield Collective(kind, "activations over TP", size, calls[kind], layout.tp)


# ---- time ---------------------------------------------------------------------------------------------------------


def compute_seconds(shape: ModelShape, layout: Layout, workload: Workload, machine: Machine) -> float:
    """
    A product is done once forward and twice backward, once more with checkpointing; attention scores cost 4 operations
    for each token, position and width, half of them where a token sees only what is before it.
    """
    scores = (2 if shape.causal else 4) * shape.query * workload.sequence_length * shape.num_layers
    passes = 4 if workload.gradient_checkpointing else 3
    peak = machine.flops / (2 if workload.precision == "float32" else 1)  # TF32
    return passes * workload.tokens_per_gpu * (shape.flops_per_token + scores) / (peak * machine.utilisation)


def transfer_seconds(collective: Collective, machine: Machine) -> float:
    """
    How long a collective takes: the slower of the links within the nodes and of those between them, and the messages'
    latency (the model of Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH").

    Rings and trees keep all network cards of a node at work, so where m ranks of a group share a node they share their
    m cards: a gather or a reduction crosses between nodes once a node, while an all-to-all has a part for each rank.
    """
    ranks, size = collective.ranks, collective.bytes
    if ranks == 1:
        return 0.0
    in_node = min(ranks, max(1, machine.gpus_per_node // collective.stride))
    nodes = math.ceil(ranks / in_node)
    if collective.kind == "all_to_all":
        within, between = size * (in_node - 1) / ranks, size * (ranks - in_node) / ranks
    else:
        rounds = 2 if collective.kind == "all_reduce" else 1
        within = rounds * size * (ranks - 1) / ranks if in_node > 1 else 0.0
        between = rounds * size * (nodes - 1) / nodes / in_node
    slower = max(within / machine.intra, between / machine.inter) / machine.link_utilisation
    return slower + collective.calls * machine.latency * math.ceil(math.log2(ranks))


def step_seconds(collectives: list[Collective], compute: float, machine: Machine) -> tuple[float, float]:
    """A step's time where nothing runs beside anything else, and where all does that the engine may run so."""
    times = {True: 0.0, False: 0.0}
    for collective in collectives:
        times[collective.hidden] += transfer_seconds(collective, machine)
    return compute + times[True] + times[False], max(compute, times[True]) + times[False]
