"""One tiny dense model for each layout of feed-forwards that the package knows, with its classes, and its mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers as hf

import hf_sparse_moe as moe


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Few positions: the RoPE tests run a sequence of one and a half times their number.
PLAIN = {**TOKENS, **SIZES, "intermediate_size": 64, "max_position_embeddings": 64}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
_SIDES = {"vocab_size": 99, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
# The factor is that of transformers' own T5 tests: at 1 the outputs are so large that half precision rounds them by
# more than the suite's tolerance.
T5 = {**_SIDES, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64}
T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "initializer_factor": 0.002}
BART = {
    **_SIDES, "bos_token_id": 1, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip

HEADS = {
    "Encoder": ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"),
    "Decoder": ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"),
    # Without sequence classification: the heads of T5 and BART want an end token in every row, and the suite makes
    # rows of random tokens.
    "EncoderDecoder": ("ConditionalGeneration", "QuestionAnswering"),
}


@dataclass(frozen=True)
class Backbone:
    """A dense architecture: its family here, the stem of its class names, and a tiny config."""

    family: str
    stem: str
    fields: dict[str, Any]
    config_class: str = ""

    def dense_config(self) -> hf.PreTrainedConfig:
        return getattr(hf, self.config_class or f"{self.stem}Config")(**self.fields)

    def mixture_config(self) -> moe.SparseMoeConfig:
        config_class = getattr(moe, f"SparseMoe{self.family}Config")
        sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        return config_class(dense_config=self.dense_config(), **sizes)

    def classes(self, sparse: bool) -> tuple[type, ...]:
        """Those of its heads that both the dense architecture and the family have."""
        found = [(f"{self.stem}Model", f"SparseMoe{self.family}Model")]
        for head in HEADS[self.family]:
            own = "LMHeadModel" if (self.stem, head) == ("GPT2", "CausalLM") else f"For{head}"
            found.append((f"{self.stem}{own}", f"SparseMoe{self.family}For{head}"))
        pairs = [pair for pair in found if hasattr(hf, pair[0])]
        return tuple(getattr(moe, ours) if sparse else getattr(hf, dense) for dense, ours in pairs)


BACKBONES = {
    "ModernBERT": Backbone("Encoder", "ModernBert", {**PLAIN, "cls_token_id": 1, "sep_token_id": 2}),
    "BERT": Backbone("Encoder", "Bert", PLAIN),
    "RoBERTa": Backbone("Encoder", "Roberta", PLAIN),
    "DeBERTa-v2": Backbone("Encoder", "DebertaV2", PLAIN),
    "Qwen3": Backbone("Decoder", "Qwen3", GROUPED),
    "Gemma 2": Backbone("Decoder", "Gemma2", GROUPED),
    "Phi-3": Backbone("Decoder", "Phi3", {**PLAIN, "num_key_value_heads": 2}),
    "GPT-NeoX": Backbone("Decoder", "GPTNeoX", PLAIN),
    "GPT-2": Backbone(
        "Decoder", "GPT2", {**TOKENS, "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ),
    "OPT": Backbone("Decoder", "OPT", {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "T5 v1.1": Backbone("EncoderDecoder", "T5", T5),
    "mT5": Backbone("EncoderDecoder", "MT5", T5),
    "BART": Backbone("EncoderDecoder", "Bart", BART),
}


def identifier(name: str, sparse: bool) -> str:
    """The name of the class of tests."""
    return f"{'Sparse' if sparse else 'Dense'}{''.join(letter for letter in name if letter.isalnum())}"
