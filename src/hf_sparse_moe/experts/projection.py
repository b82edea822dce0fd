"""One projection of all experts, and its gradients."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from .products import Matrices, grouped_outer, multiply, split, zeros_besides
from .segments import Batch


class Projection:
    """
    y = x W_e^T + b_e, for the rows of each expert e. W (E, out, in), or (E, in, out) if `transposed`; b (E, out).

    The products are of `dtype`. What is `beside` W adds to y, to x's gradient, and notes its own gradient.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        transposed: bool,
        beside: Sequence[Any] = (),
    ):
        self.weight, self.bias, self.dtype, self.transposed, self.beside = weight, bias, dtype, transposed, beside
        self._there = Matrices(weight, dtype, transposed=not transposed)
        self._back = Matrices(weight, dtype, transposed=transposed)
        self._biases = None if bias is None else bias.to(dtype)

    def __call__(self, rows: torch.Tensor, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """(B, in) to (B, out)."""
        out = multiply(rows, self._there, batch, out, self._biases)
        for one in self.beside:
            out = one.add(out, rows, batch)
        return out

    def transposed_product(
        self, gradient: torch.Tensor, batch: Batch, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x's gradient (B, in) from that of y (B, out)."""
        out = multiply(gradient, self._back, batch, out)
        for one in self.beside:
            one.add_transposed(out, gradient, batch)
        return out

    def add_bias_products(self, gradient: torch.Tensor, batch: Batch, out: torch.Tensor) -> None:
        """Add to `out` (B,) each row of `gradient` (B, out) times its expert's bias."""
        if self._biases is None:
            return
        if batch.expert_B is not None:
            out += torch.linalg.vecdot(gradient, self._biases[batch.expert_B])
            return
        for expert, d_y, total in split(batch, gradient, out):
            total.addmv_(d_y, self._biases[expert])


class ProjectionGradient:
    """
    The gradients of a projection's weight and bias, or None where not needed. Experts that are not `hit`, for they
    have no row, have zeros.
    """

    def __init__(self, projection: Projection, need_weight: bool, need_bias: bool, hit: Collection[int]):
        self._transposed, self._beside = projection.transposed, projection.beside
        self.weight = None
        if need_weight:
            self.weight = zeros_besides(hit, projection.weight)
        self.bias = torch.zeros_like(projection.bias) if need_bias and projection.bias is not None else None
        self._cast: torch.Tensor | None = None
        if need_weight and projection.weight.dtype != projection.dtype:
            self._cast = projection.weight.new_empty(projection.weight.shape[1:], dtype=projection.dtype)

    def set(self, gradient: torch.Tensor, rows: torch.Tensor, batch: Batch) -> None:
        """From the gradient of y (B, out) and x (B, in)."""
        for one in self._beside:
            one.note(gradient, rows, batch)
        if self.weight is not None:
            left, right = (rows, gradient) if self._transposed else (gradient, rows)
            if not batch.hit:  # on a device, whose one batch has all experts
                self.weight = grouped_outer(left, right, batch).to(self.weight.dtype)
            for expert, a, b in split(batch, left, right):
                if self._cast is None:
                    torch.mm(a.t(), b, out=self.weight[expert])
                else:
                    self.weight[expert].copy_(torch.mm(a.t(), b, out=self._cast))
        if self.bias is not None:
            if not batch.hit:
                self.bias.index_add_(0, batch.expert_B, gradient.to(self.bias.dtype))
            for expert, d_y in split(batch, gradient):
                self.bias[expert] = d_y.sum(0)
