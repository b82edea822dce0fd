"""What a config needs beyond sizes, by model type. Data, with the reason where it is not a size."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "mamba_n_groups": 1}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_FSMT = {"src_vocab_size": 96, "tgt_vocab_size": 96, "langs": ["en", "de"]}
_BERT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}

OVERRIDES = {
    "bailing_hybrid": {**_HYBRID, **_LATENT},
    "bamba": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {},
    "dbrx": {"attn_config": None, "ffn_config": None},
    "dots1": {"n_routed_experts": 4},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "fsmt": _FSMT,
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "led": {"attention_window": [4, 4], "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "mamba2": {"num_heads": 8},
    "minicpm3": {**_LATENT, "num_key_value_heads": 4},
    "neomme": {"head_dim": 16},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2, "num_blocks": 1, "num_self_attention_heads": 4, "num_cross_attention_heads": 4},
    "qwen3_5": {"text_config": {**_HYBRID, **_LINEAR}},
    "qwen3_5_text": {**_HYBRID, **_LINEAR},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "is_decoder": True, "attn_layers": ["local", "local"], "local_attn_chunk_length": 16},
    "roc_bert": {"pronunciation_vocab_size": 96, "shape_vocab_size": 96, "pronunciation_embed_dim": 32, "shape_embed_dim": 32},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "xmod": {"default_language": "en_XX"},
    "youtu": {**_LATENT, "num_key_value_heads": 4},
    "zamba": {"layer_types": None},
}
