"""What is operated on: a model in memory, or one without storage whose files are read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_sparse_moe.checkpoints.config import read_config, read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.loading import class_of, load_whole
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles, stored_dtype
from hf_sparse_moe.checkpoints.source import Source, find_source, weight_files
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.models.quantization import packed_bits
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, find_mixture_layers
from hf_sparse_moe.stock.tensors import Tensors
from hf_sparse_moe.upcycling.in_memory import check_unwrapped


@dataclass(frozen=True)
class Mixture:
    """
    What is operated on.

    Args:
        model (`PreTrainedModel`): The mixture; without storage where it is read from files tensor by tensor.
        layers (`list[MixtureLayer]`): Its sparse layers.
        source (`Source`, *optional*): Where it was read from.
        receipt (`dict`, *optional*): What is known of how it was made.
    """

    model: PreTrainedModel
    layers: list[MixtureLayer]
    source: Source | None
    receipt: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.source.name if self.source else type(self.model).__name__

    @property
    def is_streamed(self) -> bool:
        return self.source is not None and self.model.device.type == "meta"

    def forms(self, model: PreTrainedModel, names: Mapping[str, torch.Tensor]) -> list[Tensors]:
        """Tensors of this mixture, or of what becomes of it, in memory and, in files, as transformers writes them."""
        bare = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in names.items()}
        as_they_are = isinstance(model, SparseMoePreTrainedModel) or not self.is_streamed
        return [bare] if as_they_are else [bare, revert_weight_conversion(model, bare)]

    @property
    def folder(self) -> Path | None:
        return self.source.folder if self.source else None

    @property
    def before(self) -> PreTrainedModel | Path:
        """What can be run."""
        return self.source.folder if self.source and self.is_streamed else self.model


def open_mixture(
    source: PreTrainedModel | str | Path,
    into_memory: bool,
    revision: str | None = None,
    token: bool | str | None = None,
) -> Mixture:
    """
    A mixture of this package or of transformers: a model, or the folder or Hub id of one, whose weights are read only
    `into_memory`. Raises a `ValueError` for a dense model and for one with adapters, and a `NotStreamableError` for
    files that hold packed experts.
    """
    if not isinstance(source, str | Path):
        check_unwrapped(source)
        return Mixture(source, find_mixture_layers(source), None, getattr(source, "receipt", None))
    found = find_source(source, revision, token=token)
    config = read_config(found)
    if into_memory:
        model = load_whole(found.folder, "auto")
    else:
        if packed_bits(config) is not None:
            raise NotStreamableError("its experts are packed")
        cls = class_of(found, config)
        with sensible_config(found), torch.device("meta"):
            dtype = config.dtype or stored_dtype(found)
            model = cls._from_config(config, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if model.can_generate():
            model.generation_config = read_generation_config(found.folder) or model.generation_config
    receipt = read_json(found.folder / RECEIPT_NAME, optional=True) or None
    with sensible_config(found):
        return Mixture(model, find_mixture_layers(model), found, receipt)


def router_tensors(mixture: Mixture, layer: MixtureLayer) -> Tensors:
    """The tensors of a layer's router, read from the files where the model has no storage."""
    state = layer.router.state_dict()
    if not mixture.source or not mixture.is_streamed:
        return state
    files = TensorFiles(weight_files(mixture.source))
    path = next(name for name, child in layer.block.named_modules() if child is layer.router)
    named = {f"{layer.name}.{path}.{name}": tensor for name, tensor in state.items()}
    names = {name for form in mixture.forms(mixture.model, named) for name in form}
    return {name: files.read(name) for name in names & set(files.names)}
