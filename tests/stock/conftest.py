"""One tiny mixture for each pair of a dense architecture and a stock one that it can be written as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf

import hf_sparse_moe
from hf_sparse_moe.stock import EXPORT_TARGETS
from hf_sparse_moe.stock.targets import ExportTarget, all_sparse, num_sparse_layers
from tiny_models import ARCHITECTURES, CONFIG_CLASSES, LANGUAGE_MODELS, enlarge_weights


LAYERS = 4
_SIZES = {**ARCHITECTURES["llama"].fields, "num_hidden_layers": LAYERS}
_HEADS = {"head_dim": 16}  # not hidden size / heads
_WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DELTA = {f"linear_{name}": 8 if "dim" in name else 4 for name in ("num_key_heads", "num_value_heads")}
_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
# What a dense architecture has of its own, set so that losing it would show in the logits.
DENSE_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {**_HEADS, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    "mistral": {**_HEADS, "sliding_window": 3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {**_HEADS, "rms_norm_eps": 1e-3},
    "olmo2": {},
    "olmo3": {"layer_types": ["full_attention"] * LAYERS},
    "dense_olmoe": {},
    "granite": _MULTIPLIERS,
    "granite_swa": {**_MULTIPLIERS, "sliding_window": 3, "layer_rope_theta": [1000, 10000, 0, 5000]},
    "ernie4_5": _HEADS,
    "cohere2": {**_WINDOWS, "logit_scale": 2.0},
    "hunyuan_v1_dense": _HEADS,
    "qwen3_5_text": {**_HEADS, **_DELTA, "layer_types": ["linear_attention", "full_attention"] * 2},
    "flint": {**_HEADS, "num_experts": 0, "sliding_window": 3},
    "youtu": {**_LATENT, "num_key_value_heads": 4},
    "glm4_moe": {**_HEADS, "use_qk_norm": True, "attention_bias": True, "first_k_dense_replace": LAYERS},
}
PAIRS = [
    pytest.param(target, dense, scoring, id=f"{dense}-{target.model_type}-{scoring}")
    for target in EXPORT_TARGETS
    for dense in target.dense
    for scoring in target.router
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair_target" in metafunc.fixturenames:
        metafunc.parametrize(("pair_target", "pair_dense", "pair_scoring"), PAIRS)


def dense_config(dense: str, **changes) -> hf.PreTrainedConfig:
    """A tiny dense config."""
    if dense == "t5":
        return ARCHITECTURES["t5"].config(num_layers=LAYERS, **changes)
    return hf.CONFIG_MAPPING[dense](**{**_SIZES, **DENSE_FIELDS[dense], **changes})


def make_mixture(dense: str, **fields) -> hf_sparse_moe.SparseMoePreTrainedModel:
    """A tiny mixture whose experts have another size than the dense feed-forward."""
    family = "encoder_decoder" if dense == "t5" else "decoder"
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **fields}
    config = CONFIG_CLASSES[family].from_dense(dense_config(dense), **fields)
    return enlarge_weights(LANGUAGE_MODELS[family].from_config(config)).eval()


def plain_fields(target: ExportTarget, scoring: str) -> dict[str, Any]:
    """The router of a target, and nothing that it need not have."""
    norm = target.router[scoring]
    return {
        "num_experts_per_tok": target.top_k or 2,
        "scoring_func": scoring,
        "norm_topk_prob": True if norm is None else norm,
    }


def rich_fields(target: ExportTarget, scoring: str) -> dict[str, Any]:
    """All that a target can have: dense layers, shared experts, weights that do not sum to 1, a factor."""
    fields = plain_fields(target, scoring)
    if target.router[scoring] is None:
        fields["norm_topk_prob"] = False
    if target.scaling_field:
        fields["routed_scaling_factor"] = 2.5
    if target.grouped:
        fields |= {"n_group": 2, "topk_group": 1}
    if target.shared:
        fields["num_shared_experts"] = 1 if target.shared.only_one else 2
        fields["shared_expert_gate"] = target.model_type == "qwen2_moe"
    if target.layers is num_sparse_layers:
        every_second = ["dense", "sparse"] * 2
        fields |= {"encoder_mlp_layer_types": every_second, "moe_intermediate_size": None}
    elif target.layers is not all_sparse:
        fields["mlp_layer_types"] = ["dense", *["sparse"] * (LAYERS - 1)]
        if target.layers.__name__ == "moe_layer_interval":
            fields["mlp_layer_types"] = ["dense", "sparse"] * 2
    return fields


@pytest.fixture(scope="session")
def mixture() -> Callable[..., hf_sparse_moe.SparseMoePreTrainedModel]:
    return make_mixture


@pytest.fixture(scope="session")
def variants() -> dict[str, Callable[[ExportTarget, str], dict[str, Any]]]:
    return {"plain": plain_fields, "rich": rich_fields}


@pytest.fixture(scope="session")
def all_pairs() -> list[tuple[ExportTarget, str, str]]:
    return [param.values for param in PAIRS]
