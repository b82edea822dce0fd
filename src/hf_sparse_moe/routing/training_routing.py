"""What the routers decide while a mixture, ours or stock, is trained. T tokens, E experts, K experts a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_sparse_moe.models.balancing import expert_counts
from hf_sparse_moe.models.routers import Routing
from hf_sparse_moe.models.routing_record import RoutingRecord, outer_record
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, observe_routing


# Logits that wait for the end of the forward pass, so that small layers are counted together, in few kernels. Beyond
# this many (16 MiB) they are counted at once, so that large ones are not held.
MAX_PENDING_LOGITS = 2**22


class RouterCall(NamedTuple):
    """One call of one router. `token_mask` is `(T,)`, 0 for a pad, or None where every token counts."""

    row: int  # the layer's place in the list of layers
    layer: MixtureLayer
    routing: Routing
    token_mask: torch.Tensor | None


class TrainingRouting:
    """
    Hands on the routing of each forward pass that trains: not those of an evaluation or without gradients, nor the
    second pass of gradient checkpointing.

    Args:
        model (`nn.Module`): A mixture, perhaps inside PEFT, DDP or another wrapper.
        layers (`list[MixtureLayer]`): Its sparse layers.
        on_calls (`Callable[[list[RouterCall]], None]`): Takes calls whose tensors have the same shapes.
        on_outputs (`Callable[[dict, Any], None]`, *optional*): Takes arguments and outputs of each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[MixtureLayer],
        on_calls: Callable[[list[RouterCall]], None],
        on_outputs: Callable[[dict[str, Any], Any], None] | None = None,
    ):
        self.model = outermost_mixture(model, layers)
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._on_calls, self._on_outputs = on_calls, on_outputs
        self._is_training = False
        self._masks = RoutingRecord()
        self._calls: list[RouterCall] = []
        self._pending = 0
        self._observation = observe_routing(layers, self._add)
        self._handles: list[RemovableHandle] = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._observation.remove()
        for handle in self._handles:
            handle.remove()

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._is_training = model.training and torch.is_grad_enabled()
        self._calls, self._pending = [], 0  # of a forward pass that an error ended
        if self._is_training:
            self._masks = RoutingRecord(masks=stock_token_masks(model, kwargs))

    def _add(self, layer: MixtureLayer, routing: Routing) -> None:
        if not self._is_training:
            return
        known = outer_record() or self._masks  # our models say themselves which tokens count
        mask = known.context(side_of(layer), len(routing.router_logits)).mask
        routing = routing._replace(router_logits=routing.router_logits.detach())
        self._calls.append(RouterCall(self._rows[layer], layer, routing, mask))
        self._pending += routing.router_logits.numel()
        if self._pending >= MAX_PENDING_LOGITS:
            self._hand_on()

    def _end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        if self._is_training:
            self._hand_on()
            if self._on_outputs is not None:
                with torch.no_grad():
                    self._on_outputs(kwargs, outputs)
        self._is_training = False

    @torch.no_grad()
    def _hand_on(self) -> None:
        groups: dict[tuple, list[RouterCall]] = {}
        for call in self._calls:
            routing = call.routing
            shapes = (routing.router_logits.shape, routing.top_k_index.shape, routing.router_logits.device)
            kind = (routing.kept is None, routing.token_index is None, call.layer.scoring_func, side_of(call.layer))
            groups.setdefault((*shapes, *kind), []).append(call)
        self._calls, self._pending = [], 0
        for calls in groups.values():
            self._on_calls(calls)


def side_of(layer: MixtureLayer) -> str:
    """`"encoder"` or `"decoder"`; says which mask counts in an encoder-decoder, and nothing elsewhere."""
    inside_decoder = "decoder" in layer.name.split(".")
    return getattr(layer.block, "side", None) or ("decoder" if inside_decoder else "encoder")


def outermost_mixture(model: nn.Module, layers: list[MixtureLayer]) -> nn.Module:
    """The model of transformers around all `layers`, whose arguments say which tokens count; else `model`."""
    blocks = {layer.block for layer in layers}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and blocks <= set(module.modules()):
            return module
    return model


def stock_token_masks(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Per side, `(B, S)` with 0 for pads, from the arguments of a stock model's forward."""

    def two_dimensional(name: str) -> torch.Tensor | None:
        value = inputs.get(name)
        return value if isinstance(value, torch.Tensor) and value.dim() == 2 else None

    mask = two_dimensional("attention_mask")
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return {"encoder": mask, "decoder": mask}
    decoder_mask, decoder_ids = two_dimensional("decoder_attention_mask"), two_dimensional("decoder_input_ids")
    labels, pad = two_dimensional("labels"), getattr(config, "pad_token_id", None)
    if decoder_mask is None and labels is not None:
        decoder_mask = labels.ne(-100)
    elif decoder_mask is None and decoder_ids is not None and pad is not None:
        decoder_mask = decoder_ids.ne(pad)
        decoder_mask[:, 0] = True  # the first token may be the pad itself: T5 starts with it
    return {"encoder": mask, "decoder": decoder_mask}


def call_counts(calls: list[RouterCall]) -> torch.Tensor:
    """`(calls, E)`: how many tokens each expert was chosen for (dropped ones too) or, where experts choose, took."""
    first = calls[0].routing
    num_experts = first.router_logits.shape[-1]
    index = torch.stack([call.routing.top_k_index for call in calls])
    offsets = torch.arange(len(calls), device=index.device)[:, None, None] * num_experts
    if first.token_index is not None:
        counted = chosen_tokens(calls).flatten()
    elif (mask := calls[0].token_mask) is not None:
        counted = mask.to(index.device).repeat(len(calls))
    else:
        counted = None
    return expert_counts((index + offsets).flatten(0, 1), len(calls) * num_experts, counted).unflatten(
        0, (len(calls), num_experts)
    )


def chosen_tokens(calls: list[RouterCall]) -> torch.Tensor:
    """Where experts choose, `(calls, R)`: which of their R choices took a token that counts."""
    token_index = torch.stack([call.routing.token_index for call in calls])
    taken = torch.ones_like(token_index, dtype=torch.bool)
    if calls[0].routing.kept is not None:
        taken = torch.stack([call.routing.kept for call in calls]).flatten(1)
    mask = calls[0].token_mask
    return taken if mask is None else taken & mask.to(taken.device).bool()[token_index]


def wide_dtype(device: torch.device) -> torch.dtype:
    """For sums over many forward passes: float32 counts exactly to 2^24 only, but Apple's devices have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
