"""Loading a checkpoint's own class, ours or a stock one, without running code that came with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse_moe.checkpoints.config import read_config, sensible_config
from hf_sparse_moe.checkpoints.source import Source, find_source, named_architecture, weight_files
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers

from .adapter_base import is_mixture


def load_checkpoint(folder: Path, dtype: str | torch.dtype = "auto") -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    The model of a folder in evaluation mode, and what transformers says about the loading.

    Args:
        folder (`Path`): Of a saved model, with safetensors.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): The checkpoint's own, or another.

    Raises:
        ValueError: no checkpoint, or none of a class that this package or transformers has.
    """
    source = find_source(folder)
    weight_files(source)
    model_class = class_of(read_config(source), source)
    with sensible_config(source):
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told as a finding, with the rest
        )
    return model.eval(), info


def load_whole(folder: Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """As [`load_checkpoint`]; raises a `ValueError` where weights are missing."""
    model, info = load_checkpoint(folder, dtype)
    if missing := sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}):
        raise ValueError(
            f"`{folder.name}` lacks weights that its config asks for, such as `{missing[0]}`. Save the model again."
        )
    return model


@torch.no_grad()
def compute_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """
    Have a model compute in float32 while its experts, nearly all of its size, stay as they are stored: those of a
    layer are widened while that layer runs. Changes `model`, which can then be used for inference only.
    """
    stored: set[int] = set()
    for layer in find_mixture_layers(model) if is_mixture(model) else ():
        stored |= {id(weight) for weight in layer.experts.parameters()}
        narrow: list[torch.Tensor] = []
        layer.experts.register_forward_pre_hook(partial(_widen, narrow))
        layer.experts.register_forward_hook(partial(_restore, narrow), always_call=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in stored:
            tensor.data = tensor.float()
    return model


def _widen(narrow: list[torch.Tensor], module: nn.Module, inputs: Any) -> None:
    for weight in module.parameters():
        narrow.append(weight.data)
        weight.data = weight.float()


def _restore(narrow: list[torch.Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    for weight, data in zip(module.parameters(), narrow, strict=True):
        weight.data = data
    narrow.clear()


def class_of(config: PreTrainedConfig, source: Source) -> Any:
    """The class that a config names; raises a `ValueError` for one that is neither ours nor transformers' own."""
    name = named_architecture(config)
    if isinstance(config, SparseMoeConfig):
        classes = {known.__name__: known for known in AUTO_CLASSES[type(config)].values()}
        found = classes.get(str(name))
    else:
        found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"`{source.name}` names no class of this package or of transformers in `architectures` ({name!r}). Pass a "
            "checkpoint that was saved by one."
        )
    return found
