"""The one conversion: what each tensor of a mixture is made of; one result in memory, in shards and on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.reader import DenseTensors, loaded_dtypes
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.feed_forward import FeedForward
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.routers import COSINE_INIT_TEMPERATURE, SparseMoeCosineRouter

from .initialization import FeedForwardWeights, LayerContext, LayerStart
from .recipe import Layers, Recipe, feed_forwards_by_side, mixture_config
from .rows import Matrix, Rows, fill, single_threaded_workers


Read = Callable[..., torch.Tensor]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class SparseLayer:
    """
    One dense feed-forward that becomes sparse, by its names alone.

    Args:
        position (`int`): Among the sparse layers; its random generator is seeded with it.
        feed_forward ([`FeedForward`]): Where it is; may be of a model without storage.
    """

    position: int
    feed_forward: FeedForward

    @property
    def block(self) -> str:
        """The path of the sparse block in the mixture."""
        return f"dense.{self.feed_forward.block_path}"

    @property
    def sources(self) -> list[str]:
        """The dense model's keys that the layer is made of."""
        kinds = ("weight", "bias") if self.feed_forward.biased else ("weight",)
        names = [name for kind in kinds for part in self._projections(kind) for name in part]
        return names + list(self.activation_keys())

    def weights(self, read: Read) -> FeedForwardWeights:
        """The dense feed-forward, in the experts' layout."""

        def take(kind: str) -> list[torch.Tensor]:
            if self.feed_forward.transposed and kind == "weight":
                return [torch.cat([read(name).T for name in names]) for names in self._projections(kind)]
            return [read(*names) for names in self._projections(kind)]

        up, down = take("weight")
        up_bias, down_bias = take("bias") if self.feed_forward.biased else (None, None)
        return FeedForwardWeights(up, down, up_bias, down_bias, self.feed_forward.layout.gated)

    def activation_keys(self) -> dict[str, str]:
        """The dense keys of the activation's own parameters, where it has some (xIELU), and their last names."""
        activation = self.feed_forward.activation
        names = activation.state_dict() if isinstance(activation, nn.Module) else {}
        prefix = f"{self.feed_forward.path}.{self.feed_forward.activation_name}"
        return {f"{prefix}.{name}": name for name in names}

    def _projections(self, kind: str) -> tuple[list[str], list[str]]:
        ups, down = self.feed_forward.parameter_names(kind)
        path = self.feed_forward.path
        return [f"{path}.{name}" for name in ups], [f"{path}.{down}"]


class LoadedTensors:
    """The tensors of a dense model in memory, read as [`DenseTensors`] reads those of a checkpoint."""

    def __init__(self, dense: PreTrainedModel):
        tied = dense.all_tied_weights_keys
        self._state = {key: tensor for key, tensor in dense.state_dict().items() if key not in tied}

    @property
    def names(self) -> set[str]:
        return set(self._state)

    def reader(self, reuse: bool = True) -> Read:
        def read(*names: str) -> torch.Tensor:
            parts = [self._state[name].cpu() for name in names]
            return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()

        return read

    def take(self, key: str, index: Index) -> torch.Tensor:
        """A part of a tensor: a copy, because the caller keeps the dense model."""
        return self._state[key][index].clone()


