"""Parameters and floating-point operations of a mixture, counted on a model without storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .configuration_sparse_moe import SparseMoeConfig
from .modeling_sparse_moe import AUTO_CLASSES
from .pretrained_model import SparseMoePreTrainedModel
from .quantization import is_expert_weight, packed_bits, packed_form


def meta_model(config: SparseMoeConfig) -> SparseMoePreTrainedModel:
    """The family's language model of `config`, on the meta device: shapes, no weights."""
    classes = AUTO_CLASSES[type(config)]
    language_model = next(cls for auto_class, cls in classes.items() if auto_class.__name__ in _LANGUAGE_MODELS)
    with torch.device("meta"):
        return language_model(type(config).from_dict(config.to_dict()))


_LANGUAGE_MODELS = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


def count_parameters(model: SparseMoePreTrainedModel, only_active: bool = False) -> int:
    """Parameters of `model`, tied ones once; with `only_active`, of the routed experts only those of one token."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if only_active:
        for block in model.sparse_blocks:
            count = block.experts.num_experts
            experts = sum(parameter.numel() for parameter in block.experts.parameters(recurse=False))
            total -= round(experts // count * (count - model.config.mean_experts_per_token))
    return total


def count_bytes(model: SparseMoePreTrainedModel) -> int:
    """
    What the weights of `model`, which may have no storage, take on disk in the dtype that its config names, tied ones
    once; experts in the bits that it names. Linear layers that are quantised too count as floats.
    """
    dtype, bits = getattr(model.config, "dtype", None) or torch.float32, packed_bits(model.config)
    itemsize = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    total = 0
    for name, parameter in model.named_parameters():
        if bits is not None and is_expert_weight(model, name):
            total += sum(part.nbytes for part in packed_form(name, parameter, bits).values())
        else:
            total += parameter.numel() * itemsize
    return total


def count_flops_per_token(model: SparseMoePreTrainedModel) -> int:
    """See [`SparseMoeConfig.flops_per_token`]: 2 for each weight that a token meets in a matrix product."""
    output_head: Any = model.get_output_embeddings()
    weights = 0
    for block in model.sparse_blocks:
        one_expert = block.experts.intermediate_dim * block.experts.hidden_dim * (3 if block.experts.gated else 2)
        router = sum(parameter.numel() for parameter in block.gate.parameters() if parameter.dim() == 2)
        weights += router + round(one_expert * model.config.mean_experts_per_token)
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output_head:
            weights += module.weight.numel()
    return 2 * (weights + (0 if output_head is None else output_head.weight.numel()))
