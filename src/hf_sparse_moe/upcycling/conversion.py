"""The one conversion: what each tensor of a mixture is made of; one result in memory, in shards and on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ReLUSquaredActivation

from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.reader import DenseTensors, loaded_dtypes
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.feed_forward import FeedForward
from hf_sparse_moe.models.moe_block import sparse_feed_forwards
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.routers import COSINE_INIT_TEMPERATURE, SparseMoeCosineRouter

from .initialization import FeedForwardWeights, LayerContext
from .recipe import Layers, Recipe, mixture_config
from .rows import Matrix, blocks, single_threaded_workers


DEGREES = {nn.ReLU: 1, ReLUSquaredActivation: 2}  # plain activations f with f(s x) = s ** degree f(x) for s > 0
Read = Callable[..., torch.Tensor]
Index = tuple[slice, ...]
Made = dict[str, Matrix | list[Matrix]]  # a list, where the tensor has an entry for each expert


@dataclass(frozen=True)
class SparseLayer:
    """One dense feed-forward that becomes sparse, by its names alone: its model may be without storage."""

    position: int  # among the sparse layers; its random generator is seeded with it
    feed_forward: FeedForward
    side: str

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

    @property
    def degree(self) -> int:
        """See [`FeedForwardWeights`]."""
        gated = self.feed_forward.layout.gated
        return 1 if gated else DEGREES.get(type(self.feed_forward.activation), 0)

    def weights(self, read: Read) -> FeedForwardWeights:
        """The dense feed-forward, in the experts' layout."""
        ups, downs = self._projections("weight")
        if self.feed_forward.transposed:
            up, down = (torch.cat([read(name).T for name in names]) for names in (ups, downs))
        else:
            up, down = read(*ups), read(*downs)
        up_bias, down_bias = None, None
        if self.feed_forward.biased:
            up_bias, down_bias = (read(*names) for names in self._projections("bias"))
        found = FeedForwardWeights(up, down, up_bias, down_bias, self.feed_forward.layout.gated, self.degree)
        for matrix in found.matrices.values():
            check_numbers(self.feed_forward.path, matrix)
        return found

    def dense_tensors(self, weights: FeedForwardWeights, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
        """The way back: the dense model's tensors of these weights, given their shapes."""
        axis = 1 if self.feed_forward.transposed else 0
        made: dict[str, torch.Tensor] = {}
        for kind, up, down in (("weight", weights.up, weights.down), ("bias", weights.up_bias, weights.down_bias)):
            if up is None:
                continue
            ups, downs = self._projections(kind)
            sizes = [shapes[name][axis if kind == "weight" else 0] for name in ups]
            for name, part in zip(ups + downs, [*up.split(sizes), down], strict=True):
                made[name] = (part.T if kind == "weight" and self.feed_forward.transposed else part).contiguous()
        return made

    def activation_keys(self) -> dict[str, str]:
        """The dense keys of the activation's own parameters, where it has some (xIELU), and their last names."""
        activation = self.feed_forward.activation
        names = activation.state_dict() if isinstance(activation, nn.Module) else {}
        return {f"{self.feed_forward.path}.{self.feed_forward.activation_name}.{name}": name for name in names}

    def _projections(self, kind: str) -> tuple[list[str], list[str]]:
        ups, down = self.feed_forward.parameter_names(kind)
        path = self.feed_forward.path
        return [f"{path}.{name}" for name in ups], [f"{path}.{down}"]


def expert_parameters(gated: bool) -> dict[str, str]:
    """What the matrices of a [`FeedForwardWeights`] are called in the experts module."""
    up = "gate_up_proj" if gated else "up_proj"
    return {"up": up, "down": "down_proj", "up_bias": f"{up}_bias", "down_bias": "down_proj_bias"}


class LoadedTensors:
    """The tensors of a dense model in memory, read as [`DenseTensors`] reads those of a checkpoint."""

    def __init__(self, dense: PreTrainedModel):
        tied = dense.all_tied_weights_keys
        self._state = {key: tensor for key, tensor in dense.state_dict().items() if key not in tied}
        self.names = set(self._state)

    def reader(self, reuse: bool = False) -> Read:
        def read(*names: str) -> torch.Tensor:
            parts = [self._state[name].cpu() for name in names]
            return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

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
        # A model in memory may have untied what its config ties.
        tied -= {f"dense.{name}" for name in getattr(self.tensors, "names", ())}
        return {
            key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta")
            for key, tensor in self.sparse.state_dict().items()
            if key not in tied
        }

    def layer_of(self, key: str) -> int | None:
        """The place in `layers` of the one that makes a tensor of `outputs`; None for one of the dense model's own."""
        return next((place for place, layer in enumerate(self.layers) if key.startswith(f"{layer.block}.")), None)

    def make(self, layer: SparseLayer, reuse: bool = False, **measured: Any) -> Made:
        """
        The mixture's tensors of a layer, given what the method needs besides the weights, as [`LayerContext`] takes
        it. `reuse` reads the dense weights into the memory of the last layer but one, see [`DenseTensors.reader`].
        """
        recipe, config, read = self.recipe, self.config, self.tensors.reader(reuse)
        seed = np.random.SeedSequence((recipe.seed % 2**64, layer.position)).generate_state(1)  # torch heeds 32 bits
        generator = torch.Generator().manual_seed(int(seed[0]))
        dense = layer.weights(read)
        start = recipe.initialization.start(
            dense, LayerContext(config, layer.side, generator, recipe.options, **measured)
        )
        router = _router_tensors(config, start.router, dense.down.dtype, generator)
        made: Made = {f"gate.{name}": tensor for name, tensor in router.items()}
        names = expert_parameters(dense.gated)
        experts: dict[str, list[Matrix]] = {}
        for expert in start.experts:
            for name, matrix in expert.matrices.items():
                experts.setdefault(f"experts.{names[name]}", []).append(matrix)
        made |= experts
        if start.shared is not None:
            for name, matrix in start.shared.matrices.items():
                part, _, kind = name.partition("_")
                made[f"shared_experts.{part}_proj.{kind or 'weight'}"] = matrix
        made |= {f"experts.act_fn.{name}": read(key) for key, name in layer.activation_keys().items()}
        return {f"{layer.block}.{name}": matrices for name, matrices in made.items()}

    def load(
        self,
        measured: Callable[[SparseLayer], dict[str, Any]] = lambda layer: {},
        generation_config: GenerationConfig | None = None,
        **load_arguments: Any,
    ) -> SparseMoePreTrainedModel:
        """
        Make the mixture, or this process's part of it where `load_arguments`, as `from_pretrained` takes them, have a
        `distributed_config`. `measured` is what the method needs besides a layer's weights.
        """
        failures: list[BaseException] = []  # transformers wraps what goes wrong while a tensor is made
        # transformers loads with several threads, which may be at the end of one layer and the start of another
        make = lru_cache(2)(lambda position: self.make(self.layers[position], **measured(self.layers[position])))
        with single_threaded_workers() as threads, single_threaded_workers(1) as planner:

            def take(key: str, position: int | None, index: Index) -> torch.Tensor:
                try:
                    if position is None:
                        return check_numbers(key, self.tensors.take(key.removeprefix("dense."), index))
                    return _part(planner.submit(make, position).result()[key], index, threads)
                except BaseException as error:
                    failures.append(error)
                    raise

            slices = {
                key: TensorSlices(list(output.shape), partial(take, key, self.layer_of(key)))
                for key, output in self.outputs.items()
            }
            try:
                return load_mixture(
                    type(self.sparse), self.config, slices, self.dtype, generation_config, **load_arguments
                )
            except RuntimeError:
                if failures:
                    raise failures[0] from None
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
    All of a conversion that is known before a weight is read, from a dense model that may be without storage and what
    reads its tensors. Raises as [`mixture_config`], and for a dense model whose tensors are not those of its class.
    """
    target, fields = sparse_class(dense.config, type(dense).__name__), dict(fields)
    config = mixture_config(dense, target, recipe, fields, layers)
    set_dtype(config, dtype)
    config._attn_implementation = dense.config._attn_implementation
    with torch.device("meta"):
        sparse = target._from_config(config, dtype=dtype)
    chosen = sparse_feed_forwards(dense, config, target.family_side)
    sparse_layers = [SparseLayer(position, *found) for position, found in enumerate(chosen)]
    conversion = Conversion(dense, sparse, recipe, fields, sparse_layers, tensors)
    if isinstance(tensors, LoadedTensors):
        needed = {key.removeprefix("dense.") for key in conversion.outputs if conversion.layer_of(key) is None}
        needed |= {name for layer in sparse_layers for name in layer.sources}
        check_same_tensors(type(dense).__name__, needed - tensors.names, tensors.names - needed)
    return conversion


def check_numbers(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; raises a `ValueError` where it holds NaN."""
    if tensor.is_floating_point() and tensor.numel() and tensor.min().isnan():  # `min` needs no memory of its own
        raise ValueError(
            f"`{name.removeprefix('dense.')}` of the dense model holds NaN. Pass one that computes numbers."
        )
    return tensor


def check_same_tensors(name: str, missing: set[str], unknown: set[str]) -> None:
    """Raise a `ValueError` where a model lacks tensors, or has tensors that have no place in what it becomes."""
    if missing or unknown:
        first = f"lacks `{min(missing)}`" if missing else f"has `{min(unknown)}`, which has no place in the result"
        raise ValueError(
            f"`{name}` {first}. Pass a plain model: merge adapters first (`merge_and_unload()`), and undo other "
            "changes to its modules."
        )


def load_mixture(
    target: type[Any],
    config: Any,
    state_dict: dict[str, Any],
    dtype: torch.dtype,
    generation_config: GenerationConfig | None,
    **load_arguments: Any,
) -> SparseMoePreTrainedModel:
    """
    A mixture made of a whole state dict, whose values may be [`TensorSlices`], and of copies of both configs. Raises a
    `ValueError` for a tensor that is missing, has no place or another shape.
    """
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, **load_arguments}
    model, info = target.from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype, **options)
    check_same_tensors(target.__name__, set(info["missing_keys"]), set(info["unexpected_keys"]))
    for key, found, needed in info["mismatched_keys"]:
        raise ValueError(
            f"`{key}` would have the shape {list(found)}, but the dense model's config asks for {list(needed)}. Pass "
            "a model whose config tells its sizes, the same in all layers."
        )
    model.name_or_path = model.config.name_or_path = ""  # transformers writes "None", which tools ask the Hub for
    if model.can_generate() and generation_config is not None:
        model.generation_config = copy.deepcopy(generation_config)
    return model


