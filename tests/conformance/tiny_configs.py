"""A tiny config of any model type: its own fields, found by their names, made small."""

from __future__ import annotations

from typing import Any

from overrides import OVERRIDES
from transformers import CONFIG_MAPPING, PreTrainedConfig


VOCAB_SIZE = 96

# What the architectures of transformers call the same few sizes.
_SIZES = {
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input decoder_vocab_size entity_vocab_size",
    64: "max_position_embeddings n_positions max_seq_len max_source_positions max_target_positions n_ctx "
    "max_encoder_position_embeddings max_decoder_position_embeddings",
    32: "hidden_size d_model n_embd n_embed dim emb_dim embedding_size attention_hidden_size hidden_dim_size "
    "word_embed_proj_dim",
    48: "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size hidden_dim d_inner dff "
    "inner_dim feed_forward_size ffn_hidden_dim dim_ff block_ff_dim",
    2: "num_hidden_layers num_layer n_layer n_layers num_layers num_decoder_layers num_encoder_layers encoder_layers "
    "decoder_layers num_block_layers "
    "num_key_value_heads num_kv_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads",
    8: "head_dim d_kv attention_head_size sliding_window global_head_dim",
    16: "max_window_layers position_buckets",
}
_SIZE_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of `model_type`, small enough to run in a moment."""
    return CONFIG_MAPPING[model_type](**_tiny_fields(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {})))


def _tiny_fields(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in config_class.__dataclass_fields__.items():
        default = field.default
        if name in _SIZE_BY_NAME:
            fields[name] = _SIZE_BY_NAME[name]
        elif name in _TOKENS:
            fields[name] = _TOKENS[name]
        elif name.endswith("_token_id") and isinstance(default, int) and default >= VOCAB_SIZE:
            fields[name] = 3
    for name, sub_class in config_class.sub_configs.items():
        if isinstance(overrides.get(name, {}), dict) and hasattr(sub_class, "__dataclass_fields__"):
            if sub_class is not PreTrainedConfig and "model_type" in vars(sub_class):
                fields[name] = sub_class(**_tiny_fields(sub_class, overrides.get(name, {})))
    return fields | {name: value for name, value in overrides.items() if name not in fields or not isinstance(value, dict)}
