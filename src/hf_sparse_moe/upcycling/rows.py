"""Matrices that are made a block of rows at a time, when asked for, by several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch


BLOCK_ELEMENTS = 2**18  # some copies of a block fit in a processor's cache


@dataclass(frozen=True)
class Rows:
    """
    A matrix (or vector) with nothing in memory.

    Args:
        shape (`torch.Size`): Of the whole.
        dtype (`torch.dtype`): Of the whole.
        make (`Callable`): Some of its rows; the same ones are the same bits, whoever asks and in whatever order.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[slice], torch.Tensor]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.make(rows).to(self.dtype)


Matrix = torch.Tensor | Rows


def by_rows(function: Callable[..., torch.Tensor], first: Matrix, *others: Matrix) -> Rows:
    """What `function` makes of the same rows of each matrix, with the shape and dtype of the first."""
    return Rows(first.shape, first.dtype, lambda rows: function(first[rows], *(other[rows] for other in others)))


def with_rows(matrix: Matrix, places: torch.Tensor, new: Matrix) -> Rows:
    """The matrix with new rows in some places, which must rise."""

    def make(rows: slice) -> torch.Tensor:
        begin, end = torch.searchsorted(places, torch.tensor([rows.start, rows.stop])).tolist()
        return matrix[rows].index_copy(0, places[begin:end] - rows.start, new[begin:end])

    return Rows(matrix.shape, matrix.dtype, make)


def blocks(matrix: Matrix) -> Iterator[slice]:
    """All rows, about `BLOCK_ELEMENTS` elements at a time."""
    height = max(1, BLOCK_ELEMENTS // max(1, prod(matrix.shape[1:])))
    for begin in range(0, matrix.shape[0], height):
        yield slice(begin, min(begin + height, matrix.shape[0]))


def fill(target: torch.Tensor, matrix: Matrix, threads: ThreadPoolExecutor) -> None:
    """Make the whole matrix in `target`."""

    def make(rows: slice) -> None:
        target[rows] = matrix[rows]

    for _ in threads.map(make, blocks(matrix)):
        pass


def mean_and_std(matrix: Matrix) -> tuple[float, float]:
    """Mean and standard deviation of all elements."""
    count, total, squares = prod(matrix.shape), 0.0, 0.0
    for rows in blocks(matrix):
        values = matrix[rows].flatten().double()  # new memory: the last bits of a sum depend on how that is aligned
        total += values.sum().item()
        squares += values.dot(values).item()
    mean = total / count
    return mean, max(0.0, squares / count - mean**2) ** 0.5


@contextmanager
def single_threaded_workers() -> Iterator[ThreadPoolExecutor]:
    """
    Threads, as many as torch would use, for blocks of rows. Within the context torch's own functions use one thread
    each: more would fight over the cores, and their number would change the last bits of sums.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # which threads that begin later take over
    threads = ThreadPoolExecutor(count)
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
        torch.set_num_threads(count)
