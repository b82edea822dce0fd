"""`upcycle` of a mixture: dense layers of it become sparse too, in memory and from disk to disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_sparse_moe.checkpoints.config import read_config, read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.families import check_not_quantised
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.folder import write_checkpoint
from hf_sparse_moe.checkpoints.journal import WatchedSource
from hf_sparse_moe.checkpoints.loading import class_of, load_sparse
from hf_sparse_moe.checkpoints.reader import DenseTensors, NotStreamableError, stored_dtype
from hf_sparse_moe.checkpoints.source import Source
from hf_sparse_moe.models.moe_block import sparse_feed_forwards
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel

from .conversion import Conversion, Index, LoadedTensors, Read, SparseLayer, set_dtype
from .receipt import NOT_MEASURED, check_equality, describe_source, output_difference, versions
from .recipe import Layers, Recipe, layer_types
from .streaming import write_mixture


logger = logging.get_logger(__name__)


def upcycle_more_layers(
    mixture: SparseMoePreTrainedModel | Source, layers: Layers, seed: int, output: str | Path | None, *settings: Any
) -> SparseMoePreTrainedModel:
    """
    Copy the feed-forwards that are still dense in `layers` into experts, as many as the mixture's other layers have.
    With `output` and what [`write_mixture`] takes as `settings` it is written there, and if it was streamed, the model
    has no storage. Raises a `ValueError` where no layer is left, and where experts are no whole feed-forwards.
    """
    if isinstance(mixture, Source) and output is not None:
        try:
            return _on_disk(mixture, layers, seed, output, *settings)
        except NotStreamableError as reason:
            logger.warning(f"The mixture is made in memory, not streamed: {reason}.")
    source = mixture if isinstance(mixture, Source) else None
    model = mixture if isinstance(mixture, SparseMoePreTrainedModel) else load_sparse(mixture)
    check_not_quantised(model.config, type(model).__name__)
    conversion = _plan(model, LoadedTensors(model), layers, seed)
    grown: Any = conversion.load(generation_config=getattr(model, "generation_config", None))
    grown = grown.to(model.device)
    equality = output_difference(model, grown)
    check_equality(equality, conversion.recipe.initialization.is_exact(conversion.config), model.dtype)
    grown.receipt = _receipt(conversion, model.receipt, describe_source(model, source), equality)
    if output is not None:
        write_checkpoint(grown, output, source.folder if source else None, max_shard_size=settings[0])
    return grown


def _on_disk(
    source: Source, layers: Layers, seed: int, output: str | Path, *settings: Any
) -> SparseMoePreTrainedModel:
    watched, config = WatchedSource(source), read_config(source)
    check_not_quantised(config, source.name)
    with sensible_config(source):
        model_class: Any = class_of(source, config)
        dtype = config.dtype or stored_dtype(source)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        set_dtype(config, dtype)
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=dtype)
        conversion = _plan(model, DenseTensors(source, model, dtype), layers, seed)
    grown: Any = conversion.sparse
    if grown.can_generate():
        grown.generation_config = read_generation_config(source.folder) or grown.generation_config
    before = read_json(source.folder / RECEIPT_NAME, optional=True)

    def tell(sha256: dict[str, str]) -> dict[str, Any]:
        return _receipt(conversion, before, describe_source(model, source, sha256), NOT_MEASURED)

    write_mixture(conversion, source, watched, tell, output, *settings)
    return grown


def _receipt(
    conversion: Conversion, before: dict[str, Any] | None, source: dict[str, Any], equality: dict[str, Any]
) -> dict[str, Any]:
    """The mixture's own, and what was done now."""
    before = dict(before or {})
    earlier = {"before": before.pop("more_layers")} if "more_layers" in before else {}
    named = [layer.block for layer in conversion.layers]
    exact = conversion.recipe.initialization.is_exact(conversion.config)
    made = {"layers": named, "seed": conversion.recipe.seed, "exact": exact, "equality": equality, "source": source}
    return {**before, "more_layers": {**made, "versions": versions(), **earlier}}


def _plan(model: SparseMoePreTrainedModel, tensors: Any, layers: Layers, seed: int) -> Conversion:
    """From a mixture, which may be without storage, and what reads its tensors."""
    recipe, config = Recipe("copy", seed, {}), copy.deepcopy(model.config)
    with torch.device("meta"):
        dense = model.dense_auto_class.from_config(config.dense_config, dtype=model.dtype)
    before = [layer.block_path for layer, _ in sparse_feed_forwards(dense, config, model.family_side)]
    every = copy.deepcopy(config)
    for field in config._layer_type_fields:
        setattr(every, field, None)
    sides = [side for _, side in sparse_feed_forwards(dense, every, model.family_side)]
    for field, side in config._layer_type_fields.items():
        chosen = layers.get(side, "none") if isinstance(layers, dict) else layers
        wanted, now = layer_types(chosen, sides.count(side)), getattr(config, field) or ["sparse"] * sides.count(side)
        setattr(config, field, ["sparse" if "sparse" in pair else "dense" for pair in zip(wanted, now, strict=True)])
    found = sparse_feed_forwards(dense, config, model.family_side)
    new = [SparseLayer(place, *each) for place, each in enumerate(found) if each[0].block_path not in before]
    if not new:
        raise ValueError(
            f"`layers={layers!r}` names no dense layer: all of them are those of a mixture already. Pass a dense "
            "model, or `expand` this one."
        )
    fields = {name: getattr(config, name) for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
    recipe.initialization.sizes(fields, new[0].feed_forward.intermediate_size, {})
    if config.num_shared_experts:
        raise ValueError("A mixture with shared experts gets no more sparse layers: copies have none.")
    with torch.device("meta"):
        sparse = type(model)._from_config(config, dtype=model.dtype)
    fields = {field: getattr(config, field) for field in config._layer_type_fields}
    return Conversion(dense, sparse, recipe, fields, new, _Inside(tensors))


@dataclass(frozen=True)
class _Inside:
    """The tensors of the dense model inside a mixture, and of its sparse layers."""

    tensors: LoadedTensors | DenseTensors

    @property
    def names(self) -> set[str]:
        return {name.removeprefix("dense.") for name in getattr(self.tensors, "names", ())}

    def reader(self, reuse: bool = False) -> Read:
        read = self.tensors.reader(reuse)
        return lambda *names: read(*(f"dense.{name}" for name in names))

    def pieces(self, key: str) -> Iterator[torch.Tensor]:
        return self.tensors.pieces(f"dense.{key}")  # type: ignore[union-attr]

    def take(self, key: str, index: Index) -> torch.Tensor:
        return self.tensors.take(f"dense.{key}", index)