@dataclass(frozen=True)
class Conversion:
    """
    A dense model and the mixture it becomes, before anything of the mixture is made.

    Args:
        dense (`PreTrainedModel`): The dense model; without storage where its tensors are on disk.
        sparse ([`SparseMoePreTrainedModel`]): The mixture, without storage.
        recipe ([`Recipe`]): How the experts start.
        fields (`dict`): The config's fields that were asked for or decided.
        layers (`list[SparseLayer]`): The layers that become sparse.
        tensors ([`LoadedTensors`] or [`DenseTensors`]): Reads the dense tensors.
    """

    dense: PreTrainedModel
    sparse: SparseMoePreTrainedModel
    recipe: Recipe
    fields: dict[str, Any]
    layers: list[SparseLayer]
    tensors: Any

    @property
    def config(self) -> Any:
        return self.sparse.config

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype

    @cached_property
    def outputs(self) -> dict[str, torch.Tensor]:
        """Every tensor of the mixture, tied ones once, without storage and in its dtype."""
        dtypes, tied = loaded_dtypes(self.sparse, self.dtype), set(self.sparse.all_tied_weights_keys)
        if isinstance(self.tensors, LoadedTensors):  # a checkpoint may have untied what its config ties
            tied -= {f"dense.{name}" for name in self.tensors.names}
        return {
            key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta")
            for key, tensor in self.sparse.state_dict().items()
            if key not in tied
        }

    def layer_of(self, key: str) -> int | None:
        """The position of the sparse layer that makes a tensor of `outputs`; None for one of the dense model's own."""
        return next((layer.position for layer in self.layers if key.startswith(f"{layer.block}.")), None)

    def start(self, layer: SparseLayer, read: Read, **measured: Any) -> Iterator[tuple[str, int | None, Matrix]]:
        """
        The mixture's tensors of a layer as (key, expert, matrix). The matrices of the routed experts come one expert
        after the other, each a row of the key's tensor; with the others `expert` is None.

        Args:
            layer ([`SparseLayer`]): The layer.
            read (`Callable`): The tensor of one of the layer's `sources`, or one below the other those of several.
            **measured: What a method needs besides the weights, as [`LayerContext`] takes it.
        """
        recipe, config = self.recipe, self.config
        seed = np.random.SeedSequence((recipe.seed % 2**64, layer.position)).generate_state(1)  # torch heeds 32 bits
        generator = torch.Generator().manual_seed(int(seed[0]))
        dense = layer.weights(read)
        start: LayerStart = recipe.initialization.start(
            dense, LayerContext(config, generator, recipe.options, **measured)
        )
        up_name = "gate_up_proj" if dense.gated else "up_proj"
        for name, tensor in _router_tensors(config, start.router, dense.down.dtype, generator).items():
            yield f"{layer.block}.gate.{name}", None, tensor
        for number, expert in enumerate(start.experts):
            names = (up_name, "down_proj", f"{up_name}_bias", "down_proj_bias")
            for name, matrix in zip(names, expert.matrices, strict=True):
                if matrix is not None:
                    yield f"{layer.block}.experts.{name}", number, matrix
        if start.shared is not None:
            names = ("up_proj.weight", "down_proj.weight", "up_proj.bias", "down_proj.bias")
            for name, matrix in zip(names, start.shared.matrices, strict=True):
                if matrix is not None:
                    yield f"{layer.block}.shared_experts.{name}", None, matrix
        for key, name in layer.activation_keys().items():
            yield f"{layer.block}.experts.act_fn.{name}", None, read(key)

    def load(
        self,
        measured: Callable[[SparseLayer], dict[str, Any]] = lambda layer: {},
        generation_config: GenerationConfig | None = None,
        distributed_config: DistributedConfig | None = None,
    ) -> SparseMoePreTrainedModel:
        """
        Make the mixture, or this process's part of it.

        Args:
            measured (`Callable`, *optional*): What the method needs besides a layer's weights.
            generation_config (`GenerationConfig`, *optional*): The mixture gets a copy.
            distributed_config (`DistributedConfig`, *optional*): How it is shared out over the processes.
        """
        sharing = {} if distributed_config is None else {"distributed_config": distributed_config}
        with single_threaded_workers() as threads, single_threaded_workers(1) as planner:
            made = _MadeLayers(self, measured, threads, planner)
            slices = {key: TensorSlices(list(out.shape), made.taker(key)) for key, out in self.outputs.items()}
            try:
                return load_mixture(type(self.sparse), self.config, slices, self.dtype, generation_config, **sharing)
            except RuntimeError:  # transformers wraps what goes wrong while a tensor is made
                if made.failure is not None:
                    raise made.failure from None
                raise


