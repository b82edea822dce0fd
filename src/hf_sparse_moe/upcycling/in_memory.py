"""`upcycle` with the dense models in memory: every method, whatever it measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from hf_sparse_moe.checkpoints.config import read_config
from hf_sparse_moe.checkpoints.families import check_not_quantised
from hf_sparse_moe.checkpoints.loading import load_dense
from hf_sparse_moe.checkpoints.source import Source, find_source
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.quantization import quantize_experts

from .branches import check_branches, make_trunk, router_rows
from .conversion import Conversion, LoadedTensors, SparseLayer, plan_conversion
from .measuring import as_batches, inputs_of, labelled, task_losses
from .receipt import describe_source, make_receipt, name_of, output_difference
from .recipe import Layers, Recipe, check_dtype


Given = PreTrainedModel | str | Path


@dataclass(frozen=True)
class DenseModels:
    """Where [`upcycle`] finds dense models and their tokenizer; the arguments are its own."""

    source: Given | None
    found: Source | None
    """Of `source`, if that is a folder or Hub id."""
    sources: Sequence[Given]
    tokenizer: Any
    revision: str | None
    token: bool | str | None
    dtype: str | torch.dtype
    allow_pickle: bool

    def load(self, each: Given) -> tuple[PreTrainedModel, Source | None]:
        """A model, and where it was read if it was read here."""
        if isinstance(each, str | Path):
            found = self.found if self.found and each is self.source else None
            found = found or find_source(each, self.revision, self.allow_pickle, self.token)
            check_not_quantised(read_config(found), found.name)
            return load_dense(found, self.dtype, self.allow_pickle), found
        check_plain(each)
        return each, None

    def find_tokenizer(self) -> Any:
        """The one given, or that of the first folder or Hub id."""
        folders = [each for each in (self.source, *self.sources) if isinstance(each, str | Path)]
        if self.tokenizer is None and not folders:
            raise ValueError("Texts need `tokenizer`. Pass that of the dense model, or batches of token ids.")
        return self.tokenizer or AutoTokenizer.from_pretrained(
            folders[0], revision=self.revision, token=self.token, trust_remote_code=False
        )


def upcycle_in_memory(
    given: DenseModels,
    recipe: Recipe,
    fields: dict[str, Any],
    layers: Layers,
    data: Iterable[Any] | None,
    evaluation: Iterable[Any] | None,
    prompts: Sequence[Iterable[Any]] | None,
    quantize: int | None,
) -> tuple[SparseMoePreTrainedModel, Path | None]:
    """The mixture, and the folder whose tokenizer and licence go with it."""
    held_out = None if evaluation is None else list(as_batches("evaluation", evaluation, given.find_tokenizer))
    branches = [given.load(each) for each in given.sources]
    base, base_source = (None, None) if given.source is None else given.load(given.source)
    dense = base
    if recipe.method == "branches":
        dense = _trunk(branches, (base, base_source), recipe, fields["num_experts"])
    assert dense is not None
    dtype = check_dtype(given.dtype) or dense.dtype
    conversion = plan_conversion(dense, LoadedTensors(dense), dtype, recipe, fields, layers)
    texts = None if held_out is None else labelled(type(conversion.sparse).__name__, held_out)
    measured = _measure(dense, conversion, given, data, prompts)
    tensors = [LoadedTensors(branch) for branch, _ in branches]

    def measurements(layer: SparseLayer) -> dict[str, Any]:
        by_layer = {name: found[layer.position] for name, found in measured.items()}
        return {**by_layer, "branches": [layer.weights(each.reader()) for each in tensors]}

    sparse: Any = conversion.load(measurements, getattr(dense, "generation_config", None))
    sparse = sparse.to(dense.device)
    sparse.receipt = make_receipt(dense, sparse, None if dense is not base else base_source, recipe, conversion.fields)
    if texts is not None:
        sparse.receipt["loss"] = task_losses({"dense": dense, "mixture": sparse}, texts)
    if branches:
        sparse.receipt["branches"] = [describe_source(*branch) for branch in branches]
    if quantize is not None:
        quantize_experts(sparse, quantize)
        sparse.receipt["arguments"]["quantize"] = quantize
        sparse.receipt["equality"] = output_difference(dense, sparse)
    sources = (base_source, *(source for _, source in branches))
    return sparse, next((source.folder for source in sources if source), None)


def _trunk(branches: list, base: tuple, recipe: Recipe, num_experts: int) -> PreTrainedModel:
    """What the branches share: all but the feed-forwards."""
    trunk = recipe.options["trunk"]
    granularity = recipe.options["granularity"]
    given = [base, *branches] if trunk == "base" and base[0] is not None else branches
    names = [name_of(*each) or f"model {number}" for number, each in enumerate(given, start=1)]
    check_branches([model for model, _ in given], [source for _, source in given], names)
    if num_experts != len(branches) * granularity:
        raise ValueError(
            f"`num_experts={num_experts}` is not allowed: `sources` names {len(branches)} branches, of "
            f"`granularity={granularity}` experts each."
        )
    return make_trunk([branch for branch, _ in branches], base[0], trunk)


def _measure(
    dense: PreTrainedModel,
    conversion: Conversion,
    given: DenseModels,
    data: Iterable[Any] | None,
    prompts: Sequence[Iterable[Any]] | None,
) -> dict[str, list]:
    """What methods ask of text, layer by layer: `data`'s activations, and the routers' rows for `prompts`."""
    measured: dict[str, list] = {}
    sites = [layer.feed_forward for layer in conversion.layers]
    if data is not None:
        downs = [site.part(site.layout.down) for site in sites]
        measured["activations"] = inputs_of(dense, downs, as_batches("data", data, given.find_tokenizer))
    if prompts is not None:
        ups = [site.part(site.layout.up[0]) for site in sites]
        seen = [inputs_of(dense, ups, as_batches("prompts", each, given.find_tokenizer)) for each in prompts]
        measured["centroids"] = [router_rows(states) for states in zip(*seen, strict=True)]
    return measured


def check_plain(model: Any) -> None:
    """Raise a `ValueError` unless `model` is a model of transformers without adapters or packed weights."""
    check_unwrapped(model)
    name = type(model).__name__
    check_not_quantised(model.config, name)
    packed = next((key for key, each in model.named_parameters() if type(each.data) is not torch.Tensor), None)
    if packed is not None or getattr(model, "is_quantized", False):
        raise ValueError(f"`{name}` is quantised or sharded (`{packed}`). Pass a whole model with its full weights.")


def check_unwrapped(model: Any) -> None:
    """Raise a `ValueError` unless `model` is a model of transformers in memory, without adapters."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"`{name}` is neither a model of transformers nor a folder or Hub id. Of a PEFT model pass "
            "`model.merge_and_unload()`."
        )
    wrapped = (".base_layer.", ".modules_to_save.")  # as PEFT wraps a module
    if any(part in f".{parameter}" for parameter, _ in model.named_parameters() for part in wrapped):
        raise ValueError(
            f"`{name}` has an adapter that is not merged. Pass what the PEFT model's `merge_and_unload()` returns."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"`{name}` has weights that are not in memory. Pass one that is loaded without offloading.")
