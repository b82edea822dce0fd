"""
The stock mixtures that a sparse model can be written as: one row an architecture.

A row is data. It says which dense architectures the mixture is the sparse sibling of, how its config and its tensors
are called, and what its router computes. That attention, norms and shapes agree is not said here: the engine builds
both models without storage and compares every tensor's name and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import layer_patterns
from .layer_patterns import Layers


# Switch Transformers drops the tokens above an expert's capacity: no sequence is that long.
LARGEST_CAPACITY = 2**31 - 1


@dataclass(frozen=True)
class Need:
    """
    What a field of the dense config must hold for the target to compute the same.

    Args:
        field (`str`): Its name.
        holds (`Callable`): Of its value.
        why (`str`): What the target has instead; ends a sentence that starts with the field.
    """

    field: str
    holds: Callable[[Any], bool]
    why: str


@dataclass(frozen=True)
class SharedNames:
    """
    The shared experts of a target.

    Args:
        weights (`tuple[str, ...]`): Gate, up and down, or packed gate and up, and down; from the layer.
        count_field (`str`, *optional*): Counts them in units of one routed expert.
        size_field (`str`, *optional*): Holds their intermediate size.
        required (`bool`): Whether the architecture always has some. A mixture without any then gets one of zeros.
        only_one (`bool`): Whether their size is that of one routed expert.
        gate (`str`, *optional*): A linear whose sigmoid scales them. It is written as zeros, so that the sigmoid is
            exactly 1/2, and the down projection is written twice as large: an exact product in floating point.
    """

    weights: tuple[str, ...]
    count_field: str | None = None
    size_field: str | None = None
    required: bool = False
    only_one: bool = False
    gate: str | None = None


@dataclass(frozen=True)
class ExportTarget:
    """
    A mixture architecture of transformers.

    Args:
        model_type (`str`): Its name.
        dense (`dict[str, dict]`): The dense siblings' `model_type`, each with the target's fields that it implies.
        fields (`tuple`): Its names for the number of experts, experts a token (None where that is `top_k`), and one
            expert's size.
        router (`dict[str, bool | None]`): The scoring functions it has, each with whether the weights of the chosen
            experts are divided by their sum; None where its `norm_topk_prob` says so.
        scoring_field (`str`, *optional*): Its field for the scoring function.
        scaling_field (`str`, *optional*): Its field for a factor on the routed weights.
        top_k (`int`, *optional*): The only number of experts a token that it knows.
        min_experts (`int`): Fewest experts that its router can choose from.
        gated (`bool`): Whether its experts have a gate.
        layers (`Callable`): Fields that say which layers are sparse, of `layer_patterns`.
        router_name, experts_name, score_bias_name (`str`): Where they are, from the layer. A score bias is written as
            zeros where the mixture has none.
        expert_modules (`tuple[str, str]`, *optional*): Names of the up and down weights of expert `{}` where experts
            are modules.
        shared (`SharedNames`, *optional*): Its shared experts.
        feed_forward (`str`): What the dense siblings call what the target calls `mlp`.
        needs (`tuple[Need, ...]`): Of the dense config.
        fixed (`dict`): Fields that are written so, and that `import_stock` requires.
        derived (`Callable`, *optional*): Further fields of the target, of the dense config.
        dense_fields (`Callable`, *optional*): The way back: fields of the dense config, of the target's.
    """

    model_type: str
    dense: dict[str, dict[str, Any]]
    fields: tuple[str, str | None, str] = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    router: dict[str, bool | None] = field(default_factory=lambda: {"softmax": None})
    scoring_field: str | None = None
    scaling_field: str | None = None
    top_k: int | None = None
    min_experts: int = 1
    gated: bool = True
    layers: Callable[[Layers], dict[str, Any]] = layer_patterns.all_sparse
    router_name: str = "mlp.gate.weight"
    experts_name: str = "mlp.experts"
    score_bias_name: str | None = None
    expert_modules: tuple[str, str] | None = None
    shared: SharedNames | None = None
    feed_forward: str = "mlp"
    needs: tuple[Need, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    derived: Callable[[Any], dict[str, Any]] | None = None
    dense_fields: Callable[[Any], dict[str, Any]] | None = None


def _shared(prefix: str, **kwargs) -> SharedNames:
    return SharedNames(tuple(f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down")), **kwargs)


_EVERY_LAYER_FULL = Need(
    "layer_types",
    lambda kinds: set(kinds or ()) <= {"full_attention"},
    "full attention in every layer",
)
_ROTATES_ALL = Need(
    "rope_parameters",
    lambda rope: (rope or {}).get("partial_rotary_factor", 1.0) == 1.0,
    "rotary embeddings over whole heads",
)

# DeepSeek-V3's router: sigmoid plus a bias that only chooses, groups of experts, a factor.
_DEEPSEEK: dict[str, Any] = {
    "fields": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "router": {"sigmoid": None},
    "scaling_field": "routed_scaling_factor",
    "min_experts": 2,  # it adds up the two best scores of a group
    "score_bias_name": "mlp.gate.e_score_correction_bias",
    "shared": _shared("mlp.shared_experts", count_field="n_shared_experts", required=True),
}
_GRANITE: dict[str, Any] = {
    "fields": ("num_local_experts", "num_experts_per_tok", "intermediate_size"),
    "router": {"softmax": True},
    "router_name": "block_sparse_moe.router.weight",
    "experts_name": "block_sparse_moe.experts",
}
_GRANITE_SHARED = SharedNames(
    ("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"), size_field="shared_intermediate_size"
)
_ONE_GROUP = {"n_group": 1, "topk_group": 1}

# Where several fit, `architecture="auto"` takes the first: the most widely served stand first.
EXPORT_TARGETS: tuple[ExportTarget, ...] = (
    ExportTarget(
        "mixtral",
        {"mistral": {}, "llama": {}},
        fields=("num_local_experts", "num_experts_per_tok", "intermediate_size"),
        router={"softmax": True},
    ),
    ExportTarget(
        "qwen3_moe",
        {"qwen3": {}},
        layers=layer_patterns.mlp_only_layers,
        needs=(_EVERY_LAYER_FULL,),
        fixed={"use_sliding_window": False},
    ),
    ExportTarget(
        "qwen2_moe",
        {"qwen2": {"qkv_bias": True}, "llama": {"qkv_bias": False}},
        layers=layer_patterns.mlp_only_layers,
        shared=_shared(
            "mlp.shared_expert",
            size_field="shared_expert_intermediate_size",
            required=True,
            gate="mlp.shared_expert_gate.weight",
        ),
        needs=(_EVERY_LAYER_FULL,),
        fixed={"use_sliding_window": False},
    ),
    ExportTarget(
        "flex_olmo",
        {"olmo2": {}, "olmo3": {}},
        fields=("num_experts", "num_experts_per_tok", "intermediate_size"),
        needs=(_EVERY_LAYER_FULL,),
        derived=lambda dense: {"rope_parameters": dense.rope_parameters.get("full_attention", dense.rope_parameters)},
    ),
    ExportTarget(
        "olmoe",
        {"dense_olmoe": {}},
        fields=("num_experts", "num_experts_per_tok", "intermediate_size"),
    ),
    ExportTarget(
        "granitemoe",
        {"granite": {}},
        **_GRANITE,
    ),
    ExportTarget(
        "granitemoeshared",
        {"granite": {}},
        **_GRANITE,
        shared=_GRANITE_SHARED,
    ),
    ExportTarget(
        "granitemoe_swa",
        {"granite_swa": {}},
        **_GRANITE,
        shared=_GRANITE_SHARED,
    ),
    ExportTarget(
        "ernie4_5_moe",
        {"ernie4_5": {}},
        fields=("moe_num_experts", "moe_k", "moe_intermediate_size"),
        router={"softmax": True},
        layers=layer_patterns.moe_layer_interval,
        score_bias_name="mlp.gate.moe_statics.e_score_correction_bias",
        shared=_shared("mlp.shared_experts", count_field="moe_num_shared_experts"),
    ),
    ExportTarget(
        "cohere2_moe",
        {"cohere2": {}},
        fields=("num_experts", "num_experts_per_tok", "intermediate_size"),
        router={"softmax": True, "sigmoid": None},
        scoring_field="expert_selection_fn",
        layers=layer_patterns.mlp_layer_types,
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
    ExportTarget(
        "qwen3_5_moe_text",
        {"qwen3_5_text": {}},
        router={"softmax": True},
        shared=_shared(
            "mlp.shared_expert",
            size_field="shared_expert_intermediate_size",
            required=True,
            gate="mlp.shared_expert_gate.weight",
        ),
    ),
    ExportTarget(
        "glm4_moe",
        {
            "llama": {"attention_bias": False, "use_qk_norm": False},
            "qwen2": {"attention_bias": True, "use_qk_norm": False},
            "qwen3": {"use_qk_norm": True},
        },
        **_DEEPSEEK,
        layers=layer_patterns.first_k_dense_replace,
        needs=(_EVERY_LAYER_FULL, _ROTATES_ALL),
        fixed=_ONE_GROUP,
        derived=lambda dense: {"rope_parameters": {**dense.rope_parameters, "partial_rotary_factor": 1.0}},
    ),
    ExportTarget(
        "dots1",
        {"qwen3": {}},
        **_DEEPSEEK,
        layers=layer_patterns.first_k_dense_replace,
        fixed=_ONE_GROUP,
    ),
    ExportTarget(
        "solar_open",
        {"llama": {"attention_bias": False}, "qwen2": {"attention_bias": True}},
        **_DEEPSEEK,
        needs=(_EVERY_LAYER_FULL,),
        fixed=_ONE_GROUP,
    ),
    ExportTarget(
        "hy_v3",
        {"qwen3": {}},
        router={"sigmoid": True},
        scaling_field="router_scaling_factor",
        layers=layer_patterns.mlp_layer_types,
        score_bias_name="mlp.e_score_correction_bias",
        shared=_shared("mlp.shared_experts", count_field="num_shared_experts", required=True),
        needs=(_EVERY_LAYER_FULL,),
    ),
    ExportTarget(
        "flint",
        {"flint": {}},  # without experts it is a dense model
        router={"sigmoid": None},
        layers=layer_patterns.mlp_only_layers,
        shared=_shared("mlp.shared_expert", size_field="shared_expert_intermediate_size", required=True),
        dense_fields=lambda target: {"num_experts": 0, "mlp_only_layers": []},
    ),
    ExportTarget(
        "deepseek_v3",
        {"youtu": {}},
        **_DEEPSEEK,
        layers=layer_patterns.first_k_dense_replace,
        fixed=_ONE_GROUP,
    ),
    ExportTarget(
        "glm4_moe_lite",
        {"youtu": {}},
        **_DEEPSEEK,
        layers=layer_patterns.mlp_layer_types,
        fixed=_ONE_GROUP,
    ),
    ExportTarget(
        "deepseek_v2",
        {"youtu": {}},
        **{**_DEEPSEEK, "router": {"softmax": False}, "score_bias_name": None, "min_experts": 1},
        layers=layer_patterns.first_k_dense_replace,
        needs=(Need("rope_interleave", bool, "rotary embeddings that turn neighbouring units"),),
        fixed={"topk_method": "greedy"},
        dense_fields=lambda target: {"rope_interleave": True},
    ),
    ExportTarget(
        "mellum",
        {"qwen3": {}},
        layers=layer_patterns.mlp_layer_types,
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
        layers=layer_patterns.num_sparse_layers,
        router_name="mlp.router.classifier.weight",
        expert_modules=("mlp.experts.expert_{}.wi.weight", "mlp.experts.expert_{}.wo.weight"),
        feed_forward="DenseReluDense",
        needs=(Need("scale_decoder_outputs", bool, "the scaled output of tied embeddings"),),
        fixed={"router_bias": False, "router_dtype": "float32"},
        derived=lambda dense: {"expert_capacity": LARGEST_CAPACITY, "dense_act_fn": dense.dense_act_fn},
        dense_fields=lambda target: {"feed_forward_proj": target.dense_act_fn},
    ),
)


def _one_of_both(rope: dict[str, dict]) -> dict | None:
    """The rotary embeddings that all layers share; None where full and windowed layers differ."""
    first, *others = rope.values()
    return first if all(other == first for other in others) else None
