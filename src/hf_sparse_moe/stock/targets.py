"""
The stock mixtures that a sparse model can be written as: one row an architecture.

A row is data. It says which dense architectures the mixture is the sparse sibling of, how its config and its tensors
are called, and what its router computes. That attention, norms and shapes agree is not said here: the engine builds
both models without storage and compares every tensor's name and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


# ---- how an architecture says which of its layers are sparse --------------------------------------------------------

Layers = dict[str, list[str]]  # side to "dense" or "sparse", one a layer


def all_sparse(layers: Layers) -> dict[str, Any]:
    """No field: every layer is sparse."""
    return {}


def mlp_only_layers(layers: Layers) -> dict[str, Any]:
    """A list of the dense layers (Qwen2-MoE, Qwen3-MoE)."""
    dense = [number for number, kind in enumerate(layers["decoder"]) if kind == "dense"]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def first_k_dense_replace(layers: Layers) -> dict[str, Any]:
    """The number of dense layers before the first sparse one (DeepSeek-V3, GLM-4.5, dots.llm1)."""
    return {"first_k_dense_replace": [*layers["decoder"], "sparse"].index("sparse")}


def mlp_layer_types(layers: Layers) -> dict[str, Any]:
    """The list itself."""
    return {"mlp_layer_types": list(layers["decoder"])}


def moe_layer_interval(layers: Layers) -> dict[str, Any]:
    """Every n-th layer from a first to a last one (ERNIE 4.5)."""
    sparse = [number for number, kind in enumerate(layers["decoder"]) if kind == "sparse"]
    steps = {after - before for before, after in pairwise(sparse)}
    interval = steps.pop() if len(steps) == 1 else 1
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": interval}


def num_sparse_layers(layers: Layers) -> dict[str, Any]:
    """The number of sparse layers a side, spread evenly (Switch Transformers)."""
    return {f"num_sparse_{side}_layers": layers[side].count("sparse") for side in ("encoder", "decoder")}


# ---- what a row says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What a field of the dense config must hold for the target to compute the same."""

    field: str
    holds: Callable[[Any], bool]
    why: str  # what the target has instead; ends a sentence that starts with the field
    siblings: frozenset[str] = frozenset()  # the only dense architectures that it is asked of; empty for all


@dataclass(frozen=True)
class SharedNames:
    """The shared experts of a target."""

    weights: tuple[str, ...]  # gate, up and down, or packed gate and up, and down; from the layer
    count_field: str | None = None  # counts them in units of one routed expert
    size_field: str | None = None  # holds their intermediate size
    required: bool = False  # whether there are always some: a mixture without any gets one of zeros
    only_one: bool = False  # whether their size is that of one routed expert
    # A linear whose sigmoid scales them. It is written as zeros, so that the sigmoid is exactly 1/2, and the down
    # projection is written twice as large: an exact product in floating point.
    gate: str | None = None


@dataclass(frozen=True)
class ExportTarget:
    """A mixture architecture of transformers."""

    model_type: str
    dense: dict[str, dict[str, Any]]  # the siblings' `model_type`, each with the target's fields that it implies
    # Names for the number of experts, experts a token (None where that is `top_k`), and one expert's size.
    fields: tuple[str, str | None, str] = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    # The scoring functions, each with whether the weights of the chosen experts are divided by their sum; None where
    # the field `norm_topk_prob` says so.
    router: dict[str, bool | None] = field(default_factory=lambda: {"softmax": None})
    scoring_field: str | None = None  # of the scoring function
    scaling_field: str | None = None  # of a factor on the routed weights
    top_k: int | None = None  # the only number of experts a token that it knows
    grouped: bool = False  # whether its router chooses among `topk_group` of `n_group` groups of experts
    topk_methods: tuple[str, str] | None = None  # `topk_method` without and with groups, where the target has it
    min_experts: int = 1  # that its router can choose from, in a group
    gated: bool = True  # whether its experts have a gate
    layers: Callable[[Layers], dict[str, Any]] = all_sparse  # the fields that say which layers are sparse
    router_name: str = "mlp.gate.weight"  # from the layer, as the next three
    experts_name: str = "mlp.experts"
    score_bias_name: str | None = None  # written as zeros where the mixture has none
    expert_modules: tuple[str, str] | None = None  # up and down of expert `{}`, where experts are modules
    shared: SharedNames | None = None
    feed_forward: str = "mlp"  # what the dense siblings call what the target calls `mlp`
    needs: tuple[Need, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)  # fields written so, which `import_stock` requires
    derived: Callable[[Any], dict[str, Any]] = lambda dense: {}  # further fields of the target, of the dense config
    dense_fields: Callable[[Any], dict[str, Any]] = lambda target: {}  # the way back


