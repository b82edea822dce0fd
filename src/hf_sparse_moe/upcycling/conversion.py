"""The tensors of a mixture, layer by layer, from those of a dense model, wherever these lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.feed_forward import FeedForward
from hf_sparse_moe.models.moe_block import sparse_feed_forwards

from .initialization import INITIALIZATION_METHODS, FeedForwardWeights, InitializationMethod, LayerContext
from .router_start import router_tensors
from .rows import Matrix, fill, single_threaded_workers


@dataclass(frozen=True)
class Recipe:
    """How the experts start: the method, its options with their defaults filled in, and the seed."""

    method: str
    seed: int
    options: dict[str, Any]

    @property
    def initialization(self) -> InitializationMethod:
        return INITIALIZATION_METHODS[self.method]


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
    def sources(self) -> list[str]:
        """The dense model's keys that the layer is made of."""
        kinds = ("weight", "bias") if self.feed_forward.biased else ("weight",)
        names = [name for kind in kinds for part in self._projections(kind) for name in part]
        return names + list(self._activation_keys())

    def convert(
        self,
        read: Callable[..., torch.Tensor],
        config: SparseMoeConfig,
        recipe: Recipe,
        threads: ThreadPoolExecutor,
        **measured: Any,
    ) -> dict[str, torch.Tensor]:
        """The mixture's tensors of this layer, by the mixture's keys, made by `threads` of what [`pieces`] takes."""
        tensors: dict[str, torch.Tensor] = {}
        for key, expert, matrix in self.pieces(read, config, recipe, **measured):
            if expert is None and isinstance(matrix, torch.Tensor):
                tensors[key] = matrix.contiguous()
                continue
            if not expert:
                experts = () if expert is None else (config.num_experts,)
                tensors[key] = torch.empty(*experts, *matrix.shape, dtype=matrix.dtype)
            fill(tensors[key] if expert is None else tensors[key][expert], matrix, threads)
        return tensors

    def pieces(
        self,
        read: Callable[..., torch.Tensor],
        config: SparseMoeConfig,
        recipe: Recipe,
        **measured: Any,
    ) -> Iterator[tuple[str, int | None, Matrix]]:
        """
        The mixture's tensors of this layer as (key, expert, matrix). The matrices of the routed experts come one
        expert after the other, each a row of the key's tensor; with the others `expert` is None.

        Args:
            read (`Callable`): The tensor of one of `sources`, or one below the other those of several.
            config ([`SparseMoeConfig`]): The mixture's config.
            recipe ([`Recipe`]): How the experts start.
            **measured: What a method needs besides the weights, as [`LayerContext`] takes it.
        """
        seed = np.random.SeedSequence((recipe.seed % 2**64, self.position)).generate_state(1)  # torch heeds 32 bits
        generator = torch.Generator().manual_seed(int(seed[0]))
        context = LayerContext(config, generator, recipe.options, **measured)
        dense = self.weights(read)
        start = recipe.initialization.start(dense, context)
        prefix, up_name = f"dense.{self.feed_forward.block_path}", "gate_up_proj" if dense.gated else "up_proj"
        router = router_tensors(config, start.router, dense.down.dtype, generator)
        for name, tensor in router.items():
            yield f"{prefix}.gate.{name}", None, tensor
        for number, expert in enumerate(start.experts):
            parts = {
                up_name: expert.up,
                "down_proj": expert.down,
                f"{up_name}_bias": expert.up_bias,
                "down_proj_bias": expert.down_bias,
            }
            for name, tensor in parts.items():
                if tensor is not None:
                    yield f"{prefix}.experts.{name}", number, tensor
        if start.shared is not None:
            shared = {
                "up_proj.weight": start.shared.up,
                "down_proj.weight": start.shared.down,
                "up_proj.bias": start.shared.up_bias,
                "down_proj.bias": start.shared.down_bias,
            }
            for name, tensor in shared.items():
                if tensor is not None:
                    yield f"{prefix}.shared_experts.{name}", None, tensor
        for key, name in self._activation_keys().items():
            yield f"{prefix}.experts.act_fn.{name}", None, read(key)

    def _projections(self, kind: str) -> tuple[list[str], list[str]]:
        ups, down = self.feed_forward.parameter_names(kind)
        path = self.feed_forward.path
        return [f"{path}.{name}" for name in ups], [f"{path}.{down}"]

    def weights(self, read: Callable[..., torch.Tensor]) -> FeedForwardWeights:
        """The dense feed-forward, in the experts' layout."""

        def take(kind: str) -> list[torch.Tensor]:
            if self.feed_forward.transposed and kind == "weight":
                return [torch.cat([read(name).T for name in names]) for names in self._projections(kind)]
            return [read(*names) for names in self._projections(kind)]

        up, down = take("weight")
        up_bias, down_bias = take("bias") if self.feed_forward.biased else (None, None)
        return FeedForwardWeights(up, down, up_bias, down_bias, self.feed_forward.layout.gated)

    def _activation_keys(self) -> dict[str, str]:
        """The dense keys of the activation's own parameters, where it has some (xIELU), and their last names."""
        activation = self.feed_forward.activation
        names = activation.state_dict() if isinstance(activation, nn.Module) else {}
        prefix = f"{self.feed_forward.path}.{self.feed_forward.activation_name}"
        return {f"{prefix}.{name}": name for name in names}


def reader(tensors: Mapping[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What [`SparseLayer.pieces`] reads with, of tensors in memory."""

    def read(*names: str) -> torch.Tensor:
        parts = [tensors[name].cpu() for name in names]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()

    return read


def sparse_layers(dense: PreTrainedModel, config: SparseMoeConfig, family_side: str) -> list[SparseLayer]:
    """The layers of `dense`, which may be without storage, that the config makes sparse."""
    chosen = sparse_feed_forwards(dense, config, family_side)
    return [SparseLayer(position, feed_forward) for position, (feed_forward, _) in enumerate(chosen)]


def sparse_state_dict(
    dense: PreTrainedModel,
    config: SparseMoeConfig,
    family_side: str,
    recipe: Recipe,
    measured: Callable[[SparseLayer], dict[str, Any]] = lambda layer: {},
) -> dict[str, torch.Tensor]:
    """
    The state of the mixture that `dense` becomes. Tensors other than the experts' are the dense model's own, not
    copies.

    Args:
        dense (`PreTrainedModel`): The dense model.
        config ([`SparseMoeConfig`]): The mixture's config.
        family_side (`str`): The side of an encoder-only or decoder-only family.
        recipe ([`Recipe`]): How the experts start.
        measured (`Callable`, *optional*): What the method needs besides a layer's weights.
    """
    layers = sparse_layers(dense, config, family_side)
    state = {key: tensor for key, tensor in dense.state_dict().items() if key not in dense.all_tied_weights_keys}
    experts: dict[str, torch.Tensor] = {}
    with single_threaded_workers() as threads:
        for layer in layers:
            tensors = {name: state.pop(name).cpu() for name in layer.sources}
            experts |= layer.convert(reader(tensors), config, recipe, threads, **measured(layer))
    return {f"dense.{key}": tensor for key, tensor in state.items()} | experts
