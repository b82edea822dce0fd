"""The tensors of a mixture, slice by slice as a loader asks for them, made of a dense checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch

from .rows import Matrix, Rows, fill
from .streaming import StreamPlan


Index = tuple[slice, ...]


@dataclass(frozen=True)
class TensorSlices:
    """
    A tensor with nothing in memory, as `safe_open(...).get_slice(...)` is one: transformers asks for its shape, then
    for the slices that this process keeps.

    Args:
        shape (`list[int]`): Of the whole.
        take (`Callable`): Makes a part of it, given a slice for each dimension.
    """

    shape: list[int]
    take: Callable[[Index], torch.Tensor]

    def get_shape(self) -> list[int]:
        return self.shape

    def __getitem__(self, index: Index) -> torch.Tensor:
        return self.take((slice(None),) * len(self.shape) if index is ... else index)


def mixture_slices(plan: StreamPlan, threads: ThreadPoolExecutor) -> dict[str, TensorSlices]:
    """
    What `from_pretrained(None, config=plan.config, state_dict=...)` takes to make a mixture or a part of it.

    Args:
        plan ([`StreamPlan`]): The mixture; nothing of it is made yet.
        threads (`ThreadPoolExecutor`): From `single_threaded_workers`, within whose context the slices must be taken:
            they are then the bits of [`upcycle`].
    """
    layers = _Layers(plan)

    def taker(key: str) -> Callable[[Index], torch.Tensor]:
        position = plan.layer_of(key)
        if position is None:
            return lambda index: plan.tensors.take(key.removeprefix("dense."), index)
        return lambda index: _part(layers.matrices(position, key), index, threads)

    return {key: TensorSlices(list(output.shape), taker(key)) for key, output in plan.outputs.items()}


class _Layers:
    """The sparse layers, read and planned when the first of their tensors is asked for."""

    KEPT = 2  # transformers loads with several threads, which may be at the end of one layer and the start of another

    def __init__(self, plan: StreamPlan):
        self._plan, self._lock = plan, Lock()
        self._made = lru_cache(maxsize=self.KEPT)(self._make)

    def matrices(self, position: int, key: str) -> Matrix | list[Matrix]:
        """A list, where the tensor has an entry for each expert."""
        with self._lock:
            return self._made(position)[key]

    def _make(self, position: int) -> dict[str, Matrix | list[Matrix]]:
        single: dict[str, Matrix] = {}
        experts: dict[str, list[Matrix]] = {}
        read = self._plan.tensors.reader(reuse=False)
        for key, expert, matrix in self._plan.layers[position].pieces(read, self._plan.config, self._plan.recipe):
            if expert is None:
                single[key] = matrix
            else:
                experts.setdefault(key, []).append(matrix)
        return {**single, **experts}


def _part(made: Matrix | list[Matrix], index: Index, threads: ThreadPoolExecutor) -> torch.Tensor:
    """A copy: what it is cut of is a whole layer's weights, which go with the layer."""
    if isinstance(made, torch.Tensor):
        return made[index].clone()
    if isinstance(made, Rows):
        window = _window(made, index)
        part = torch.empty(window.shape, dtype=window.dtype)
        fill(part, window, threads)
        return part
    window = _window(made[0], index[1:])
    chosen = made[index[0]]
    part = torch.empty((len(chosen), *window.shape), dtype=window.dtype)
    for target, matrix in zip(part, chosen, strict=True):
        fill(target, _window(matrix, index[1:]), threads)
    return part


def _window(matrix: Matrix, index: Index) -> Rows:
    rows, *columns = index
    begin = rows.indices(matrix.shape[0])[0]
    shape = torch.Size(len(range(size)[part]) for size, part in zip(matrix.shape, index, strict=True))

    def make(part: slice) -> torch.Tensor:
        return matrix[begin + part.start : begin + part.stop][(slice(None), *columns)]

    return Rows(shape, matrix.dtype, make)
