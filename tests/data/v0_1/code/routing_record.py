"""What the routers of one forward pass decided, gathered beside the dense model's own outputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.output_capturing import CompileableContextVar


class RoutingEntry(NamedTuple):
    """One sparse layer's part of the record: what its router decided (see `Routing`), and the layer's side."""

    router_logits: torch.Tensor
    top_k_index: torch.Tensor
    side: str  # "encoder" or "decoder"
    kept: torch.Tensor | None = None
    token_index: torch.Tensor | None = None

    def counting_mask(self, token_mask_T: torch.Tensor | None) -> torch.Tensor | None:
        """Which rows of `top_k_index` count as load: those of tokens that are no pads, or that an expert chose."""
        return token_mask_T if self.token_index is None or self.kept is None else self.kept.flatten()


class TokenContext(NamedTuple):
    """
    What a router may know of its T tokens besides their hidden states.

    Args:
        mask (`torch.Tensor` of shape `(T,)`, *optional*): 0 for a pad; None where all count, or nobody knows.
        ids (`torch.LongTensor` of shape `(T,)`, *optional*): The token ids; None where nobody knows.
        num_sequences (`int`): The sequences, of T / `num_sequences` tokens each.
    """

    mask: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    num_sequences: int = 1


@dataclass
class RoutingRecord:
    """
    What the routers may know while the record is open, and what they decided.

    Args:
        masks (`dict[str, torch.Tensor]`): Per side, `(B, S)` with 0 for pads, or None.
        ids (`dict[str, torch.Tensor]`): Per side, the token ids `(B, S)`, or None.
        num_sequences (`dict[str, int]`): Per side, B.
        keep (`bool`, defaults to `True`): Whether to gather entries.
        entries (`list[RoutingEntry]`): Of the sparse layers that ran while it was open, in the order of their call.
    """

    masks: dict[str, torch.Tensor | None] = field(default_factory=dict)
    ids: dict[str, torch.Tensor | None] = field(default_factory=dict)
    num_sequences: dict[str, int] = field(default_factory=dict)
    keep: bool = True
    entries: list[RoutingEntry] = field(default_factory=list)

    def context(self, side: str, num_tokens: int) -> TokenContext:
        """Of the `num_tokens` tokens that a layer of `side` sees; what does not fit that number is left out."""
        ids = self.ids.get(side)
        ids = None if ids is None or ids.numel() != num_tokens else ids.reshape(-1)
        sequences = self.num_sequences.get(side)
        mask = _token_mask(self.masks.get(side), num_tokens, sequences)
        return TokenContext(mask, ids, sequences if sequences and num_tokens % sequences == 0 else 1)


def _token_mask(mask: torch.Tensor | None, num_tokens: int, num_sequences: int | None) -> torch.Tensor | None:
    """
    `(T,)` of a `(B, S)` mask, its last columns where a cache holds the earlier tokens; None if it cannot tell, as from
    a mask of pairs of tokens, `(B, S, S)` or `(B, 1, S, S)`.
    """
    if mask is None or mask.dim() not in (2, 3) or mask.numel() == 0:  # 3: several choices for each row
        return None
    mask = mask.reshape(-1, mask.shape[-1])
    if num_sequences is not None and len(mask) != num_sequences:
        return None
    length = num_tokens // mask.shape[0]
    if length * mask.shape[0] != num_tokens or length > mask.shape[1]:
        return None
    return mask[:, mask.shape[1] - length :].reshape(-1)


# `capture_outputs` of transformers ends at a nested `PreTrainedModel`, so the blocks report to this instead. Its
# variable is the one kind that works under `torch.compile(fullgraph=True)`.
_active_record = CompileableContextVar("sparse_moe_routing_record")


def open_record(record: RoutingRecord) -> Any:
    """Make `record` the one that sparse layers report to; pass what this returns to [`close_record`]."""
    return _active_record.set(record)


def close_record(token: Any) -> None:
    """End what [`open_record`] began."""
    _active_record.reset(token)


def outer_record() -> RoutingRecord | None:
    """The record that is open, if one is; under torch.compile, which cannot ask before one was opened, None."""
    return None if torch.compiler.is_compiling() else _active_record.get()


def report_routing(routing: Any, side: str) -> None:
    """Called by a sparse layer with its router's `Routing`; does nothing when no record gathers."""
    record = _active_record.get()
    if record is not None and record.keep:
        entry = RoutingEntry(routing.router_logits, routing.top_k_index, side, routing.kept, routing.token_index)
        record.entries.append(entry)


def token_context(side: str, num_tokens: int) -> TokenContext:
    """What is known of the tokens of this call; see [`TokenContext`]."""
    record = _active_record.get()
    return TokenContext() if record is None else record.context(side, num_tokens)


def record_when_alone(encoder: nn.Module) -> None:
    """
    Have `encoder` open a record of its own where it runs outside its model's forward pass, as in `generate`: its
    routers must know the mask, the ids and the number of the sequences there too.
    """
    encoder.register_forward_pre_hook(_before_encoder, with_kwargs=True)
    encoder.register_forward_hook(_after_encoder, always_call=True)


def _before_encoder(encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    outer = _active_record.get()
    if outer is not None and "encoder" in outer.num_sequences:
        return
    given = dict(zip(inspect.signature(encoder.forward).parameters, args, strict=False)) | kwargs
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    record = RoutingRecord({"encoder": given.get("attention_mask")}, {"encoder": ids}, keep=outer is not None)
    if ids is not None:
        record.num_sequences["encoder"] = math.prod(ids.shape[:-1])
    elif embeds is not None:
        record.num_sequences["encoder"] = math.prod(embeds.shape[:-2])
    if outer is not None:
        record.entries = outer.entries
    encoder._record_token = _active_record.set(record)


def _after_encoder(encoder: nn.Module, args: tuple, output: Any) -> None:
    token = encoder.__dict__.pop("_record_token", None)
    if token is not None:
        _active_record.reset(token)


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
            record, previous = replace(outer, entries=[]), _active_record.get()
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
