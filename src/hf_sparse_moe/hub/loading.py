"""Loading a checkpoint's own class, ours or a stock one, without running code that came with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.config import read_config, sensible_config
from hf_sparse_moe.checkpoints.source import find_source, named_architecture, weight_files
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers

from .adapter_base import is_mixture


def load_checkpoint(folder: Path, dtype: str | torch.dtype = "auto") -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    The model of a folder in evaluation mode, and what transformers says about the loading. Raises a `ValueError` for
    no checkpoint in safetensors, or none of a class that this package or transformers has.
    """
    source = find_source(folder)
    weight_files(source)  # an index that names files elsewhere is refused
    config = read_config(source)
    name, found = str(named_architecture(config)), None
    if isinstance(config, SparseMoeConfig):
        found = next((known for known in AUTO_CLASSES[type(config)].values() if known.__name__ == name), None)
    else:
        found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"`{source.name}` names no class of this package or of transformers in `architectures` ({name!r}). Pass a "
            "checkpoint that was saved by one."
        )
    # Tensors of other shapes are told as a finding, with the rest.
    told: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with sensible_config(source):
        loaded: Any = found.from_pretrained(folder, dtype=dtype, **told)
    return loaded[0].eval(), loaded[1]


def load_whole(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """As [`load_checkpoint`]; raises a `ValueError` where weights are missing."""
    model, info = load_checkpoint(folder, dtype)
    if missing := fresh_tensors(info):
        raise ValueError(
            f"`{folder.name}` lacks weights that its config asks for, such as `{missing[0]}`. Save the model again."
        )
    return model


def fresh_tensors(info: dict[str, Any]) -> list[str]:
    """What was not in the files, or in another shape, and was therefore initialised at random."""
    return sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})


@torch.no_grad()
def compute_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """
    Have a model compute in float32 while its experts, nearly all of its size, stay as they are stored: those of a
    layer are widened while that layer runs. Changes `model`, which can then be used for inference only.
    """
    stored: set[int] = set()
    for layer in find_mixture_layers(model) if is_mixture(model) else ():
        weights = list(layer.experts.parameters())
        stored |= {id(weight) for weight in weights}
        layer.experts.register_forward_pre_hook(partial(_convert, torch.float32))
        layer.experts.register_forward_hook(partial(_convert, weights[0].dtype), always_call=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in stored:
            tensor.data = tensor.float()
    return model


def _convert(dtype: torch.dtype, module: nn.Module, *_: Any) -> None:
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)  # back again without a loss: it was stored so
