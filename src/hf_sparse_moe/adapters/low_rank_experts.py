"""
Experts with low-rank adapters beside their frozen weights: `y = W_e x + s B_e (A_e x)`, grouped by expert.

T tokens, K experts a token, E experts, N adapted ones, H hidden, I intermediate, R rows, B rows of a batch, r rank. No
update of W is ever built: the adapters' thin products stand beside those of the experts' own function.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_sparse_moe.experts.function import run_experts
from hf_sparse_moe.experts.products import Matrices, grouped_outer, multiply, split
from hf_sparse_moe.experts.segments import Batch, Segments


@dataclass(frozen=True)
class LowRank:
    """
    One adapter of one projection: `s B_e (A_e x)`, added to what expert e gives.

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


def low_rank_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: list[LowRank],
    down: list[LowRank],
) -> torch.Tensor:
    """
    Args:
        experts (`nn.Module`): Frozen experts in the interface of transformers' experts backends.
        hidden_states (`torch.Tensor` of shape `(T, H)`): The tokens.
        top_k_index (`torch.LongTensor` of shape `(T, K)`): The experts of each token; an index of E is skipped.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.
        up, down (`list[LowRank]`): The adapters of each projection, added up.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `hidden_states`. Under autocast experts and adapters compute
        in its dtype, otherwise in that of the weights.
    """
    drops = any(adapter.dropout for adapter in (*up, *down))
    adapters = _Adapters(up, down, seed=int(torch.randint(2**62, ()).item()) if drops and not _traced() else None)
    return run_experts(experts, hidden_states, top_k_index, top_k_weights, adapters=adapters)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@dataclass(frozen=True)
class _Adapters:
    """Those of one call of the experts, as [`run_experts`] takes them."""

    up: list[LowRank]
    down: list[LowRank]
    seed: int | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [factor for adapter in (*self.up, *self.down) for factor in (adapter.a, adapter.b)]

    def beside(self, dtype: torch.dtype, segments: Segments) -> list[list[_Beside]]:
        """Those of either projection, each with random numbers of its own."""
        seeds = itertools.count(self.seed or 0, segments.num_rows + 1)
        drawn = self.seed is not None
        return [
            [_Beside(one, dtype, next(seeds) if drawn else None, segments) for one in side]
            for side in (self.up, self.down)
        ]


