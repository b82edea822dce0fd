"""
Tiny models for the tests, one of each architecture that the package names, dense and sparse.

Weights are drawn far larger than transformers draws them, so that the feed-forwards and the routing matter: a test
that compares outputs would otherwise compare little more than the embeddings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import transformers as hf
from torch import nn

import hf_sparse_moe


VOCAB_SIZE = 96
WEIGHT_STD = 0.3
FIRST_ORDINARY_TOKEN = 5

CONFIG_CLASSES = {
    "encoder": hf_sparse_moe.SparseMoeEncoderConfig,
    "decoder": hf_sparse_moe.SparseMoeDecoderConfig,
    "encoder_decoder": hf_sparse_moe.SparseMoeEncoderDecoderConfig,
}
LANGUAGE_MODELS = {
    "encoder": hf.AutoModelForMaskedLM,
    "decoder": hf.AutoModelForCausalLM,
    "encoder_decoder": hf.AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class Architecture:
    family: str
    config_class: type[hf.PreTrainedConfig]
    fields: dict

    def config(self, **changes) -> hf.PreTrainedConfig:
        return self.config_class(**{**self.fields, **changes})


_IDS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_PLAIN = {**_IDS, **_SIZES, "max_position_embeddings": 64}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2}
_HEAD_DIM = {**_GROUPED, "head_dim": 8}
_T5 = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5_GEMMA_SIDE = hf.T5GemmaModuleConfig(**_HEAD_DIM).to_dict()

ARCHITECTURES = {
    "llama": Architecture("decoder", hf.LlamaConfig, _GROUPED),
    "qwen2": Architecture("decoder", hf.Qwen2Config, _GROUPED),
    "qwen3": Architecture("decoder", hf.Qwen3Config, _HEAD_DIM),
    "mistral": Architecture("decoder", hf.MistralConfig, _GROUPED),
    "gemma2": Architecture("decoder", hf.Gemma2Config, _HEAD_DIM),
    "gemma3_text": Architecture("decoder", hf.Gemma3TextConfig, _HEAD_DIM),
    "phi3": Architecture("decoder", hf.Phi3Config, _GROUPED),
    "olmo2": Architecture("decoder", hf.Olmo2Config, _GROUPED),
    "smollm3": Architecture("decoder", hf.SmolLM3Config, _GROUPED),
    "gpt2": Architecture(
        "decoder", hf.GPT2Config, {**_IDS, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ),
    "gpt_neox": Architecture("decoder", hf.GPTNeoXConfig, _PLAIN),
    "opt": Architecture(
        "decoder",
        hf.OPTConfig,
        {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "intermediate_size": None},
    ),
    "falcon": Architecture("decoder", hf.FalconConfig, {**_PLAIN, "ffn_hidden_size": 48, "intermediate_size": None}),
    "starcoder2": Architecture("decoder", hf.Starcoder2Config, _GROUPED),
    "bert": Architecture("encoder", hf.BertConfig, _PLAIN),
    "roberta": Architecture("encoder", hf.RobertaConfig, {**_PLAIN, "pad_token_id": 1, "bos_token_id": 0}),
    "xlm_roberta": Architecture("encoder", hf.XLMRobertaConfig, {**_PLAIN, "pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": Architecture(
        "encoder",
        hf.DistilBertConfig,
        {**_IDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "electra": Architecture("encoder", hf.ElectraConfig, {**_PLAIN, "embedding_size": 16}),
    "deberta_v2": Architecture(
        "encoder",
        hf.DebertaV2Config,
        {**_PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "modernbert": Architecture("encoder", hf.ModernBertConfig, {**_PLAIN, "cls_token_id": 1, "sep_token_id": 2}),
    "eurobert": Architecture("encoder", hf.EuroBertConfig, {**_GROUPED, "mask_token_id": 3}),
    "t5": Architecture("encoder_decoder", hf.T5Config, _T5),
    "t5_gated": Architecture(
        "encoder_decoder", hf.T5Config, {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "mt5": Architecture("encoder_decoder", hf.MT5Config, _T5),
    "bart": Architecture("encoder_decoder", hf.BartConfig, _BART),
    "mbart": Architecture("encoder_decoder", hf.MBartConfig, _BART),
    "marian": Architecture("encoder_decoder", hf.MarianConfig, _BART),
    "pegasus": Architecture("encoder_decoder", hf.PegasusConfig, _BART),
    "m2m_100": Architecture("encoder_decoder", hf.M2M100Config, _BART),
    "t5gemma": Architecture(
        "encoder_decoder",
        hf.T5GemmaConfig,
        {"encoder": _T5_GEMMA_SIDE, "decoder": _T5_GEMMA_SIDE, "vocab_size": VOCAB_SIZE, "tie_word_embeddings": True},
    ),
}

# The architectures that the conformance tests run on, the family's own first. Between them: gated, packed and plain,
# biased and not, inline and split, pre- and post-norm, tied and untied embeddings.
FAMILIES = {
    "encoder": ("bert", "modernbert"),
    "decoder": ("llama", "gpt2", "qwen3"),
    "encoder_decoder": ("t5", "bart", "t5_gated"),
}
BACKBONES = [name for names in FAMILIES.values() for name in names]


def architecture_of(name: str) -> tuple[str, Architecture]:
    """Name and entry of an architecture, or of a family's first one."""
    name = FAMILIES[name][0] if name in FAMILIES else name
    return name, ARCHITECTURES[name]


