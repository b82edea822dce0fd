"""
One low-rank adapter of one projection of the experts, and its products over segments of rows.

R rows of a batch of segments, E experts, N adapted experts, r rank.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

import torch

from hf_sparse_moe.experts.segments import Segment


@dataclass(frozen=True)
class LowRank:
    """
    `s B_e (A_e x)`, added to what the projection of expert e gives.

    Args:
        a (`torch.Tensor` of shape `(N, r, in)`): A of each adapted expert.
        b (`torch.Tensor` of shape `(N, r, out)`): B of each, transposed; `out` covers `columns` only.
        scale (`float`): s.
        experts (`tuple[int, ...]`): The N adapted experts.
        columns (`slice`): Which outputs of the projection it reaches.
        dropout (`float`): Of the adapter's input, 0 outside training.
        tokens (`torch.BoolTensor` of shape `(T, 1)`, *optional*): The tokens that it serves; all by default.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    experts: tuple[int, ...]
    columns: slice
    dropout: float = 0.0
    tokens: torch.Tensor | None = None

    def of_experts(self, start: int, count: int) -> LowRank:
        """The part for the `count` experts from `start` on, which are numbered from 0 then."""
        slots = slice(bisect_left(self.experts, start), bisect_left(self.experts, start + count))
        experts = tuple(expert - start for expert in self.experts[slots])
        return replace(self, a=self.a[slots], b=self.b[slots], experts=experts)

    def all_experts(self, num_experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B with zeros for experts without adapter, and a rank of whole 16 bytes, as grouped products ask."""
        factors = []
        for factor in (self.a.to(dtype), self.b.to(dtype)):
            factor = torch.nn.functional.pad(factor, (0, 0, 0, -factor.shape[1] % (16 // dtype.itemsize)))
            if len(self.experts) < num_experts:
                place = torch.tensor(self.experts, device=factor.device)
                factor = factor.new_zeros(num_experts, *factor.shape[1:]).index_copy(0, place, factor)
            factors.append(factor)
        return factors[0], factors[1]


class LowRankProducts:
    """
    The products of an adapter in one call of the experts, forward or backward.

    Args:
        adapter (`LowRank`): The adapter.
        dtype (`torch.dtype`): That of the products.
        seed (`int`): Of its dropout: the same one drops the same values.
    """

    def __init__(self, adapter: LowRank, dtype: torch.dtype, seed: int):
        self.adapter, self.seed = adapter, seed
        self.slots = {expert: slot for slot, expert in enumerate(adapter.experts)}
        self.a, self.b = (factor.detach().to(dtype).unbind(0) for factor in (adapter.a, adapter.b))
        self.rank = adapter.a.shape[1]

    def add(self, output: torch.Tensor, inputs: torch.Tensor, batch: list[Segment], token_R: torch.Tensor):
        """Add to `output` (R, out) what the adapter makes of `inputs` (R, in); returns `s A x` (R, r)."""
        keep = self._keep(inputs, batch)
        inputs = inputs if keep is None else inputs * keep
        parts = self._parts(batch)
        thin = inputs.new_zeros(len(inputs), self.rank)
        for slot, rows in parts:
            torch.mm(inputs[rows], self.a[slot].t(), out=thin[rows])
        self._scale(thin, token_R)
        output = output[:, self.adapter.columns]
        for slot, rows in parts:
            output[rows].addmm_(thin[rows], self.b[slot])
        return thin

    def start_gradients(self) -> None:
        """Make room; an expert that no token reached keeps the zeros."""
        a, b = self.adapter.a, self.adapter.b
        self.gradient_a = torch.zeros_like(a) if a.requires_grad else None
        self.gradient_b = torch.zeros_like(b) if b.requires_grad else None

    def backward(
        self,
        gradient: torch.Tensor,
        inputs: torch.Tensor,
        thin: torch.Tensor,
        batch: list[Segment],
        token_R: torch.Tensor,
        weight_R: torch.Tensor | None,
        gradient_inputs: torch.Tensor | None,
    ) -> None:
        """
        Note the gradients of A and B, and add that of `inputs`, from the gradient of [`add`]'s output.

        `weight_R` (R, 1), where given, still has to be multiplied into `gradient`, for A and B only.
        """
        keep = self._keep(inputs, batch)
        dropped = inputs if keep is None else inputs * keep
        gradient = gradient[:, self.adapter.columns]
        parts = self._parts(batch)
        gradient_thin = thin.new_zeros(thin.shape)
        for slot, rows in parts:
            torch.mm(gradient[rows], self.b[slot].t(), out=gradient_thin[rows])
        self._scale(gradient_thin, token_R)
        for slot, rows in parts:
            if gradient_inputs is not None and keep is None:
                gradient_inputs[rows].addmm_(gradient_thin[rows], self.a[slot])
            elif gradient_inputs is not None and keep is not None:
                gradient_inputs[rows].addcmul_(gradient_thin[rows] @ self.a[slot], keep[rows])
        if weight_R is not None:
            thin, gradient_thin = thin * weight_R, gradient_thin * weight_R
        for slot, rows in parts:
            if self.gradient_a is not None:
                self.gradient_a[slot] = gradient_thin[rows].t() @ dropped[rows]
            if self.gradient_b is not None:
                self.gradient_b[slot] = thin[rows].t() @ gradient[rows]

    def _parts(self, batch: list[Segment]) -> list[tuple[int, slice]]:
        """The adapted segments: place in A and B, and rows of the batch."""
        first = batch[0].start
        return [
            (self.slots[expert], slice(start - first, stop - first))
            for expert, start, stop in batch
            if expert in self.slots
        ]

    def _scale(self, thin: torch.Tensor, token_R: torch.Tensor) -> None:
        thin *= self.adapter.scale
        if self.adapter.tokens is not None:
            thin *= self.adapter.tokens[token_R]

    def _keep(self, inputs: torch.Tensor, batch: list[Segment]) -> torch.Tensor | None:
        """What dropout multiplies the inputs with: drawn again, and the same, in backward."""
        if not self.adapter.dropout:
            return None
        generator = torch.Generator().manual_seed(self.seed + batch[0].start)
        share = 1 - self.adapter.dropout
        return torch.empty_like(inputs).bernoulli_(share, generator=generator).div_(share)