# ---- the rows -------------------------------------------------------------------------------------------------------

# Switch Transformers drops the tokens above an expert's capacity: no sequence is that long.
LARGEST_CAPACITY = 2**31 - 1


def _shared(prefix: str, **kwargs) -> SharedNames:
    return SharedNames(tuple(f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")), **kwargs)


def _one_of_both(rope: dict[str, dict]) -> dict | None:
    """The rotary embeddings that all layers share; None where full and windowed layers differ."""
    first, *others = rope.values()
    return first if all(other == first for other in others) else None


_EVERY_LAYER_FULL = Need(
    "layer_types", lambda kinds: set(kinds or ()) <= {"full_attention"}, "full attention in every layer"
)
_ROTATES_ALL = Need(
    "rope_parameters",
    lambda rope: (rope or {}).get("partial_rotary_factor", 1.0) == 1.0,
    "rotary embeddings over whole heads",
    frozenset({"llama", "qwen2", "qwen3"}),
)
_INTERMEDIATE: Any = ("num_experts", "num_experts_per_tok", "intermediate_size")
_LOCAL: Any = ("num_local_experts", "num_experts_per_tok", "intermediate_size")
# DeepSeek-V3's router: sigmoid plus a bias that only chooses, groups of experts, a factor.
_DEEPSEEK: dict[str, Any] = {
    "fields": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "router": {"sigmoid": None},
    "scaling_field": "routed_scaling_factor",
    "grouped": True,
    "min_experts": 2,  # it adds up the two best scores of a group
    "score_bias_name": "mlp.gate.e_score_correction_bias",
    "shared": _shared("mlp.shared_experts", count_field="n_shared_experts", required=True),
}
_GRANITE: dict[str, Any] = {
    "fields": _LOCAL,
    "router": {"softmax": True},
    "router_name": "block_sparse_moe.router.weight",
    "experts_name": "block_sparse_moe.experts",
}
_GRANITE_SHARED = SharedNames(
    ("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"), size_field="shared_intermediate_size"
)
_QWEN_SHARED = _shared(
    "mlp.shared_expert",
    size_field="shared_expert_intermediate_size",
    required=True,
    gate="mlp.shared_expert_gate.weight",
)
_QWEN: dict[str, Any] = {
    "layers": mlp_only_layers,
    "needs": (_EVERY_LAYER_FULL,),
    "fixed": {"use_sliding_window": False},
}

# Where several fit, `architecture="auto"` takes the first: the most widely served stand first.
EXPORT_TARGETS: tuple[ExportTarget, ...] = (
    ExportTarget("mixtral", {"mistral": {}, "llama": {}}, fields=_LOCAL, router={"softmax": True}),
    ExportTarget("qwen3_moe", {"qwen3": {}}, **_QWEN),
    ExportTarget(
        "qwen2_moe", {"qwen2": {"qkv_bias": True}, "llama": {"qkv_bias": False}}, **_QWEN, shared=_QWEN_SHARED
    ),
    ExportTarget(
        "flex_olmo",
        {"olmo2": {}, "olmo3": {}},
        fields=_INTERMEDIATE,
        needs=(_EVERY_LAYER_FULL,),
        derived=lambda dense: {"rope_parameters": dense.rope_parameters.get("full_attention", dense.rope_parameters)},
    ),
    ExportTarget("olmoe", {"dense_olmoe": {}}, fields=_INTERMEDIATE),
    ExportTarget("granitemoe", {"granite": {}}, **_GRANITE),
    ExportTarget("granitemoeshared", {"granite": {}}, **_GRANITE, shared=_GRANITE_SHARED),
    ExportTarget("granitemoe_swa", {"granite_swa": {}}, **_GRANITE, shared=_GRANITE_SHARED),
    ExportTarget(
        "ernie4_5_moe",
        {"ernie4_5": {}},
        fields=("moe_num_experts", "moe_k", "moe_intermediate_size"),
        router={"softmax": True},
        layers=moe_layer_interval,
        score_bias_name="mlp.gate.moe_statics.e_score_correction_bias",
        shared=_shared("mlp.shared_experts", count_field="moe_num_shared_experts"),
    ),
    ExportTarget(
        "cohere2_moe",
        {"cohere2": {}},
        fields=_INTERMEDIATE,
        router={"softmax": True, "sigmoid": None},
        scoring_field="expert_selection_fn",
        layers=mlp_layer_types,
        shared=_shared("mlp.shared_experts", count_field="num_shared_experts"),
        fixed={"shared_expert_combination_strategy": "sum", "rms_norm_eps": None},
        derived=lambda dense: {
            "prefix_dense_sliding_window_pattern": 4,  # 1 would turn the rotary embeddings of dense layers on
            "prefix_dense_intermediate_size": dense.intermediate_size,
            "rope_parameters": dense.rope_parameters,
        },
        dense_fields=lambda target: {
            "intermediate_size": target.prefix_dense_intermediate_size or target.intermediate_size
        },
    ),
    ExportTarget(
        "hunyuan_v1_moe",
        {"hunyuan_v1_dense": {}},
        fields=("num_experts", "moe_topk", "intermediate_size"),
        router={"softmax": True},
        router_name="mlp.gate.wg.weight",
        shared=_shared("mlp.shared_mlp", required=True, only_one=True),
    ),
    ExportTarget("qwen3_5_moe_text", {"qwen3_5_text": {}}, router={"softmax": True}, shared=_QWEN_SHARED),
    ExportTarget(
        "glm4_moe",
        {
            "glm4_moe": {},  # with every layer dense: no other model has its half-rotated heads
            "llama": {"attention_bias": False, "use_qk_norm": False},
            "qwen2": {"attention_bias": True, "use_qk_norm": False},
            "qwen3": {"use_qk_norm": True},
        },
        **_DEEPSEEK,
        layers=first_k_dense_replace,
        needs=(_EVERY_LAYER_FULL, _ROTATES_ALL),
        derived=lambda dense: {"rope_parameters": {"partial_rotary_factor": 1.0, **dense.rope_parameters}},
        dense_fields=lambda target: {"first_k_dense_replace": target.num_hidden_layers},
    ),
    ExportTarget("dots1", {"qwen3": {}}, **_DEEPSEEK, layers=first_k_dense_replace),
    ExportTarget(
        "solar_open",
        {"llama": {"attention_bias": False}, "qwen2": {"attention_bias": True}},
        **_DEEPSEEK,
        needs=(_EVERY_LAYER_FULL,),
    ),
    ExportTarget(
        "hy_v3",
        {"qwen3": {}},
        router={"sigmoid": True},
        scaling_field="router_scaling_factor",
        layers=mlp_layer_types,
        score_bias_name="mlp.e_score_correction_bias",
        shared=_shared("mlp.shared_experts", count_field="num_shared_experts", required=True),
        needs=(_EVERY_LAYER_FULL,),
    ),
    ExportTarget(
        "flint",
        {"flint": {}},  # without experts it is a dense model
        router={"sigmoid": None},
        layers=mlp_only_layers,
        shared=_shared("mlp.shared_expert", size_field="shared_expert_intermediate_size", required=True),
        dense_fields=lambda target: {"num_experts": 0, "mlp_only_layers": []},
    ),
    ExportTarget("deepseek_v3", {"youtu": {}}, **_DEEPSEEK, layers=first_k_dense_replace),
    ExportTarget("glm4_moe_lite", {"youtu": {}}, **_DEEPSEEK, layers=mlp_layer_types),
    ExportTarget(
        "deepseek_v2",
        {"youtu": {}},
        fields=_DEEPSEEK["fields"],
        router={"softmax": False},
        scaling_field="routed_scaling_factor",
        layers=first_k_dense_replace,
        shared=_DEEPSEEK["shared"],
        needs=(Need("rope_interleave", bool, "rotary embeddings that turn neighbouring units"),),
        grouped=True,
        topk_methods=("greedy", "group_limited_greedy"),
        dense_fields=lambda target: {"rope_interleave": True},
    ),
    ExportTarget(
        "mellum",
        {"qwen3": {}},
        layers=mlp_layer_types,
        derived=lambda dense: {
            "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), dense.rope_parameters)
        },
        dense_fields=lambda target: {"rope_parameters": _one_of_both(target.rope_parameters)},
    ),
    ExportTarget(
        "switch_transformers",
        {"t5": {}},
        fields=("num_experts", None, "d_ff"),
        router={"softmax": False},
        top_k=1,
        gated=False,
        layers=num_sparse_layers,
        router_name="mlp.router.classifier.weight",
        expert_modules=("mlp.experts.expert_{}.wi.weight", "mlp.experts.expert_{}.wo.weight"),
        feed_forward="DenseReluDense",
        needs=(Need("scale_decoder_outputs", bool, "the scaled output of tied embeddings"),),
        fixed={"router_bias": False, "router_dtype": "float32"},
        derived=lambda dense: {"expert_capacity": LARGEST_CAPACITY, "dense_act_fn": dense.dense_act_fn},
        dense_fields=lambda target: {"feed_forward_proj": target.dense_act_fn},
    ),
)
