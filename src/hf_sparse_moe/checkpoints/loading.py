"""The model of a checkpoint in its own class, without running code that came with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import meta_model

from .config import read_config, read_mixture_config, sensible_config
from .families import sparse_class
from .source import Source, find_source, missing_weight, named_architecture, weight_files


def load_checkpoint(folder: Path, dtype: str | torch.dtype = "auto") -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    The model of a folder in evaluation mode, and what transformers says about the loading. Raises a `ValueError` for
    no checkpoint in safetensors, or none of a class that this package or transformers has.
    """
    source = find_source(folder)
    weight_files(source)  # an index that names files elsewhere is refused
    found = class_of(source, read_config(source))
    # Tensors of other shapes are told as a finding, with the rest.
    told: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with sensible_config(source):
        loaded: Any = found.from_pretrained(folder, dtype=dtype, **told)
    return loaded[0].eval(), loaded[1]


def class_of(source: Source, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint names; raises a `ValueError` where neither this package nor transformers has it."""
    if (found := _named_class(config)) is None:
        raise ValueError(
            f"`{source.name}` names no class of this package or of transformers in `architectures` "
            f"({named_architecture(config)!r}). Pass a checkpoint that was saved by one."
        )
    return found


def load_whole(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    """As [`load_checkpoint`], the model alone; raises a `ValueError` where weights are missing."""
    model, info = load_checkpoint(folder, dtype)
    if missing := fresh_tensors(info):
        raise missing_weight(folder.name, model, missing[0])
    return model


def load_sparse(source: Source) -> Any:
    """As [`load_whole`]; raises a `ValueError` for what is no mixture of this package, too."""
    read_mixture_config(source)
    return load_whole(source.folder)


def load_dense(source: Source, dtype: str | torch.dtype = "auto", allow_pickle: bool = False) -> PreTrainedModel:
    """
    The dense model of a checkpoint, with its own head. Raises a `ValueError` for a mixture, for what is no text model,
    and for an incomplete checkpoint.
    """
    config = read_config(source)
    with sensible_config(source):
        model, info = sparse_class(config, named_architecture(config)).dense_auto_class.from_pretrained(
            source.folder,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    if info["missing_keys"]:
        raise missing_weight(source.name, model, sorted(info["missing_keys"])[0])
    return model


def fresh_tensors(info: dict[str, Any]) -> list[str]:
    """What was not in the files, or in another shape, and was therefore initialised at random."""
    return sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})


def model_without_weights(config: SparseMoeConfig) -> SparseMoePreTrainedModel:
    """With the checkpoint's own head, where its config names one of the family's classes."""
    with sensible_config(str(config.name_or_path)), torch.device("meta"):
        named: Any = _named_class(config)
        return meta_model(config) if named is None else named(config)


def _named_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a config names: of a mixture one of its family's, else one of transformers."""
    name = named_architecture(config)
    if isinstance(config, SparseMoeConfig):
        return next((known for known in AUTO_CLASSES[type(config)].values() if known.__name__ == name), None)
    found = getattr(transformers, str(name), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
