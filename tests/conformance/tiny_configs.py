"""A tiny config of any model type: the fields that its class has, found by their names, made small."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from conformance.overrides import OVERRIDES


VOCAB_SIZE = 96

# What the architectures of transformers call the same few sizes.
_NAMES_BY_SIZE = {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input decoder_vocab_size entity_vocab_size",
    64: "max_position_embeddings n_positions max_seq_len max_source_positions max_target_positions n_ctx "
    "max_encoder_position_embeddings max_decoder_position_embeddings",
    32: "hidden_size d_model n_embd n_embed dim emb_dim embedding_size attention_hidden_size word_embed_proj_dim "
    "moe_intermediate_size",
    48: "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim d_inner "
    "dff inner_dim feed_forward_size dim_ff",
    2: "num_hidden_layers num_layer n_layer n_layers num_layers num_decoder_layers num_encoder_layers encoder_layers "
    "decoder_layers num_key_value_heads num_kv_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads",
    8: "head_dim d_kv attention_head_size sliding_window global_head_dim",
    # The first layers of some mixtures are dense; with two layers in all, one must be left for the experts.
    1: "first_k_dense_replace num_dense_layers",
}
_SIZES = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_LAST_TOKEN = VOCAB_SIZE - 1


def tiny_config(model_type: str, head: str = "causal") -> PreTrainedConfig:
    """
    A config small enough to run in a moment.

    Args:
        model_type (`str`): A key of transformers' `CONFIG_MAPPING`.
        head (`str`): With `"causal"` a type that can be both is asked to be a decoder.
    """
    config_class = CONFIG_MAPPING[model_type]
    fields = _tiny_fields(config_class, OVERRIDES.get(model_type, {}))
    if config_class.__dataclass_fields__["is_encoder_decoder"].default is True:
        fields["decoder_start_token_id"] = _TOKENS["decoder_start_token_id"]  # T5 declares none, and needs one
    elif head == "causal" and "is_decoder" in config_class.__dataclass_fields__:
        fields["is_decoder"] = True
    return config_class(**fields)


def _tiny_fields(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in config_class.__dataclass_fields__.items():
        if name in _SIZES:
            fields[name] = _SIZES[name]
        elif name in _TOKENS:
            fields[name] = _TOKENS[name]
        elif name.endswith("_token_id") and isinstance(field.default, int) and field.default >= VOCAB_SIZE:
            fields[name] = _LAST_TOKEN
    for name, part_class in config_class.sub_configs.items():
        if "model_type" in vars(part_class) and part_class is not PreTrainedConfig and name not in overrides:
            fields[name] = part_class(**_tiny_fields(part_class, {}))
    for name, value in overrides.items():
        part_class = config_class.sub_configs.get(name)
        is_part = isinstance(value, dict) and part_class is not None and "model_type" not in value
        fields[name] = part_class(**_tiny_fields(part_class, value)) if is_part else value
    return fields