def plan_conversion(
    dense: PreTrainedModel,
    tensors: LoadedTensors | DenseTensors,
    dtype: torch.dtype,
    recipe: Recipe,
    fields: dict[str, Any],
    layers: Layers,
) -> Conversion:
    """
    All of a conversion that is known before a weight is read.

    Args:
        dense (`PreTrainedModel`): The dense model, which may be without storage.
        tensors ([`LoadedTensors`] or [`DenseTensors`]): Reads its tensors.
        dtype (`torch.dtype`): Of the mixture.
        recipe ([`Recipe`]): How the experts start.
        fields (`dict`): The config's fields that were asked for.
        layers (`str`, `list[int]` or `dict`): Which layers become sparse.

    Raises:
        ValueError: as [`mixture_config`], and a dense model whose tensors are not those of its class.
    """
    target = sparse_class(dense.config, type(dense).__name__)
    sides = feed_forwards_by_side(dense, target.family_side)
    fields = dict(fields)
    config = mixture_config(dense, target, recipe, fields, layers, sides)
    set_dtype(config, dtype)
    with torch.device("meta"):
        sparse = target._from_config(config, dtype=dtype)
    chosen: list[FeedForward] = []
    for name, side in config._layer_type_fields.items():
        found = sides.get(side, [])
        types = getattr(config, name) or ["sparse"] * len(found)
        chosen += [each for each, kind in zip(found, types, strict=True) if kind == "sparse"]
    sparse_layers = [SparseLayer(position, feed_forward) for position, feed_forward in enumerate(chosen)]
    conversion = Conversion(dense, sparse, recipe, fields, sparse_layers, tensors)
    if isinstance(tensors, LoadedTensors):
        needed = {key.removeprefix("dense.") for key in conversion.outputs if conversion.layer_of(key) is None}
        needed |= {name for layer in sparse_layers for name in layer.sources}
        check_same_tensors(type(dense).__name__, needed - tensors.names, tensors.names - needed)
    return conversion


def check_same_tensors(name: str, missing: set[str], unknown: set[str]) -> None:
    """Raise a `ValueError` where a model lacks tensors, or has tensors that have no place in what it becomes."""
    if missing or unknown:
        first = f"lacks `{min(missing)}`" if missing else f"has `{min(unknown)}`, which has no place in the result"
        raise ValueError(
            f"`{name}` {first}. Pass a plain model: merge adapters first (`merge_and_unload()`), and undo other "
            "changes to its modules."
        )


def load_mixture(
    target: type[SparseMoePreTrainedModel],
    config: Any,
    state_dict: dict[str, Any],
    dtype: torch.dtype,
    generation_config: GenerationConfig | None,
    **load_arguments: Any,
) -> SparseMoePreTrainedModel:
    """
    A mixture made of a whole state dict.

    Args:
        target (`type`): Its class.
        config ([`SparseMoeConfig`]): Its config.
        state_dict (`dict`): Its tensors, or [`TensorSlices`] that make them.
        dtype (`torch.dtype`): What it is loaded in.
        generation_config (`GenerationConfig`, *optional*): The mixture gets a copy.
        **load_arguments: As `from_pretrained` takes them.

    Raises:
        ValueError: a tensor that is missing, or has no place.
    """
    model, info = target.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True, **load_arguments
    )
    check_same_tensors(target.__name__, set(info["missing_keys"]), set(info["unexpected_keys"]))
    if model.can_generate() and generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model


@dataclass(frozen=True)
class TensorSlices:
    """
    A tensor with nothing in memory, as `safe_open(...).get_slice(...)` is one: transformers asks for its shape, then
    for the slices that this process keeps.

    Args:
        shape (`list[int]`): Of the whole.
        take (`Callable`): Makes a part of it, given a slice for each dimension.
    """

    shape: list[int]
    take: Callable[[Index], torch.Tensor]

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, index: Index) -> torch.Tensor:
        return self.take((slice(None),) * len(self.shape) if index is ... else index)


