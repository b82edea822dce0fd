"""Loading a checkpoint's own class, ours or a stock one, without running code that came with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_sparse_moe.checkpoints.source import Source, find_source, named_architecture, sensible_config, weight_files
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES


def load_checkpoint(folder: Path, dtype: str | torch.dtype = "auto") -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    The model of a folder in evaluation mode, and what transformers says about the loading.

    Args:
        folder (`Path`): Of a saved model, with safetensors.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): The checkpoint's own, or another.

    Raises:
        ValueError: no checkpoint, or none of a class that this package or transformers has.
    """
    source = find_source(str(folder))
    weight_files(source)
    with sensible_config(source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = class_of(config, source)
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told as a finding, with the rest
        )
    return model.eval(), info


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
