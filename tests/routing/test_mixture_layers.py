"""Every mixture of the installed transformers is found and watched, by its structure alone."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.activations import ACT2FN

from conformance.overrides import OVERRIDES
from conformance.tiny_configs import _tiny_fields
from hf_sparse_moe.routing import find_mixture_layers, observe_routing
from tiny_models import VOCAB_SIZE, tiny_dense, tiny_sparse


# A folder of transformers holds a mixture where its modeling file defines such a class.
MODELING = Path(transformers.__file__).parent / "models"
DEFINES_EXPERTS = re.compile(r"^class \w+(Experts|NaiveMoe|CDMoE)\(", re.MULTILINE)
MIXTURES = sorted(
    path.parent.name for path in MODELING.glob("*/modeling_*.py") if DEFINES_EXPERTS.search(path.read_text())
)
UNSUPPORTED = {
    "doge": "its experts are rows of embeddings, looked up by product keys: no router, no experts to call",
    "vitpose_backbone": "no router: the caller names the expert of each image",
}

# The model type to build, where it is not the folder's name: the text model of a multimodal one.
TYPES = {
    "aria": "aria_text", "deepseek_ocr2": "deepseek_ocr2_text", "diffusion_gemma": "diffusion_gemma_text",
    "dots3_note": "dots3_note_text", "ernie4_5_vl_moe": "ernie4_5_vl_moe_text", "gemma4": "gemma4_text",
    "glm4v_moe": "glm4v_moe_text", "glm5_next": "glm5_next_text", "inkling": "inkling_text",
    "inkling2": "inkling2_text", "llama4": "llama4_text", "minimax_m3_vl": "minimax_m3_vl_text",
    "mistral_large4": "mistral_large4_text", "muse_spark": "muse_spark_text", "nllb_moe": "nllb-moe",
    "qwen3_5_moe": "qwen3_5_moe_text", "qwen3_omni_moe": "qwen3_omni_moe_thinker",
    "qwen3_vl_moe": "qwen3_vl_moe_text", "qwen4_exp": "qwen4_exp_text", "step3p7": "step3p5",
}  # fmt: skip
# Text models that no Auto class takes.
CLASSES = {
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "glm5_next": "Glm5NextTextModel",
    "step3p7": "Step3p7TextModel",
}
EXPERTS, TOP_K = 8, 2
_EXPERT_FIELDS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk"), TOP_K),
    **dict.fromkeys(("n_group", "topk_group", "num_shared_experts", "n_shared_experts"), 1),
}
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LAST_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
FIELDS = {
    "axk1": _LATENT, "axk2": _LATENT, "deepseek_v2": _LATENT, "deepseek_v3": _LATENT, "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT, "glm_moe_dsa": _LATENT, "kimi_linear": _LATENT | _HYBRID, "mistral_large4": _LATENT,
    "longcat_flash": _LATENT | {"num_layers": 2, "head_dim": 8},
    "dbrx": {"ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": TOP_K}},
    "deepseek_ocr2": _LAST_SPARSE,
    "deepseek_v4": {"num_hash_layers": 0},
    "ernie4_5_vl_moe": _LAST_SPARSE
    | {"moe_intermediate_size": [32, 32], "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}},
    "glm5_next": _LAST_SPARSE | _HYBRID | {"num_key_value_heads": 4},
    "jamba": {"expert_layer_period": 1, "expert_layer_offset": 0},
    "qwen3_5_moe": _HYBRID | _LINEAR, "qwen3_next": _HYBRID | _LINEAR,
    "qwen4_exp": _HYBRID | _LINEAR | {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "step3p7": _LAST_SPARSE,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


BIAS_ON_LOGITS = ("kolibri1",)  # all others add it to the scores
OTHER_WEIGHTS = {"phimoe": "SparseMixer: each weight is a softmax over the experts close to the best one left"}


def build(folder):
    model_type = TYPES.get(folder, folder)
    config_class = CONFIG_MAPPING[model_type]
    known = {name: value for name, value in _EXPERT_FIELDS.items() if name in config_class.__dataclass_fields__}
    fields = _tiny_fields(config_class, OVERRIDES.get(model_type, {}) | known | FIELDS.get(folder, {}))
    if config_class.__dataclass_fields__["is_encoder_decoder"].default is True:
        fields["decoder_start_token_id"] = 2
    config = config_class(**fields)
    if folder in CLASSES:
        return getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), CLASSES[folder])(
            config
        )
    auto_class = next(
        auto
        for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel)
        if type(config) in auto._model_mapping
    )
    return auto_class.from_config(config)


def inputs_of(model):
    input_ids = torch.randint(5, VOCAB_SIZE - 5, (2, 6))
    return {"input_ids": input_ids} | ({"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {})


def observed(model, **inputs):
    seen = []
    with observe_routing(model, lambda *call: seen.append(call)):
        outputs = model(**inputs)
    return seen, outputs


@pytest.mark.parametrize("folder", [folder for folder in MIXTURES if folder not in UNSUPPORTED])
def test_every_mixture_of_transformers(folder):
    model = build(folder).eval()
    layers = find_mixture_layers(model)
    for layer in layers:
        assert model.get_submodule(layer.name) is layer.block
        with torch.no_grad():  # so that scores, bias and the function between decide together
            for parameter in layer.router.parameters():
                parameter.mul_(10.0 if parameter.dim() == 2 else 1.0)
            if layer.selection_bias is not None:
                layer.selection_bias.normal_(std=0.2)
    seen, _ = observed(model, **inputs_of(model))
    # Without an image, the experts of images are not called.
    called = sorted(layer.name for layer in layers if "vision" not in layer.name)
    assert sorted(layer.name for layer, _ in seen) == called
    for layer, routing in seen:
        assert routing.router_logits.shape == (12, layer.num_experts)
        assert routing.router_logits.requires_grad
        assert routing.top_k_index.shape == routing.top_k_weights.shape == (12, layer.top_k)
        assert routing.top_k_weights.isfinite().all()
        # The choice is the best by score and bias, so logits, scoring function, bias and index belong together.
        logits = routing.router_logits.float()
        scores = logits.softmax(-1) if layer.scoring_func == "softmax" else ACT2FN[layer.scoring_func](logits)
        ranked = logits if folder in BIAS_ON_LOGITS else scores
        biased = ranked if layer.selection_bias is None else ranked + layer.selection_bias
        best = biased.topk(layer.top_k).indices
        torch.testing.assert_close(routing.top_k_index.sort(-1).values, best.sort(-1).values)
        if (
            folder not in OTHER_WEIGHTS and layer.top_k > 1
        ):  # normalised or not, scaled or not: in proportion to the scores
            chosen = scores.gather(-1, routing.top_k_index)
            shares = routing.top_k_weights / routing.top_k_weights.sum(-1, keepdim=True)
            torch.testing.assert_close(shares.float(), chosen / chosen.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


RECORDED = ["mixtral", "qwen2_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe", "minimax", "deepseek_v3"]


@pytest.mark.parametrize("folder", RECORDED)
def test_logits_are_those_that_transformers_records(folder):
    model = build(folder).eval()
    seen, outputs = observed(model, **inputs_of(model), output_router_logits=True)
    assert len(seen) == len(outputs.router_logits) > 0
    for (_, routing), recorded in zip(seen, outputs.router_logits, strict=True):
        torch.testing.assert_close(routing.router_logits, recorded.reshape(-1, recorded.shape[-1]))


@pytest.mark.parametrize("folder", ["gemma4", "diffusion_gemma"])
def test_logits_are_raw_where_the_router_returns_probabilities(folder):
    model = build(folder).eval()
    (_, routing), *_ = observed(model, **inputs_of(model))[0]
    assert not torch.allclose(routing.router_logits.sum(-1), torch.ones(12))


def test_switch_reports_the_choice_and_what_capacity_dropped():
    model = build("switch_transformers").eval()
    for layer in find_mixture_layers(model):
        layer.router.expert_capacity = 1
        with torch.no_grad():
            layer.router.classifier.weight.zero_()[3] = 1e-3  # two rows differ: ties would be broken by position
        layer.router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]), *args[1:]))
    for _, routing in observed(model, **inputs_of(model))[0]:
        assert routing.top_k_index.eq(3).all()
        kept = torch.zeros(2, 6, dtype=torch.bool)
        kept[:, 0] = True  # one token a sequence
        torch.testing.assert_close(routing.kept, kept.reshape(12, 1))
        assert routing.top_k_weights[~routing.kept].eq(0).all()


def test_llama_4_weighs_with_its_scores():
    model = build("llama4").eval()
    returned = []
    for layer in find_mixture_layers(model):
        layer.router.register_forward_hook(lambda module, args, output: returned.append(output))
    for (_, routing), (scores, logits) in zip(observed(model, **inputs_of(model))[0], returned, strict=True):
        assert routing.router_logits is logits
        torch.testing.assert_close(routing.top_k_weights, scores.gather(-1, routing.top_k_index))


def test_the_expert_that_skips_is_the_last_class():
    model = build("zaya").eval()
    for layer in find_mixture_layers(model):
        with torch.no_grad():
            layer.selection_bias[-1] = 10.0
    for layer, routing in observed(model, **inputs_of(model))[0]:
        assert routing.top_k_index.eq(layer.num_experts - 1).all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("decoder", {}),
        ("decoder", {"scoring_func": "sigmoid"}),
        ("decoder", {"scoring_func": "cosine"}),
        ("decoder", {"router_type": "hash"}),
        ("decoder", {"capacity_factor": 0.5}),
        ("encoder", {"router_type": "expert_choice"}),
        ("encoder_decoder", {"router_type": "expert_choice"}),
    ],
)
def test_our_own_routing_is_reported_as_the_gate_returns_it(name, fields):
    model = tiny_sparse(name, **fields)
    returned = []
    for block in model.sparse_blocks:
        block.gate.register_forward_hook(lambda module, args, output: returned.append(output))
    layers = find_mixture_layers(model)
    assert [layer.block for layer in layers] == list(model.sparse_blocks)
    seen, _ = observed(model, **inputs_of(model))
    assert len(seen) == len(returned) == len(layers)
    for (layer, routing), expected in zip(seen, returned, strict=True):
        assert (layer.num_experts, layer.selection_bias is None) == (4, fields.get("scoring_func") != "sigmoid")
        for value, wanted in zip(routing, expected, strict=True):
            assert value is wanted or torch.equal(value, wanted)


def test_inside_peft_and_other_wrappers():
    bare = build("mixtral")
    names = [layer.name for layer in find_mixture_layers(bare)]
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.gate.weight"])
    model = torch.nn.DataParallel(get_peft_model(bare, config))
    layers = find_mixture_layers(model)
    assert [layer.name.removeprefix("module.base_model.model.") for layer in layers] == names
    assert {(layer.num_experts, layer.top_k, layer.scoring_func) for layer in layers} == {(EXPERTS, TOP_K, "softmax")}
    seen, _ = observed(model, **inputs_of(bare))
    assert len(seen) == len(layers)
    assert all(routing.top_k_index.shape == (12, TOP_K) for _, routing in seen)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("folder", ["mixtral", "llama4", "switch_transformers"])
def test_recomputation_is_not_reported_again(folder, use_reentrant):
    model = build(folder).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    inputs = inputs_of(model)
    recomputed = []
    seen = []
    with observe_routing(model, lambda *call: seen.append(call)):
        outputs = model(**inputs, labels=inputs["input_ids"], use_cache=False)
        calls = len(seen)
        seen[0][0].router.register_forward_hook(lambda *call: recomputed.append(call))
        outputs.loss.backward()
    assert recomputed, "gradient checkpointing was off"
    assert len(seen) == calls == len(find_mixture_layers(model))


def test_nothing_stays_after_it_and_a_class_is_never_touched():
    model, other = build("mixtral"), build("mixtral")
    before = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    seen = []
    observation = observe_routing(find_mixture_layers(model)[:1], lambda *call: seen.append(call))
    other(**inputs_of(other))
    assert not seen
    model(**inputs_of(model))
    assert len(seen) == 1
    observation.remove()
    observation.remove()
    model(**inputs_of(model))
    assert len(seen) == 1
    assert before == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_the_selection_bias_follows_the_model():
    model = build("deepseek_v3")
    layers = find_mixture_layers(model)
    model.double()
    assert all(layer.selection_bias.dtype == torch.float64 for layer in layers)


def test_a_dense_model_is_refused_by_its_class():
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        find_mixture_layers(tiny_dense("llama"))


@pytest.mark.parametrize("folder", sorted(set(UNSUPPORTED) & set(MIXTURES)))
def test_what_is_not_supported_is_refused(folder):
    model_type = {"doge": "doge", "vitpose_backbone": "vitpose_backbone"}[folder]
    fields = {"is_moe": True, "num_experts": 16} if folder == "doge" else {"num_experts": 2, "part_features": 8}
    config_class = CONFIG_MAPPING[model_type]
    auto_class = AutoModelForCausalLM if folder == "doge" else transformers.AutoBackbone
    model = auto_class.from_config(config_class(**_tiny_fields(config_class, fields)))
    with pytest.raises(ValueError, match="no sparse layer"):
        find_mixture_layers(model)
