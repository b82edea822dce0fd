"""transformers' own `ModelTesterMixin` on one tiny model a family, and on stock Mixtral in the same setting.

Collected only by `run.py`, which puts transformers' test files on the path: the wheel of transformers has none.
"""

import importlib
import os
import sys
import types
import unittest

import torch
import transformers
from transformers import MixtralConfig, ModernBertConfig, Qwen3Config, T5Config
from transformers.models.auto import modeling_auto

import hf_sparse_moe as moe


def import_tester_mixin(folder: str) -> type:
    """Import `ModelTesterMixin` from the unpacked sdist, whose `tests/` lacks the sub-folders that it imports."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [folder]
    sys.modules[package.__name__] = package
    for name, attribute in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent, _ = name.split(".")
        sys.modules.setdefault(f"transformers_tests.{parent}", types.ModuleType(f"transformers_tests.{parent}"))
        stub = types.ModuleType(f"transformers_tests.{name}")
        setattr(stub, attribute, type(attribute, (), {}))
        sys.modules[stub.__name__] = stub
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


ModelTesterMixin = import_tester_mixin(os.environ["TRANSFORMERS_TESTS"])

# The mixin picks the labels of a class by looking its name up in these tables; a base model has none.
for table, suffix in (
    (modeling_auto.MODEL_MAPPING_NAMES, "Model"),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "ForMaskedLM"),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "ForCausalLM"),
    (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "ForConditionalGeneration"),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "ForSequenceClassification"),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "ForTokenClassification"),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "ForQuestionAnswering"),
    (modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, "ForMultipleChoice"),
):
    for family in ("Encoder", "Decoder", "EncoderDecoder"):
        if hasattr(moe, f"SparseMoe{family}{suffix}"):
            table[f"sparse_moe_{family.lower()}"] = f"SparseMoe{family}{suffix}"


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Few: the RoPE tests run a sequence of one and a half times their number.
POSITIONS = {"max_position_embeddings": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


class TinyModel:
    """What the mixin asks of a model tester: sizes, a config and a batch."""

    batch_size, seq_length, num_choices, is_training = 3, 7, 4, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = SIZES.values()

    def __init__(self, get_config, is_encoder_decoder: bool):
        self.get_config = get_config
        self.is_encoder_decoder = is_encoder_decoder

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": torch.randint(3, self.vocab_size, shape),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        if self.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, self.vocab_size, shape)
            inputs["decoder_attention_mask"] = torch.ones(shape, dtype=torch.long)
        return self.get_config(), inputs


def mixtral_config():
    return MixtralConfig(
        **SIZES, **TOKENS, **POSITIONS, intermediate_size=64, num_key_value_heads=2, head_dim=8, num_local_experts=4
    )


def encoder_config():
    dense = ModernBertConfig(**SIZES, **TOKENS, **POSITIONS, cls_token_id=1, sep_token_id=2, intermediate_size=64)
    return moe.SparseMoeEncoderConfig(dense_config=dense, **MIXTURE)


def decoder_config():
    dense = Qwen3Config(**SIZES, **TOKENS, **POSITIONS, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    return moe.SparseMoeDecoderConfig(dense_config=dense, **MIXTURE)


def encoder_decoder_config():
    sizes = {"vocab_size": 99, "d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    # The factor is that of transformers' own T5 tests: at 1 the outputs are so large that half precision rounds them
    # by more than the mixin's tolerance.
    layout = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "initializer_factor": 0.002}
    dense = T5Config(**sizes, **tokens, **layout, d_ff=64)
    return moe.SparseMoeEncoderDecoderConfig(dense_config=dense, **MIXTURE)


# They train on a loss that is no output of the model, which a model with a balance loss refuses.
LOSSES_OF_THEIR_OWN = (
    "test_retain_grad_hidden_states_attentions",
    "test_enable_input_require_grads_with_gradient_checkpointing",
)


class Case(ModelTesterMixin):
    is_encoder_decoder = False
    test_all_params_have_gradient = False  # an expert that no token chose has none

    def setUp(self):
        self.model_tester = TinyModel(self._config, self.is_encoder_decoder)

    def _config(self):
        config = self.make_config()
        if self._testMethodName in LOSSES_OF_THEIR_OWN:
            config.router_aux_loss_coef = 0.0
        return config


class MixtralTest(Case, unittest.TestCase):
    make_config = staticmethod(mixtral_config)
    all_model_classes = (transformers.MixtralModel, transformers.MixtralForCausalLM)


class EncoderTest(Case, unittest.TestCase):
    _is_composite = True
    make_config = staticmethod(encoder_config)
    all_model_classes = (
        moe.SparseMoeEncoderModel,
        moe.SparseMoeEncoderForMaskedLM,
        moe.SparseMoeEncoderForSequenceClassification,
        moe.SparseMoeEncoderForTokenClassification,
        moe.SparseMoeEncoderForQuestionAnswering,
        moe.SparseMoeEncoderForMultipleChoice,
    )


class DecoderTest(Case, unittest.TestCase):
    _is_composite = True
    make_config = staticmethod(decoder_config)
    all_model_classes = (
        moe.SparseMoeDecoderModel,
        moe.SparseMoeDecoderForCausalLM,
        moe.SparseMoeDecoderForSequenceClassification,
        moe.SparseMoeDecoderForTokenClassification,
        moe.SparseMoeDecoderForQuestionAnswering,
    )


class EncoderDecoderTest(Case, unittest.TestCase):
    _is_composite = True
    is_encoder_decoder = True
    make_config = staticmethod(encoder_decoder_config)
    # Without ForSequenceClassification: T5's head wants an end-of-sequence token in every row, and the mixin makes
    # rows of random tokens.
    all_model_classes = (
        moe.SparseMoeEncoderDecoderModel,
        moe.SparseMoeEncoderDecoderForConditionalGeneration,
        moe.SparseMoeEncoderDecoderForQuestionAnswering,
    )


del Case  # only the four above are tests