@dataclass(frozen=True)
class TensorSlices:
    """
    A tensor with nothing in memory, as `safe_open(...).get_slice(...)` is one: transformers asks for its shape, then
    for the slices that this process keeps; `take` makes a part of it, given a slice for each dimension.
    """

    shape: list[int]
    take: Callable[[Index], torch.Tensor]

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, index: Index) -> torch.Tensor:
        return self.take((slice(None),) * len(self.shape) if index is ... else index)


def _part(made: Matrix | list[Matrix], index: Index, threads: ThreadPoolExecutor) -> torch.Tensor:
    """A copy: what it is cut of is a whole layer's weights, which go with the layer."""
    if isinstance(made, torch.Tensor):
        return made[index].clone()
    matrices, (rows, *columns) = (made[index[0]], index[1:]) if isinstance(made, list) else ([made], index)
    like = made[0] if isinstance(made, list) else made  # a process may have no experts of a layer
    begin, end, _ = rows.indices(like.shape[0])
    width = [len(range(size)[cut]) for size, cut in zip(like.shape[1:], columns, strict=True)]
    part = torch.empty((len(matrices), end - begin, *width), dtype=like.dtype)

    def fill(number: int, block: slice) -> None:
        made_rows = matrices[number][slice(begin + block.start, begin + block.stop)]
        part[number, block] = made_rows[(slice(None), *columns)]

    jobs = [threads.submit(fill, number, block) for number in range(len(matrices)) for block in blocks(part[number])]
    for job in jobs:
        job.result()
    return part if isinstance(made, list) else part[0]


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
    for each in (config, *(getattr(config, name) for name in config.sub_configs)):
        if each is not None:
            each.dtype = dtype
