"""What the routers decide while a mixture, ours or stock, is trained. T tokens, E experts, K experts a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sparse_moe.models.balancing import expert_counts
from hf_sparse_moe.models.masks import SideTokens, tokens_by_side
from hf_sparse_moe.models.routing import Routing, RoutingEvent

from .mixture_layers import MixtureLayer, event_of, watch_routing


# Logits that wait for the end of the forward pass, so that small layers are counted together, in few kernels. Beyond
# this many (16 MiB) they are counted at once, so that large ones are not held.
MAX_PENDING_LOGITS = 2**22


class TrainingEvents:
    """
    Hands on the routing of each forward pass that trains: not those of an evaluation or without gradients, nor the
    second pass of gradient checkpointing.

    Args:
        model (`nn.Module`): A mixture, perhaps inside PEFT, DDP or another wrapper.
        layers (`list[MixtureLayer]`): Its sparse layers.
        on_events (`Callable[[list[RoutingEvent]], None]`): Takes events whose tensors have the same shapes.
        on_outputs (`Callable[[dict, Any], None]`, *optional*): Takes arguments and outputs of each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[MixtureLayer],
        on_events: Callable[[list[RoutingEvent]], None],
        on_outputs: Callable[[dict[str, Any], Any], None] | None = None,
    ):
        self.model = outermost_mixture(model, layers)
        self._on_events, self._on_outputs = on_events, on_outputs
        self._is_training = self._is_called = False
        self._tokens: dict[str, SideTokens] = {}
        self._inputs: dict[str, Any] = {}
        self._events: list[RoutingEvent] = []
        self._pending = 0
        self._observation = watch_routing(layers, self._add)
        self._handles: list[RemovableHandle] = [
            # ahead of that of `fix_balance`, which takes the label count away
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._end),
        ]
        self._hooked: Any = None
        if self.model is not model:
            self._hook_direct_calls()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._observation.remove()
        for handle in self._handles:
            handle.remove()
        if self._hooked is not None:
            self.model.forward = self._hooked
        self._hooked = None

    def _hook_direct_calls(self) -> None:
        """sentence-transformers calls `forward` itself, past the hooks."""
        own: Any = self.model.forward
        if hasattr(own, "calls_hooks"):  # another callback's
            return

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._is_called:
                self._is_called = False
                return own(*args, **kwargs)
            return self.model(*args, **kwargs)

        vars(forward)["calls_hooks"] = True
        self._hooked, self.model.forward = own, forward

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._is_called = True
        self._is_training = model.training and torch.is_grad_enabled()
        self._events, self._pending = [], 0  # of a forward pass that an error ended
        if self._is_training:
            self._inputs, self._tokens = kwargs, tokens_by_side(model, kwargs)

    def _add(self, layer: MixtureLayer, routing: Routing) -> None:
        if not self._is_training:
            return
        routing = Routing._make(None if value is None else value.detach() for value in routing)
        self._events.append(event_of(layer, routing, self._tokens))
        self._pending += routing.router_logits.numel()
        if self._pending >= MAX_PENDING_LOGITS:
            self._hand_on()

    def _end(self, model: nn.Module, args: tuple, outputs: Any) -> None:
        if self._is_training:
            self._hand_on()
            if self._on_outputs is not None:
                with torch.no_grad():
                    self._on_outputs(self._inputs, outputs)
        self._is_training, self._inputs = False, {}

    @torch.no_grad()
    def _hand_on(self) -> None:
        groups: dict[tuple, list[RoutingEvent]] = {}
        for event in self._events:
            routing, layer = event.routing, event.layer
            shapes = (routing.router_logits.shape, routing.top_k_index.shape, routing.router_logits.device)
            absent = (event.token_mask is None, *(value is None for value in routing))
            groups.setdefault((*shapes, *absent, layer.scoring_func, layer.side), []).append(event)
        self._events, self._pending = [], 0
        for events in groups.values():
            self._on_events(events)


class EventCallback(TrainerCallback):
    """A callback that sees the routing of a training, from [`watch`] to its end."""

    _routing: TrainingEvents | None = None

    def watch(self, *args: Any) -> TrainingEvents:
        """Begin; takes what [`TrainingEvents`] takes."""
        self.unwatch()
        self._routing = TrainingEvents(*args)
        return self._routing

    def unwatch(self) -> None:
        """End, also what a training that an error ended has left behind."""
        if self._routing is not None:
            self._routing.remove()
        self._routing = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.unwatch()


def outermost_mixture(model: nn.Module, layers: list[MixtureLayer]) -> nn.Module:
    """The model of transformers around all `layers`, whose arguments say which tokens count; else `model`."""
    blocks = {layer.block for layer in layers}
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and blocks <= set(module.modules()):
            return module
    return model


def load_of(events: list[RoutingEvent]) -> torch.Tensor:
    """[`RoutingEvent.expert_counts`] of events whose tensors have the same shapes, `(events, E)`."""
    num_experts = events[0].routing.router_logits.shape[-1]
    index = torch.stack([event.routing.top_k_index for event in events])
    offsets = torch.arange(len(events), device=index.device)[:, None, None] * num_experts
    rows = [event.counted_rows for event in events]
    counted = None if rows[0] is None else torch.cat([row.to(index.device) for row in rows if row is not None])
    counts = expert_counts((index + offsets).flatten(0, 1), len(events) * num_experts, counted)
    return counts.unflatten(0, (len(events), num_experts))


def wide_dtype(device: torch.device) -> torch.dtype:
    """For sums over many forward passes: float32 counts exactly to 2^24 only, but Apple's devices have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
