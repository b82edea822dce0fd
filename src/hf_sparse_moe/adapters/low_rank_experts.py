"""
Experts with low-rank adapters beside their frozen weights: `y = W_e x + s B_e (A_e x)`, grouped by expert.

T tokens, K experts a token, E experts, N adapted ones, H hidden, I intermediate, U rows of the first projection, R
rows, r rank. No update of W is ever built. On the CPU, the adapters stand beside the products of `segment_mm`: between
forward and backward stays, of each pair of token and expert, the first projection; the rest is computed again.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from hf_sparse_moe.experts.segment_mm import compute_dtype, run_segments, unsupported
from hf_sparse_moe.experts.segments import Segment, Segments

from .expert_modules import first_projection


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

    def all_experts(self, num_experts: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """A and B with zeros for experts without adapter, and a rank of whole 16 bytes, as grouped products ask."""
        factors = [F.pad(one.to(dtype), (0, 0, 0, -one.shape[1] % (16 // dtype.itemsize))) for one in (self.a, self.b)]
        if len(self.experts) == num_experts:
            return factors
        place = torch.tensor(self.experts, device=self.a.device)
        return [one.new_zeros(num_experts, *one.shape[1:]).index_copy(0, place, one) for one in factors]


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
    if unsupported(experts, hidden_states) is None:
        drops = any(adapter.dropout for adapter in (*up, *down))
        adapters = _Adapters(up, down, seed=int(torch.randint(2**62, ()).item()) if drops else 0)
        return run_segments(experts, hidden_states, top_k_index, top_k_weights, adapters=adapters)
    dtype = compute_dtype(experts.down_proj)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return grouped_low_rank_experts(experts, hidden_states, top_k_index, top_k_weights, up, down, dtype)


@dataclass(frozen=True)
class _Adapters:
    """Those of one call of the experts on the CPU, as [`run_segments`] takes them."""

    up: list[LowRank]
    down: list[LowRank]
    seed: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [factor for adapter in (*self.up, *self.down) for factor in (adapter.a, adapter.b)]

    def beside(self, dtype: torch.dtype, segments: Segments) -> list[list[_Products]]:
        step = len(segments.token_R) + 1
        seeds = itertools.count(self.seed, step)
        return [[_Products(one, dtype, next(seeds), segments) for one in side] for side in (self.up, self.down)]


class _Products:
    """The products of an adapter in one direction of a call. The same `seed` drops the same inputs."""

    def __init__(self, adapter: LowRank, dtype: torch.dtype, seed: int, segments: Segments):
        self.adapter, self.seed = adapter, seed
        self.slots = {expert: slot for slot, expert in enumerate(adapter.experts)}
        self.a, self.b = (factor.detach().to(dtype).unbind(0) for factor in (adapter.a, adapter.b))
        self.serves_R = None if adapter.tokens is None else adapter.tokens[segments.token_R]

    @cached_property
    def gradients(self) -> list[torch.Tensor | None]:
        """Those of A and B; an expert that no token reaches keeps the zeros."""
        return [torch.zeros_like(one) if one.requires_grad else None for one in (self.adapter.a, self.adapter.b)]

    def add(self, output: torch.Tensor, inputs: torch.Tensor, batch: list[Segment]) -> None:
        """Add to `output` (R, out) what the adapter makes of `inputs` (R, in)."""
        thin, output = self._thin(self._dropped(inputs, batch), self.a, batch), output[:, self.adapter.columns]
        for slot, rows in self._parts(batch):
            output[rows].addmm_(thin[rows], self.b[slot])

    def add_transposed(self, d_inputs: torch.Tensor, gradient: torch.Tensor, batch: list[Segment]) -> None:
        """Add the gradient of the inputs, from that of the output."""
        thin = self._thin(gradient[:, self.adapter.columns], self.b, batch)
        update = d_inputs if not self.adapter.dropout else torch.zeros_like(d_inputs)
        for slot, rows in self._parts(batch):
            update[rows].addmm_(thin[rows], self.a[slot])
        if update is not d_inputs:
            d_inputs += self._dropped(update, batch)

    def note(self, gradient: torch.Tensor, inputs: torch.Tensor, batch: list[Segment]) -> None:
        """The gradients of A and B, from that of the output and the inputs."""
        inputs, gradient = self._dropped(inputs, batch), gradient[:, self.adapter.columns]
        pairs = (self.b, gradient, inputs), (self.a, inputs, gradient)
        for noted, (factor, x, y) in zip(self.gradients, pairs, strict=True):
            if noted is not None:
                thin = self._thin(x, factor, batch)
                for slot, rows in self._parts(batch):
                    noted[slot] = thin[rows].t() @ y[rows]

    def _thin(self, inputs: torch.Tensor, factor: Sequence[torch.Tensor], batch: list[Segment]) -> torch.Tensor:
        """`s A x` of each row (R, r), 0 where there is no adapter; with B in the place of A, that of the gradient."""
        thin = inputs.new_zeros(len(inputs), self.adapter.a.shape[1])
        for slot, rows in self._parts(batch):
            torch.mm(inputs[rows], factor[slot].t(), out=thin[rows])
        thin *= self.adapter.scale
        if self.serves_R is not None:
            thin *= self.serves_R[batch[0].start : batch[-1].stop]
        return thin

    def _parts(self, batch: list[Segment]) -> list[tuple[int, slice]]:
        """The adapted segments: place in A and B, and rows of the batch."""
        first, slots = batch[0].start, self.slots
        return [(slots[expert], slice(i - first, j - first)) for expert, i, j in batch if expert in slots]

    def _dropped(self, inputs: torch.Tensor, batch: list[Segment]) -> torch.Tensor:
        """After dropout: drawn again, and the same, in backward."""
        if not self.adapter.dropout:
            return inputs
        generator = torch.Generator().manual_seed(self.seed + batch[0].start)
        share = 1 - self.adapter.dropout
        return inputs * inputs.new_empty(inputs.shape).bernoulli_(share, generator=generator).div_(share)


def grouped_low_rank_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: list[LowRank],
    down: list[LowRank],
    dtype: torch.dtype,
) -> torch.Tensor:
    """[`low_rank_experts`] by grouped products, for accelerators and `torch.compile`: the host waits for nothing."""
    num_experts, top_k = experts.num_experts, top_k_index.shape[1]
    expert_R, order_R = top_k_index.flatten().sort(stable=True)
    token_R = order_R // top_k
    ends_E = torch.searchsorted(expert_R, torch.arange(1, num_experts + 1, device=expert_R.device)).int()
    served_R = (expert_R < num_experts)[:, None]
    expert_R = expert_R.clamp(max=num_experts - 1)

    def project(name: str, adapters: list[LowRank], inputs: torch.Tensor) -> torch.Tensor:
        bias = getattr(experts, f"{name}_bias")[expert_R].to(dtype) if experts.has_bias else None
        weight = getattr(experts, name).to(dtype)
        output = _grouped_linear(inputs, weight, ends_E, bias=bias, is_transposed=experts.is_transposed)
        for adapter in adapters:
            a, b = adapter.all_experts(num_experts, dtype)
            dropped = F.dropout(inputs, adapter.dropout) if adapter.dropout else inputs
            thin = _grouped_linear(dropped, a, ends_E) * adapter.scale
            if adapter.tokens is not None:
                thin = thin * adapter.tokens[token_R]
            update = _grouped_linear(thin, b, ends_E, is_transposed=True)
            if adapter.columns == slice(None):
                output = output + update
            else:
                output = output.clone()
                output[:, adapter.columns] += update
        return torch.where(served_R, output, 0)

    inputs = torch.where(served_R, hidden_states[token_R].to(dtype), 0)
    first = project(first_projection(experts), up, inputs)
    second = project("down_proj", down, experts._apply_gate(first) if experts.has_gate else experts.act_fn(first))
    if experts.has_post_expert_norm:
        second = experts.post_expert_norm(second)
    weighted = second * torch.where(served_R, top_k_weights.flatten()[order_R, None], 0)
    output = hidden_states.new_zeros(hidden_states.shape, dtype=torch.promote_types(weighted.dtype, torch.float32))
    return output.index_add(0, token_R, weighted.to(output.dtype)).to(hidden_states.dtype)


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
