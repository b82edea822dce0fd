"""What the generic shrinking of a config does not know, by model type. Data."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "mamba_n_groups": 1}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_BYTES = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_FSMT = {"src_vocab_size": 96, "tgt_vocab_size": 96, "langs": ["en", "de"]}
_BERT = {
    "model_type": "bert",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

# Fields that a config needs beyond its sizes.
OVERRIDES = {
    "bailing_hybrid": {**_HYBRID, **_LATENT, "num_key_value_heads": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 96,
        "patcher_config": _BYTES,
        "encoder_config": {**_BYTES, "hidden_size_global": 32},
        "decoder_config": {**_BYTES, "hidden_size_global": 32},
        "global_config": _BYTES,
    },
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cpmant": {"prompt_length": 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "encoder-decoder": {"encoder": _BERT, "decoder": {**_BERT, "is_decoder": True, "add_cross_attention": True}},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "fsmt": _FSMT,
    "fuyu": {"text_config": {**_BERT, "model_type": "persimmon", "max_position_embeddings": 64}},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.95, 0.0],
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **_MAMBA,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
    },
    "jamba": {
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "led": {"attention_window": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minicpm3": {**_LATENT, "num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_blocks": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen3_5": {"text_config": {**_HYBRID, **_LINEAR}},
    "qwen3_5_text": {**_HYBRID, **_LINEAR},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 96,
        "shape_vocab_size": 96,
        "pronunciation_embed_dim": 32,
        "shape_embed_dim": 32,
    },
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "xlstm": {"embedding_dim": 32, "num_blocks": 2, "use_cache": False, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "youtu": {**_LATENT, "num_key_value_heads": 4},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4, "mamba_d_state": 8},
}

# Sequence lengths that a type asks for in training.
LENGTHS = {"perceiver": 64, "reformer": 64}

# Said of exact types that can be mixtures.
NOTES = {
    "doge": "with `is_moe=False`, its default",
    "gemma4_text": "with `enable_moe_block=False`, its default",
    "granitemoehybrid": "with `num_local_experts=0`",
    "jamba": "with `num_experts=1`",
}

_OTHER_MODEL = "a draft model, which reads another model's hidden states"
# Types whose Auto class builds no text model, or none from a config.
NOT_BUILT = {
    "dots3_note": "multimodal, and a mixture of experts already",
    "emu3": "multimodal; no Auto class takes its text part, `emu3_text_model`",
    "gemma3n": "multimodal",
    "gemma4_assistant": _OTHER_MODEL,
    "gemma4_unified_assistant": _OTHER_MODEL,
    "mllama": "multimodal; no Auto class takes its text part, `mllama_text_model`",
    "musicgen": "writes audio codes, not text",
    "musicgen_melody": "writes audio codes, not text",
}

_RECURRENT = "no feed-forward: its layers are state-space mixers"
# What `upcycle` refuses: status and reason.
REFUSED = {
    "blt": ("unsupported", "it runs its patcher, whose feed-forwards match too, without gradients"),
    "bitnet": ("unsupported", "a norm between the activation and the second projection"),
    "falcon_mamba": ("not applicable", _RECURRENT),
    "gemma3n_text": ("unsupported", "the activation is cut to the largest values of the gate (`activation_sparsity`)"),
    "gte": ("unsupported", "only the second projection has a bias"),
    "ibert": ("unsupported", "quantised linear layers that carry scaling factors along"),
    "mamba": ("not applicable", _RECURRENT),
    "mamba2": ("not applicable", _RECURRENT),
    "rwkv": ("not applicable", "no feed-forward of its own: channel mixing reads the token before, too"),
    "squeezebert": ("unsupported", "grouped convolutions in the place of linear layers"),
    "zamba": ("unsupported", "the layers of one kind tie their feed-forwards to one another"),
    "zamba2": ("unsupported", "one feed-forward shared by many layers, with adapters of each layer inside it"),
}