class _Factor(Matrices):
    """A or B of the adapted experts, as matrices (in, out) of all experts."""

    def __init__(self, stored: torch.Tensor, slots: dict[int, int], dtype: torch.dtype, transposed: bool):
        super().__init__(stored, dtype, transposed)
        self._slots = slots

    def one(self, expert: int) -> torch.Tensor | None:
        slot = self._slots.get(expert)
        return None if slot is None else super().one(slot)

    def several(self, experts: slice) -> torch.Tensor:
        """With zeros for experts without adapter, and a rank of whole 16 bytes, as grouped products ask."""
        stored = self._stored.to(self.dtype)
        stored = F.pad(stored, (0, 0, 0, -stored.shape[1] % (16 // self.dtype.itemsize)))
        number = experts.stop - experts.start
        if len(stored) != number:
            chosen = [slot for expert, slot in self._slots.items() if experts.start <= expert < experts.stop]
            place = [expert - experts.start for expert in self._slots if experts.start <= expert < experts.stop]
            place_N = torch.tensor(place, device=stored.device, dtype=torch.long)
            part = stored[chosen] if len(chosen) != len(stored) else stored
            stored = stored.new_zeros(number, *stored.shape[1:]).index_copy(0, place_N, part)
        return stored.mT if self._transposed else stored


class _Beside:
    """What an adapter adds to its projection in one direction of a call. The same `seed` drops the same inputs."""

    def __init__(self, adapter: LowRank, dtype: torch.dtype, seed: int | None, segments: Segments):
        self.adapter, self.seed = adapter, seed
        self.slots = {expert: slot for slot, expert in enumerate(adapter.experts)}
        self.there = [_Factor(adapter.a, self.slots, dtype, True), _Factor(adapter.b, self.slots, dtype, False)]
        self.back = [_Factor(adapter.b, self.slots, dtype, True), _Factor(adapter.a, self.slots, dtype, False)]
        self.serves_R = None if adapter.tokens is None else adapter.tokens[segments.token_R]

    @cached_property
    def gradients(self) -> list[torch.Tensor | None]:
        """Those of A and B; an expert that no token reaches keeps the zeros."""
        return [torch.zeros_like(one) if one.requires_grad else None for one in (self.adapter.a, self.adapter.b)]

    def add(self, output: torch.Tensor, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """`output` (B, out) and what the adapter makes of `inputs` (B, in)."""
        thin = self._thin(self._dropped(inputs, batch), self.there[0], batch)
        multiply(thin, self.there[1], batch, out=output[:, self.adapter.columns], add=True)
        return output

    def add_transposed(self, d_inputs: torch.Tensor, gradient: torch.Tensor, batch: Batch) -> None:
        """Add the gradient of the inputs, from that of the output."""
        thin = self._thin(gradient[:, self.adapter.columns], self.back[0], batch)
        if not self.adapter.dropout:
            multiply(thin, self.back[1], batch, out=d_inputs, add=True)
        else:
            d_inputs += self._dropped(multiply(thin, self.back[1], batch), batch)

    def note(self, gradient: torch.Tensor, inputs: torch.Tensor, batch: Batch) -> None:
        """The gradients of A and B, from that of the output and the inputs."""
        inputs, gradient = self._dropped(inputs, batch), gradient[:, self.adapter.columns]
        pairs = (self.back[0], gradient, inputs), (self.there[0], inputs, gradient)
        for noted, (factor, x, y) in zip(self.gradients, pairs, strict=True):
            if noted is None:
                continue
            thin = self._thin(x, factor, batch)
            if not batch.hit:  # on a device, whose one batch has all experts
                every = grouped_outer(thin, y.contiguous(), batch)[:, : noted.shape[1]]
                noted.copy_(every if len(self.slots) == len(every) else every[list(self.slots)])
            for expert, x_e, y_e in split(batch, thin, y):
                if expert in self.slots:
                    noted[self.slots[expert]] = x_e.t() @ y_e

    def _thin(self, inputs: torch.Tensor, factor: _Factor, batch: Batch) -> torch.Tensor:
        """`s A x` of each row (B, r), 0 where there is no adapter; with B in the place of A, that of the gradient."""
        thin = multiply(inputs, factor, batch) * self.adapter.scale
        return thin if self.serves_R is None else thin * self.serves_R[batch.rows]

    def _dropped(self, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """After dropout: drawn again, and the same, in backward. A traced graph draws as torch does."""
        if not self.adapter.dropout:
            return inputs
        if self.seed is None:
            return F.dropout(inputs, self.adapter.dropout)
        generator = torch.Generator(inputs.device).manual_seed(self.seed + batch.rows.start)
        share = 1 - self.adapter.dropout
        return inputs * inputs.new_empty(inputs.shape).bernoulli_(share, generator=generator).div_(share)


class _AdaptedConfig:
    """The config of experts for one call, by which their own forward computes with adapters."""

    _experts_implementation = "adapted_experts"

    def __init__(self, config: Any, up: list[LowRank], down: list[LowRank]):
        self._config, self.adapters = config, (up, down)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _adapted_experts_forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    return low_rank_experts(experts, hidden_states, top_k_index, top_k_weights, *experts.config.adapters)


ALL_EXPERTS_FUNCTIONS.register(_AdaptedConfig._experts_implementation, _adapted_experts_forward)


def expert_parallel_low_rank(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: list[LowRank],
    down: list[LowRank],
) -> torch.Tensor:
    """
    [`low_rank_experts`] for experts in transformers' expert parallelism: all ranks call it, and give the adapters of
    all experts. It goes through the experts' own forward, which brings each token to the ranks of its experts.
    """
    start = experts.down_proj.device_mesh.get_local_rank("ep") * experts.num_experts
    mine = [[adapter.of_experts(start, experts.num_experts) for adapter in side] for side in (up, down)]
    config, experts.config = experts.config, _AdaptedConfig(experts.config, *mine)
    try:
        return experts(hidden_states, top_k_index, top_k_weights)
    finally:
        experts.config = config