def enlarge_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw matrices with a deviation that makes them matter, and shake vectors, in place."""
    generator = torch.Generator().manual_seed(seed)
    dense_config = getattr(model.config, "dense_config", model.config)
    # T5 does not scale its attention scores: weights of the common size would make its attention one-hot.
    std = WEIGHT_STD / 2 if dense_config.model_type in ("t5", "mt5") else WEIGHT_STD
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # Marian's sinusoidal positions
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(std * noise)
            else:
                parameter.add_(std / 2 * noise)
    return model


def tiny_dense(name: str, auto_class: type | None = None, **config_fields) -> hf.PreTrainedModel:
    """
    A dense model in evaluation mode.

    Args:
        name (`str`): A key of `ARCHITECTURES` or `FAMILIES`.
        auto_class (`type`, *optional*): Chooses the head; the family's language model by default.
        **config_fields: Changes to the dense config.
    """
    return _copy_of_one_built_once("dense", name, auto_class, None, config_fields)


def tiny_config(name: str, dense_fields: dict | None = None, **fields) -> hf_sparse_moe.SparseMoeConfig:
    """The sparse config of an architecture: 4 experts, 2 a token, unless `fields` say otherwise."""
    return _copy_of_one_built_once("config", name, None, dense_fields, fields)


def tiny_sparse(
    name: str, auto_class: type | None = None, dense_fields: dict | None = None, **fields
) -> hf_sparse_moe.SparseMoePreTrainedModel:
    """
    A sparse model in evaluation mode, its experts all different.

    Args:
        name (`str`): A key of `ARCHITECTURES` or `FAMILIES`.
        auto_class (`type`, *optional*): Chooses the head; the family's language model by default.
        dense_fields (`dict`, *optional*): Changes to the dense config.
        **fields: Fields of the sparse config.
    """
    return _copy_of_one_built_once("sparse", name, auto_class, dense_fields, fields)


_built: dict[str, hf.PreTrainedModel | hf.PreTrainedConfig] = {}


def _copy_of_one_built_once(kind: str, name: str, auto_class: type | None, dense_fields: dict | None, fields: dict):
    """Building a sparse model takes ten times as long as copying it. Neither draws from the test's random numbers."""
    key = repr((kind, name, auto_class, dense_fields, fields, torch.get_default_dtype(), torch.get_default_device()))
    if key not in _built:
        if len(_built) >= 100:
            _built.clear()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            _built[key] = _build(kind, name, auto_class, dense_fields, fields)
    return copy.deepcopy(_built[key])


def _build(kind: str, name: str, auto_class: type | None, dense_fields: dict | None, fields: dict):
    _, architecture = architecture_of(name)
    if kind == "dense":
        config = architecture.config(**fields)
    else:
        sparse_fields = {"num_experts": 4, "num_experts_per_tok": 2, **fields}
        dense = architecture.config(**(dense_fields or {}))
        config = CONFIG_CLASSES[architecture.family].from_dense(dense, **sparse_fields)
    if kind == "config":
        return config
    auto_class = auto_class or LANGUAGE_MODELS[architecture.family]
    return enlarge_weights(auto_class.from_config(config)).eval()


def tiny_inputs(
    model: hf.PreTrainedModel, labels: bool = True, batch: int = 2, length: int = 7, pads: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    Inputs for a dense or sparse model, with the labels that its head takes.

    Args:
        labels (`bool`): Whether to give labels; without them an encoder-decoder gets `decoder_input_ids`.
        pads (`int`): Pads at the end of the first row, and -100 in its labels.
    """
    config, head = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(seed)

    def random_ids(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    input_ids = random_ids(VOCAB_SIZE, batch, length, low=FIRST_ORDINARY_TOKEN)
    attention_mask = torch.ones_like(input_ids)
    if isinstance(config.eos_token_id, int):
        input_ids[:, -1 - pads] = config.eos_token_id  # BART's classification head reads the last end token
    if pads:
        attention_mask[0, -pads:] = 0
        input_ids[0, -pads:] = config.pad_token_id
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    has_head = "For" in head or "LMHead" in head
    if head.endswith("ForMultipleChoice"):
        inputs = {key: value[:, None].repeat(1, 3, 1) for key, value in inputs.items()}
        inputs["input_ids"] = random_ids(VOCAB_SIZE, batch, 3, length, low=FIRST_ORDINARY_TOKEN)
        targets = {"labels": random_ids(3, batch)}
    elif head.endswith("ForQuestionAnswering"):
        targets = {
            "start_positions": random_ids(length - pads, batch),
            "end_positions": random_ids(length - pads, batch),
        }
    elif head.endswith("ForSequenceClassification"):
        targets = {"labels": random_ids(config.num_labels, batch)}
    else:
        classes = config.num_labels if head.endswith("ForTokenClassification") else VOCAB_SIZE
        wanted = random_ids(classes, batch, length) if classes != VOCAB_SIZE else input_ids.clone()
        wanted[-1, 1] = -100  # one label fewer than tokens, so that counting tokens would be noticed
        targets = {"labels": wanted.masked_fill(attention_mask == 0, -100)}
    if labels and has_head:
        inputs |= targets
    is_seq2seq_lm = config.is_encoder_decoder and not head.endswith(
        ("ForSequenceClassification", "ForQuestionAnswering")
    )
    if is_seq2seq_lm and not (labels and has_head):
        inputs["decoder_input_ids"] = random_ids(VOCAB_SIZE, batch, length - 2, low=FIRST_ORDINARY_TOKEN)
    return inputs


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout of a model, module or number, to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model
