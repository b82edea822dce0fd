"""The products of each expert's rows with its matrix: one after another, or grouped into one call."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_mm

from .segments import Batch


MAPPED_BYTES = 32 * 2**20  # from here on, glibc maps every block anew


class Matrices:
    """
    A matrix (in, out) for each expert, of which `stored` (E, in, out) or, `transposed`, (E, out, in) are read. The
    products are of `dtype`: a single matrix of another one is cast into memory that the caches still hold afterwards.
    """

    def __init__(self, stored: torch.Tensor, dtype: torch.dtype, transposed: bool):
        self._stored, self.dtype, self._transposed = stored, dtype, transposed
        self.in_features, self.out_features = stored.shape[1:] if not transposed else stored.shape[:0:-1]
        self._buffer: torch.Tensor | None = None

    def one(self, expert: int) -> torch.Tensor | None:
        """(in, out); None where the expert has none, which makes its products 0."""
        matrix = self._stored[expert]
        if matrix.dtype != self.dtype:
            if self._buffer is None:
                self._buffer = matrix.new_empty(matrix.shape, dtype=self.dtype)
            matrix = self._buffer.copy_(matrix)
        return matrix.t() if self._transposed else matrix

    def several(self, experts: slice) -> torch.Tensor:
        """(F, in, out)"""
        every = experts == slice(0, len(self._stored))
        matrices = (self._stored if every else self._stored[experts]).to(self.dtype)
        return matrices.mT if self._transposed else matrices


def multiply(
    rows: torch.Tensor,
    matrices: Matrices,
    batch: Batch,
    out: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """Each row (B, in) times its expert's matrix, plus its bias (E, out); `add` adds that to `out` (B, out)."""
    if batch.grouped:
        product = _grouped(rows, matrices.several(batch.experts), batch)
        if biases is not None:
            product = product + biases.index_select(0, batch.expert_B)
        if batch.served_B1 is not None:
            product = torch.where(batch.served_B1, product, 0)
        if out is None:
            return product
        return out.add_(product) if add else out.copy_(product)
    if out is None:
        out = rows.new_empty(len(rows), matrices.out_features)
    for expert, x, y in split(batch, rows, out):
        matrix = matrices.one(expert)
        if matrix is None:
            y if add else y.zero_()
        elif add:
            y.addmm_(x, matrix)
        elif biases is None:
            torch.mm(x, matrix, out=y)
        else:
            torch.addmm(biases[expert], x, matrix, out=y)
    return out


def split(batch: Batch, *rows: torch.Tensor) -> Iterator[tuple]:
    """Of each expert that has any: its number and its part of each tensor of `rows` (B, ...)."""
    if not batch.hit:  # on a device, where the host does not know
        return iter(())
    return zip(batch.hit, *(one.split(batch.lengths) for one in rows), strict=True)


def grouped_outer(left: torch.Tensor, right: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(F, in, out), of each expert the sum over its rows of `left` (B, in) times `right` (B, out)."""
    return F.grouped_mm(left.mT, right, offs=batch.ends_F)


def suits_grouped(*sizes: int, dtype: torch.dtype) -> bool:
    """Whether torch's `grouped_mm` takes matrices of these sizes: their rows must be multiples of 16 bytes."""
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return known and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def _grouped(rows: torch.Tensor, matrices: torch.Tensor, batch: Batch) -> torch.Tensor:
    if not suits_grouped(*matrices.shape[1:], dtype=matrices.dtype):  # in a traced graph, which can hold no loop
        return torch.ops.transformers.grouped_mm_fallback(rows, matrices, batch.ends_F)
    return _grouped_mm(rows.contiguous(), matrices, batch.ends_F)


def zeros_besides(written: Collection[int], like: torch.Tensor) -> torch.Tensor:
    """
    Memory of the shape of `like` (E, ...), for the caller to write that of the experts `written`; the rest is 0.

    What others gave back serves as it is. What the C library asks the system for anew is zeros that cost nothing until
    they are written, and takes half the time to write in huge pages, which numpy's are.
    """
    if like.device.type == "cpu" and like.numel() * like.element_size() >= MAPPED_BYTES:
        memory = torch.from_numpy(np.zeros(like.numel() * like.element_size(), np.uint8))
        return memory.view(like.dtype).view(like.shape)
    if not written:  # also on a device, where the host does not know
        return torch.zeros_like(like)
    memory = torch.empty_like(like)
    for expert in set(range(len(like))).difference(written):
        memory[expert].zero_()
    return memory
