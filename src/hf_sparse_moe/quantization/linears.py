"""Experts as linear layers for a while, for tools that calibrate those alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_sparse_moe.models.quantization import fused_experts

from .in_memory import check_plain_floats


@contextmanager
def experts_as_linears(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """
    Inside the `with`, every expert is `nn.Linear` modules, `experts.3.gate_proj` and so on, with the same outputs.

    For GPTQ, AWQ, compressors and whatever else hooks linear layers, of this library's mixtures and stock ones. The
    linears share the memory of the fused weights, to which what a tool has put into their `weight` and `bias` goes
    back at the end. An expert sees the tokens that are routed to it, so calibrate on enough text for the rarest one.
    Training inside is not supported.

    Args:
        model (`nn.Module`): A mixture whose experts are floats in memory, without adapters.

    Yields:
        `dict[str, torch.Tensor]`: For each experts module by name, the tokens that each expert has seen, of shape
        `(E,)`.

    Raises:
        ValueError: no such experts; or, at the end, linears that a tool has replaced or reshaped.

    Example:
        ```python
        with experts_as_linears(model) as tokens:
            calibrate(model, texts)
        rarest = min(count.min() for count in tokens.values())
        ```
    """
    found = dict(fused_experts(model))
    if hasattr(model, "peft_config"):
        raise ValueError("Experts with adapters do not become linears. Pass what `merge_and_unload()` returns.")
    check_plain_floats(model)
    tokens = {name: torch.zeros(experts.num_experts, dtype=torch.long) for name, experts in found.items()}
    for name, experts in found.items():
        for number in range(experts.num_experts):
            experts.add_module(str(number), nn.ModuleDict(_linears(experts, number)))
        experts.forward = _Loop(experts, tokens[name])
    try:
        yield tokens
    finally:
        changed = {}
        for name, experts in found.items():
            del experts.forward
            for number in range(experts.num_experts):
                changed[name, number] = experts._modules.pop(str(number))
    changes = [
        change
        for (name, number), linears in changed.items()
        for change in _changes(found[name], f"{name}.{number}", number, linears)
    ]
    for part, new in changes:
        part.copy_(new)


def _parts(experts: Any, number: int) -> dict[str, list[torch.Tensor]]:
    """Weight `(out, in)` and perhaps bias of each linear of an expert, as views."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    parts: dict[str, list[torch.Tensor]] = {}
    for name in (up, "down_proj"):
        weight = getattr(experts, name).data[number]
        tensors = [weight.mT if experts.is_transposed else weight]
        if experts.has_bias:
            tensors.append(getattr(experts, f"{name}_bias").data[number])
        if name == "gate_up_proj":
            half = len(tensors[0]) // 2
            joined = experts.is_concatenated  # otherwise a row of the gate, a row of the other, and so on
            parts["gate_proj"] = [tensor[:half] if joined else tensor[::2] for tensor in tensors]
            parts["up_proj"] = [tensor[half:] if joined else tensor[1::2] for tensor in tensors]
        else:
            parts[name] = tensors
    return parts


def _linears(experts: Any, number: int) -> dict[str, nn.Module]:
    linears: dict[str, nn.Module] = {}
    for name, (weight, *bias) in _parts(experts, number).items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(bias), device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            linear.bias = nn.Parameter(bias[0], requires_grad=False)
        linears[name] = linear
    return linears


class _Loop:
    """Expert after expert, each by its linears, counting the tokens."""

    def __init__(self, experts: Any, tokens: torch.Tensor):
        self.experts, self.tokens = experts, tokens

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        experts, output = self.experts, torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if number >= experts.num_experts:  # no expert
                continue
            token, slot = torch.where(top_k_index == number)
            self.tokens[number] += len(token)
            linears, rows = experts.get_submodule(str(number)), hidden_states[token]
            if experts.has_gate:
                halves = [linears["gate_proj"](rows), linears["up_proj"](rows)]
                joined = torch.cat(halves, -1) if experts.is_concatenated else torch.stack(halves, -1).flatten(-2)
                inner = experts._apply_gate(joined)
            else:
                inner = experts.act_fn(linears["up_proj"](rows))
            weighted = linears["down_proj"](inner) * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


def _changes(experts: Any, where: str, number: int, linears: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each part of the fused weights, and what it becomes."""
    for name, parts in _parts(experts, number).items():
        linear = linears[name]
        for kind, part in zip(("weight", "bias"), parts, strict=False):
            new = getattr(linear, kind, None)
            if not isinstance(new, torch.Tensor) or new.shape != part.shape or not new.is_floating_point():
                raise ValueError(
                    f"`{where}.{name}` is a {type(linear).__name__} now, whose {kind} is not {tuple(part.shape)} "
                    "floats, so it does not go back into the fused experts. Have the tool keep rounded floats."
                )
            yield part, new.detach()
