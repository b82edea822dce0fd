"""What all kinds of sharded checkpoints have in common: tensors whose parts lie in several files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch


class Chunk(NamedTuple):
    """A block of a tensor: where it begins in each dimension, its sizes, and how its elements are read, in order."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Callable[[], Iterable[torch.Tensor]]


class Run(NamedTuple):
    """Elements of a tensor that follow on each other in memory: the first one's place, how many, how they are read."""

    begin: int
    length: int
    read: Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor of a sharded checkpoint.

    Args:
        shape (`tuple[int, ...]`): Of the whole tensor.
        dtype (`torch.dtype`): As it is stored.
        runs (`list[Run]`): Its parts, in their order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: list[Run]

    @classmethod
    def from_chunks(cls, shape: Iterable[int], dtype: torch.dtype, chunks: list[Chunk]) -> StoredTensor:
        """Of blocks. Those that hold whole rows are read one by one; others are put together in memory."""
        shape, row = tuple(shape), prod(tuple(shape)[1:])
        if all(chunk.offsets[1:] == (0,) * (len(shape) - 1) and chunk.sizes[1:] == shape[1:] for chunk in chunks):
            runs = [Run(sum(chunk.offsets[:1]) * row, prod(chunk.sizes), chunk.read) for chunk in chunks]
            return cls(shape, dtype, sorted(runs, key=lambda run: run.begin))
        count = sum(prod(chunk.sizes) for chunk in chunks)
        return cls(shape, dtype, [Run(0, count, lambda: [_assembled(shape, dtype, chunks)])])

    @property
    def is_complete(self) -> bool:
        """Whether the parts follow on each other from the first element to the last."""
        end = 0
        for run in self.runs:
            if run.begin != end:
                return False
            end += run.length
        return end == prod(self.shape)

    def read(self) -> Iterator[torch.Tensor]:
        """The elements in their order, flat, a piece at a time."""
        for run in self.runs:
            for piece in run.read():
                yield piece.reshape(-1)


def incomplete(checkpoint: Any, reason: str) -> ValueError:
    """The error for a checkpoint of which something is missing or broken."""
    return ValueError(
        f"`{checkpoint}` is incomplete or corrupt: {reason}. Take an earlier checkpoint of the training, or copy it "
        "again."
    )


def _assembled(shape: tuple[int, ...], dtype: torch.dtype, chunks: list[Chunk]) -> torch.Tensor:
    whole = torch.empty(shape, dtype=dtype)
    for chunk in chunks:
        place = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = torch.cat([piece.reshape(-1) for piece in chunk.read()]).reshape(chunk.sizes)
    return whole
