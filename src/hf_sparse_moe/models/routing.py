"""What a router decided, the event that a sparse layer records of it, and the record of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.output_capturing import CompileableContextVar

from .balancing import expert_counts
from .masks import NO_CONTEXT, SideTokens, TokenContext


class Routing(NamedTuple):
    """
    What a router decided for T tokens.

    Args:
        router_logits (`torch.FloatTensor` of shape `(T, E)`): In float32; those that are not finite are 0.
        top_k_weights (`torch.FloatTensor` of shape `(T, K)`): 0 for an assignment that was dropped.
        top_k_index (`torch.LongTensor` of shape `(T, K)`): The experts, the best first.
        kept (`torch.BoolTensor`, *optional*): Of the same shape; False for an assignment that was dropped.
        token_index (`torch.LongTensor` of shape `(R,)`, *optional*): Where the experts chose: the token of each of R
            assignments. Index, weights and `kept` then have the shape `(R, 1)`.
        raw_logits (`torch.FloatTensor` of shape `(T, E)`, *optional*): The logits as the router computed them, NaN and
            infinity among them. None where `router_logits` are those.
    """

    router_logits: torch.Tensor
    top_k_weights: torch.Tensor
    top_k_index: torch.Tensor
    kept: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    raw_logits: torch.Tensor | None = None

    @property
    def non_finite(self) -> torch.Tensor:
        """`(T,)`: the tokens for which the router computed NaN or infinity."""
        return ~finite_rows(self.router_logits if self.raw_logits is None else self.raw_logits)


def finite_rows(router_logits_TE: torch.Tensor) -> torch.Tensor:
    """`(T,)`: the rows without NaN and infinity. Their sum tells, in one pass over them."""
    return router_logits_TE.detach().sum(dim=-1).isfinite()


class RoutingEvent(NamedTuple):
    """
    One call of one sparse layer.

    Args:
        layer (`Any`): The `SparseMoeBlock` or, of any mixture, the `MixtureLayer`.
        routing ([`Routing`]): What its router decided.
        token_mask (`torch.BoolTensor` of shape `(T,)`, *optional*): False for a pad; None where every token counts.
        num_sequences (`int`): The sequences, of T / `num_sequences` tokens each.
        context ([`TokenContext`]): What else is known of the tokens.
    """

    layer: Any
    routing: Routing
    token_mask: torch.Tensor | None = None
    num_sequences: int = 1
    context: TokenContext = NO_CONTEXT

    @classmethod
    def of(cls, layer: Any, routing: Routing, context: TokenContext) -> RoutingEvent:
        """The event of a call with the tokens of `context`."""
        mask = context.mask
        mask = None if mask is None else mask.to(routing.router_logits.device)
        return cls(layer, routing, mask, context.num_sequences, context)

    @property
    def sequence_ids(self) -> torch.Tensor | None:
        """`(T,)`, the number of each token's sequence, where something tells that rows hold several."""
        sequence_T = self.context.sequence_ids
        return None if sequence_T is None else sequence_T.to(self.routing.router_logits.device)

    @property
    def num_tokens(self) -> torch.Tensor | int:
        """How many tokens count."""
        return len(self.routing.router_logits) if self.token_mask is None else self.token_mask.sum()

    @property
    def counted_rows(self) -> torch.Tensor | None:
        """
        Which rows of `top_k_index` count as load, None for all: those of tokens that are no pads, dropped assignments
        among them; where experts choose, those that took such a token.
        """
        index, kept = self.routing.token_index, self.routing.kept
        if index is None:
            return self.token_mask
        kept = torch.ones_like(index, dtype=torch.bool) if kept is None else kept.flatten()
        return kept if self.token_mask is None else kept & self.token_mask[index]

    def expert_counts(self, num_experts: int) -> torch.Tensor:
        """`(E,)`: how many tokens each expert was chosen for or, where experts choose, took."""
        return expert_counts(self.routing.top_k_index, num_experts, self.counted_rows)


@dataclass
class RoutingRecord:
    """
    One forward pass of a model: what its routers may know, and the events of its sparse layers.

    Args:
        tokens (`dict[str, SideTokens]`): The tokens of each side.
        keep (`bool`, defaults to `True`): Whether to gather events.
        owner (`object`, *optional*): The [`OptimizerStep`] of the model, its mark.
        part (`nn.Module`, *optional*): The part of the model that opened it, run by itself.
        gives_logits (`bool`, defaults to `False`): Whether that part returns the router logits.
        inputs (`dict`): The arguments of its forward.
        events (`list[RoutingEvent]`): Of the sparse layers that ran while it was open, in the order of their call.
    """

    tokens: dict[str, SideTokens] = field(default_factory=dict)
    keep: bool = True
    owner: object = None
    part: nn.Module | None = None
    gives_logits: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)
    events: list[RoutingEvent] = field(default_factory=list)
    attach: Callable[[Any], Any] | None = None  # called once, with the outputs of the body
    opened: Any = None  # what takes it off the context again

    def context(self, side: str, num_tokens: int) -> TokenContext:
        """Of the `num_tokens` tokens that a layer of `side` sees."""
        return TokenContext(self.tokens.get(side, NO_CONTEXT.side), num_tokens)

    def open(self) -> RoutingRecord:
        """Make it the one that sparse layers report to, until [`close`]."""
        self.opened = _active_record.set(self)
        return self

    def close(self) -> None:
        """End what [`open`] began."""
        _active_record.reset(self.opened)
        self.attach = None


# `capture_outputs` of transformers ends at a nested `PreTrainedModel`, so the blocks report to this instead. Its
# variable is the one kind that works under `torch.compile(fullgraph=True)`; each thread has its own.
_active_record = CompileableContextVar("sparse_moe_routing_record")


def active_record() -> RoutingRecord | None:
    """The record that is open, if one is."""
    return _active_record.get()


def checkpoint_with_routing(checkpoint_function: Callable) -> Callable:
    """
    Wrap an activation-checkpointing function so that the router logits of the checkpointed layer leave it as outputs.

    A reentrant checkpoint runs the layer without gradients first: logits that merely escape through the record would
    carry none, and the balance loss would not reach the router.
    """

    if hasattr(checkpoint_function, "with_routing"):
        return checkpoint_function

    @wraps(checkpoint_function)
    def checkpoint(function: Callable, *args, **kwargs):
        outer = active_record() or RoutingRecord(keep=False)
        inner_events: list[RoutingEvent] = []
        returns_tuple = False

        def function_with_logits(*inner_args, **inner_kwargs):
            nonlocal returns_tuple
            record, previous = replace(outer, events=[]), _active_record.get()
            _active_record.set(record)
            try:
                outputs = function(*inner_args, **inner_kwargs)
            finally:
                _active_record.set(previous)
            inner_events[:] = record.events
            returns_tuple = isinstance(outputs, tuple)
            outputs = outputs if returns_tuple else (outputs,)
            return *outputs, *(event.routing.router_logits for event in record.events)

        outputs = checkpoint_function(function_with_logits, *args, **kwargs)
        count = len(outputs) - len(inner_events)
        for event, router_logits in zip(inner_events, outputs[count:], strict=True):
            outer.events.append(event._replace(routing=event.routing._replace(router_logits=router_logits)))
        return outputs[:count] if returns_tuple else outputs[0]

    vars(checkpoint)["with_routing"] = True
    return checkpoint
