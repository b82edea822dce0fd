"""Mixtures that people have: the config.json of the Hub with smaller sizes, read, equal, and written back."""

import json

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from hf_sparse_moe.stock import export, import_stock
from tiny_models import enlarge_weights


_TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 16, "type": "yarn"}
_DEEPSEEK = {
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rope_theta": 10000,
    "seq_aux": True,
    "v_head_dim": 16,
}
_GLM = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "pad_token_id": 0,
    "eos_token_id": [1, 2, 3],
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 2,
    "rope_scaling": None,
    "num_nextn_predict_layers": 1,
}
PUBLISHED = {
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "DeepSeek-V2-Lite": _DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "n_group": 1,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "DeepSeek-V2": _DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "n_group": 4,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
        "q_lora_rank": 16,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 16.0,
        "scoring_func": "softmax",
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "DeepSeek-V3": _DEEPSEEK
    | {
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "n_group": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 3,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 16,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
    },
    "dots.llm1": {
        "model_type": "dots1",
        "attention_bias": False,
        "eos_token_id": 2,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "max_window_layers": 62,
        "moe_intermediate_size": 24,
        "moe_layer_freq": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_experts_per_tok": 6,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "routed_scaling_factor": 2.5,
        "scoring_func": "noaux_tc",
        "sliding_window": None,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 1,
        "max_window_layers": 21,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 96,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "eos_token_id": 50,
        "intermediate_size": 24,
        "norm_topk_prob": False,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "pad_token_id": 1,
        "rope_scaling": None,
    },
    "Granite-3.0-1B-A400M": {
        "model_type": "granitemoe",
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 12.0,
        "intermediate_size": 24,
        "logits_scaling": 2.0,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "residual_multiplier": 0.22,
        "router_aux_loss_coef": 0.0,
        "tie_word_embeddings": True,
    },
    "GLM-4.5": {**_GLM, "use_qk_norm": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 2},
    "GLM-4.5-Air": {**_GLM, "use_qk_norm": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1},
}


@pytest.fixture
def published(request, tmp_path):
    """The folder of a tiny model with the config.json that its model has on the Hub."""
    config = _COMMON | _TINY | request.param
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(folder), dtype=torch.float32)
    enlarge_weights(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) / 10)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return folder


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED.keys(), indirect=True)
def test_what_was_published_is_read_and_written_back(published, tmp_path):
    """Longer than YaRN's first positions, so that the scaled ones matter."""
    stock = AutoModelForCausalLM.from_pretrained(published).eval()
    ours = import_stock(published)
    input_ids = torch.randint(4, 99, (2, 40))
    with torch.no_grad():
        expected, found = stock(input_ids).logits, ours(input_ids).logits
        export(ours, tmp_path / "back", architecture=stock.config.model_type)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()(input_ids).logits
    assert expected.std() > 0.5
    for logits in (found, back):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
