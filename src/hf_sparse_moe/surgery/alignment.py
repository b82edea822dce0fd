"""Experts whose hidden units stand in other places: which unit of one is which of another. I units, H hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from hf_sparse_moe.upcycling.initialization import FeedForwardWeights
from hf_sparse_moe.upcycling.rows import by_rows


def aligned(expert: FeedForwardWeights, to: FeedForwardWeights) -> FeedForwardWeights:
    """The expert with its hidden units in the order of those of `to`: the same function, in weights to be averaged."""
    return expert.take(matching_units(_units(expert), _units(to)))


def matching_units(units: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """
    Which unit is which, given all the weights of each (I, features): `(I,)`, for each unit of `to` one of `units`, so
    that the squared distances sum to the least of all one-to-one matchings (as M-SMoE, arXiv 2310.01334).
    """
    linear_sum_assignment = require_scipy("optimize").linear_sum_assignment
    likeness = to.float() @ units.float().T
    return torch.from_numpy(linear_sum_assignment(likeness.cpu().numpy(), maximize=True)[1])


def require_scipy(part: str) -> Any:
    """A part of scipy, an extra; raises an `ImportError` that says how to get it."""
    try:
        return import_module(f"scipy.{part}")
    except ImportError as error:
        raise ImportError("Merging experts needs scipy: `pip install hf-sparse-moe[surgery]`.") from error


def blended(experts: Sequence[FeedForwardWeights], weights: Sequence[float]) -> FeedForwardWeights:
    """The [`mean`] of experts, made when written."""
    made: dict[str, Any] = {
        name: by_rows(lambda *rows: mean(rows, weights), *(each.matrices[name] for each in experts))
        for name in experts[0].matrices
    }
    return replace(experts[0], **made)


def mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The mean by `weights`, which sum to 1, in float32 at least; of equal tensors exactly the one."""
    first, *others = (tensor.float() if tensor.dtype.itemsize < 4 else tensor for tensor in tensors)
    return first + sum(weight * (other - first) for weight, other in zip(weights[1:], others, strict=True))


def _units(expert: FeedForwardWeights) -> torch.Tensor:
    """`(I, features)`: all weights of each hidden unit."""
    ups = expert.up[:].float().chunk(expert.parts)
    biases = () if expert.up_bias is None else expert.up_bias[:].float().chunk(expert.parts)
    return torch.cat([*ups, expert.down[:].float().T, *(bias[:, None] for bias in biases)], dim=1)
