"""Matrices that are made a block of rows at a time, when they are asked for, by several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from threading import Barrier

import numpy as np
import torch


BLOCK_ELEMENTS = 2**18  # some copies of a block fit in a processor's cache
DRAWS_IN_A_WORD = 4  # 16 random bits choose a quantile


@dataclass(frozen=True)
class Rows:
    """A matrix (or vector) with nothing in memory."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[slice], torch.Tensor]  # the same rows are the same bits, whoever asks and in whatever order

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


def mean_and_std(matrix: Matrix) -> tuple[float, float]:
    """Mean and standard deviation of all elements."""
    count, total, squares = prod(matrix.shape), 0.0, 0.0
    for rows in blocks(matrix):
        values = matrix[rows].flatten().double()  # new memory: the last bits of a sum depend on how that is aligned
        total += values.sum().item()
        squares += values.dot(values).item()
    mean = total / count
    return mean, max(0.0, squares / count - mean**2) ** 0.5


@lru_cache(maxsize=64)
def _scaled_quantiles(mean: float, std: float, dtype: torch.dtype) -> torch.Tensor:
    return (_quantiles() * std + mean).to(dtype)


@lru_cache(maxsize=1)
def _quantiles() -> torch.Tensor:
    """The 65,536 equally likely values that stand for the standard normal distribution, mean 0 and deviation 1."""
    centres = (torch.arange(2**16, dtype=torch.float64, device="cpu") + 0.5) / 2**16
    quantiles = torch.special.ndtri(centres)
    return (quantiles / quantiles.square().mean().sqrt()).float()


def normal_rows(shape: torch.Size, dtype: torch.dtype, mean: float, std: float, seed: int) -> Rows:
    """
    A matrix of normal numbers that depend on the seed and their position alone, so that any thread can draw any of
    them: element i is draw i of the seed's stream, and another dtype is another rounding of the same numbers. Sixteen
    bits of a PCG64 stream choose one of 65,536 quantiles: several times as fast as `torch.Tensor.normal_`. Up to 3.5
    deviations the quantiles lie closer than bfloat16 numbers do; the last is at 4.3.
    """
    width = prod(shape[1:])

    def draw(rows: slice) -> torch.Tensor:
        begin, end = rows.start * width, rows.stop * width
        word, skipped = divmod(begin, DRAWS_IN_A_WORD)
        words = np.random.PCG64(seed).advance(word).random_raw(-(-end // DRAWS_IN_A_WORD) - word)
        chosen = words.view(np.uint16)[skipped : skipped + end - begin].astype(np.int32)
        values = _scaled_quantiles(mean, std, dtype)
        return values.index_select(0, torch.from_numpy(chosen)).reshape(rows.stop - rows.start, *shape[1:])

    return Rows(shape, dtype, draw)


@contextmanager
def single_threaded_workers(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """
    Threads, as many as torch uses or `count`, in each of which torch's own functions use one thread: more would fight
    over the cores, and their number would change the last bits of sums. The caller's thread keeps its number.
    """
    before = torch.get_num_threads()
    count = count or before
    started = Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes over the number at its first use of it
        started.wait()

    threads = ThreadPoolExecutor(count, initializer=start)
    try:
        for _ in range(count):
            threads.submit(int)
        started.wait()
        torch.set_num_threads(before)  # for threads that begin later
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)
