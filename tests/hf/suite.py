"""transformers' own `ModelTesterMixin` on tiny mixtures of several backbones, and on the dense backbones themselves.

Collected only by `run.py`, which puts transformers' test files on the path: the wheel of transformers has none.
"""

import importlib
import os
import sys
import types
import unittest

import torch
from transformers.models.auto import modeling_auto

import hf_sparse_moe as moe
from hf.backbones import BACKBONES, SIZES, Backbone, identifier


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


class Case(ModelTesterMixin):
    test_all_params_have_gradient = False  # an expert that no token chose has none
    backbone: Backbone
    is_sparse: bool

    def setUp(self):
        config = self.backbone.mixture_config if self.is_sparse else self.backbone.dense_config
        self.model_tester = TinyModel(config, self.is_encoder_decoder)


for name, backbone in BACKBONES.items():
    for sparse in (False, True):
        attributes = {
            "backbone": backbone,
            "is_sparse": sparse,
            "is_encoder_decoder": backbone.family == "EncoderDecoder",
            "all_model_classes": backbone.classes(sparse),
            "__module__": __name__,
            **({"_is_composite": True} if sparse else {}),
        }
        globals()[identifier(name, sparse)] = type(identifier(name, sparse), (Case, unittest.TestCase), attributes)

del Case  # only those made of it are tests