class _MadeLayers:
    """The sparse layers, read and planned when the first of their tensors is asked for."""

    KEPT = 2  # transformers loads with several threads, which may be at the end of one layer and the start of another

    def __init__(
        self,
        conversion: Conversion,
        measured: Callable[[SparseLayer], dict[str, Any]],
        threads: ThreadPoolExecutor,
        planner: ThreadPoolExecutor,
    ):
        self._conversion, self._measured, self._lock = conversion, measured, Lock()
        self._threads, self._planner = threads, planner
        self._made = lru_cache(maxsize=self.KEPT)(self._make)
        self.failure: BaseException | None = None

    def taker(self, key: str) -> Callable[[Index], torch.Tensor]:
        """What [`TensorSlices`] takes for a tensor of `outputs`."""
        position = self._conversion.layer_of(key)
        if position is None:
            return lambda index: self._conversion.tensors.take(key.removeprefix("dense."), index)
        return lambda index: _part(self._matrices(position, key), index, self._threads)

    def _matrices(self, position: int, key: str) -> Matrix | list[Matrix]:
        """A list, where the tensor has an entry for each expert."""
        with self._lock:
            made = self._planner.submit(self._made, position)
            self.failure = made.exception() or self.failure
        return made.result()[key]

    def _make(self, position: int) -> dict[str, Matrix | list[Matrix]]:
        single: dict[str, Matrix] = {}
        experts: dict[str, list[Matrix]] = {}
        layer, read = self._conversion.layers[position], self._conversion.tensors.reader(reuse=False)
        for key, expert, matrix in self._conversion.start(layer, read, **self._measured(layer)):
            if expert is None:
                single[key] = matrix
            else:
                experts.setdefault(key, []).append(matrix)
        return {**single, **experts}


def _part(made: Matrix | list[Matrix], index: Index, threads: ThreadPoolExecutor) -> torch.Tensor:
    """A copy: what it is cut of is a whole layer's weights, which go with the layer."""
    if isinstance(made, torch.Tensor):
        return made[index].clone()
    if isinstance(made, Rows):
        window = _window(made, index)
        part = torch.empty(window.shape, dtype=window.dtype)
        fill(part, window, threads)
        return part
    window = _window(made[0], index[1:])
    chosen = made[index[0]]
    part = torch.empty((len(chosen), *window.shape), dtype=window.dtype)
    for target, matrix in zip(part, chosen, strict=True):
        fill(target, _window(matrix, index[1:]), threads)
    return part


def _window(matrix: Matrix, index: Index) -> Rows:
    rows, *columns = index
    begin = rows.indices(matrix.shape[0])[0]
    shape = torch.Size(len(range(size)[part]) for size, part in zip(matrix.shape, index, strict=True))

    def make(part: slice) -> torch.Tensor:
        return matrix[begin + part.start : begin + part.stop][(slice(None), *columns)]

    return Rows(shape, matrix.dtype, make)


def _router_tensors(
    config: SparseMoeConfig, rows_EH: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A router's tensors by their names, from one row for each expert; equal rows stay equal, whatever the router."""
    if config.router_type == "hash":
        return {}
    if config.scoring_func == "cosine":
        hidden = rows_EH.shape[1]
        size = SparseMoeCosineRouter.row_size(hidden)
        projection = torch.empty(size, hidden).normal_(std=hidden**-0.5, generator=generator)
        return {
            "weight": (rows_EH.float() @ projection.T).to(dtype),
            "projection": projection.to(dtype),
            "temperature": torch.full((1,), COSINE_INIT_TEMPERATURE, dtype=dtype),
        }
    tensors = {"weight": rows_EH.to(dtype)}
    if config.scoring_func == "sigmoid":
        tensors["e_score_correction_bias"] = torch.zeros(len(rows_EH), dtype=torch.float32)
    return tensors


def set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """As `from_pretrained` does it."""
    config.dtype = dtype
    for name in config.sub_configs:
        if (sub_config := getattr(config, name)) is not None:
            sub_config.dtype = dtype
