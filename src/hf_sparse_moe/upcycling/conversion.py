"""The tensors of a mixture, layer by layer, from those of a dense model, wherever these lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.feed_forward import FeedForward
from hf_sparse_moe.models.moe_block import sparse_feed_forwards

from .initialization import INITIALIZATION_METHODS, FeedForwardWeights, InitializationMethod, LayerContext


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
        read: Callable[[str], torch.Tensor],
        config: SparseMoeConfig,
        recipe: Recipe,
        **measured: Any,
    ) -> dict[str, torch.Tensor]:
        """The mixture's tensors of this layer, by the mixture's keys; takes what [`pieces`] takes."""
        tensors: dict[str, torch.Tensor] = {}
        for key, expert, tensor in self.pieces(read, config, recipe, **measured):
            if expert is None:
                tensors[key] = tensor.contiguous()
                continue
            if expert == 0:
                tensors[key] = tensor.new_empty(config.num_experts, *tensor.shape)
            tensors[key][expert] = tensor
        return tensors

    def pieces(
        self,
        read: Callable[[str], torch.Tensor],
        config: SparseMoeConfig,
        recipe: Recipe,
        **measured: Any,
    ) -> Iterator[tuple[str, int | None, torch.Tensor]]:
        """
        The mixture's tensors of this layer as (key, expert, tensor). The tensors of the routed experts come one expert
        after the other, each a row of the key's tensor; with the others `expert` is None.

        Args:
            read (`Callable`): The tensor of one of `sources`.
            config ([`SparseMoeConfig`]): The mixture's config.
            recipe ([`Recipe`]): How the experts start.
            **measured: What a method needs besides the weights, as [`LayerContext`] takes it.
        """
        generator = torch.Generator().manual_seed((recipe.seed << 16) + self.position)
        context = LayerContext(config, generator, recipe.options, **measured)
        dense = self.weights(read)
        start = recipe.initialization.start(dense, context)
        prefix, up_name = f"dense.{self.feed_forward.block_path}", "gate_up_proj" if dense.gated else "up_proj"
        yield f"{prefix}.gate.weight", None, start.router.to(dense.down.dtype)
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

    def weights(self, read: Callable[[str], torch.Tensor]) -> FeedForwardWeights:
        """The dense feed-forward, in the experts' layout."""

        def take(kind: str) -> list[torch.Tensor]:
            turn = self.feed_forward.transposed and kind == "weight"
            parts = [[read(name) for name in names] for names in self._projections(kind)]
            turned = [[tensor.T if turn else tensor for tensor in part] for part in parts]
            return [(torch.cat(part) if len(part) > 1 else part[0]).contiguous() for part in turned]

        up, down = take("weight")
        up_bias, down_bias = take("bias") if self.feed_forward.biased else (None, None)
        return FeedForwardWeights(up, down, up_bias, down_bias, self.feed_forward.layout.gated)

    def _activation_keys(self) -> dict[str, str]:
        """The dense keys of the activation's own parameters, where it has some (xIELU), and their last names."""
        activation = self.feed_forward.activation
        names = activation.state_dict() if isinstance(activation, nn.Module) else {}
        prefix = f"{self.feed_forward.path}.{self.feed_forward.activation_name}"
        return {f"{prefix}.{name}": name for name in names}


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
    for layer in layers:
        tensors = {name: state.pop(name).cpu() for name in layer.sources}
        experts |= layer.convert(tensors.__getitem__, config, recipe, **measured(layer))
    return {f"dense.{key}": tensor for key, tensor in state.items()} | experts
