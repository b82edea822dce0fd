"""What the routers of one forward pass decided, gathered beside the dense model's own outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from transformers.utils.output_capturing import CompileableContextVar


class RoutingEntry(NamedTuple):
    """One sparse layer's part of the record. T tokens, pads included; E experts; K experts a token."""

    router_logits: torch.Tensor  # (T, E), float32
    top_k_index: torch.Tensor  # (T, K)
    side: str  # "encoder" or "decoder"


class RoutingRecord:
    """The entries of the sparse layers that ran while the record was open, in the order of their call."""

    def __init__(self) -> None:
        self.entries: list[RoutingEntry] = []


# `capture_outputs` of transformers ends at a nested `PreTrainedModel`, so the blocks report to this instead. Its
# variable is the one kind that works under `torch.compile(fullgraph=True)`.
_active_record = CompileableContextVar("sparse_moe_routing_record")


def open_record(record: RoutingRecord) -> Any:
    """Make `record` the one that sparse layers report to; pass what this returns to [`close_record`]."""
    return _active_record.set(record)


def close_record(token: Any) -> None:
    """End what [`open_record`] began."""
    _active_record.reset(token)


def report_routing(router_logits: torch.Tensor, top_k_index: torch.Tensor, side: str) -> None:
    """Called by a sparse layer; does nothing when no record is open."""
    record = _active_record.get()
    if record is not None:
        record.entries.append(RoutingEntry(router_logits, top_k_index, side))


def checkpoint_with_routing(checkpoint_function: Callable) -> Callable:
    """
    Wrap an activation-checkpointing function so that the router logits of the checkpointed layer leave it as outputs.

    A reentrant checkpoint runs the layer without gradients first: logits that merely escape through the record would
    carry none, and the balance loss would not reach the router.
    """

    @wraps(checkpoint_function)
    def checkpoint(function: Callable, *args, **kwargs):
        outer = _active_record.get()
        if outer is None:
            return checkpoint_function(function, *args, **kwargs)
        inner_entries: list[RoutingEntry] = []
        returns_tuple = False

        def function_with_logits(*inner_args, **inner_kwargs):
            nonlocal returns_tuple
            record, previous = RoutingRecord(), _active_record.get()
            _active_record.set(record)
            try:
                outputs = function(*inner_args, **inner_kwargs)
            finally:
                _active_record.set(previous)
            inner_entries[:] = record.entries
            returns_tuple = isinstance(outputs, tuple)
            outputs = outputs if returns_tuple else (outputs,)
            return *outputs, *(entry.router_logits for entry in record.entries)

        outputs = checkpoint_function(function_with_logits, *args, **kwargs)
        count = len(outputs) - len(inner_entries)
        for entry, router_logits in zip(inner_entries, outputs[count:], strict=True):
            outer.entries.append(entry._replace(router_logits=router_logits))
        return outputs[:count] if returns_tuple else outputs[0]

    return checkpoint
