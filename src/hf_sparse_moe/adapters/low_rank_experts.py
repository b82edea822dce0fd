"""
Experts with low-rank adapters beside their frozen weights: `y = W_e x + s B_e (A_e x)`, grouped by expert.

T tokens, K experts a token, E experts, N adapted ones, H hidden, I intermediate, U rows of the first projection, R
rows, r rank. No update of W is ever built and W gets no gradient. On the CPU, between forward and backward stay, of
each pair of token and expert, the first projection and the `A_e x`; the rest is computed again.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from hf_sparse_moe.experts.activation import Activation
from hf_sparse_moe.experts.projection import Projection
from hf_sparse_moe.experts.segment_mm import BATCH_BYTES
from hf_sparse_moe.experts.segments import Segment, find_segments

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
    device, dtype = hidden_states.device.type, experts.down_proj.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        if device != "cpu" or torch.compiler.is_compiling() or experts.has_post_expert_norm:
            return grouped_low_rank_experts(experts, hidden_states, top_k_index, top_k_weights, up, down, dtype)
        call = _Call(experts, top_k_index, up, down, dtype)
        factors = [factor for adapter in (*up, *down) for factor in (adapter.a, adapter.b)]
        return _LowRankExperts.apply(call, hidden_states, top_k_weights, *factors)


class _Products:
    """The products of an adapter in one call of the experts. The same `seed` drops the same inputs."""

    def __init__(self, adapter: LowRank, dtype: torch.dtype, seed: int, token_R: torch.Tensor):
        self.adapter, self.seed = adapter, seed
        self.slots = {expert: slot for slot, expert in enumerate(adapter.experts)}
        self.a, self.b = (factor.detach().to(dtype).unbind(0) for factor in (adapter.a, adapter.b))
        self.serves_R = None if adapter.tokens is None else adapter.tokens[token_R]

    @cached_property
    def gradients(self) -> list[torch.Tensor | None]:
        """Those of A and B; an expert that no token reaches keeps the zeros."""
        return [torch.zeros_like(one) if one.requires_grad else None for one in (self.adapter.a, self.adapter.b)]

    def add(self, output: torch.Tensor, inputs: torch.Tensor, batch: list[Segment]) -> torch.Tensor:
        """Add to `output` (R, out) what the adapter makes of `inputs` (R, in); returns `s A x` (R, r)."""
        keep = self._keep(inputs, batch)
        inputs, output = inputs if keep is None else inputs * keep, output[:, self.adapter.columns]
        thin = inputs.new_zeros(len(inputs), self.adapter.a.shape[1])
        parts = self._parts(batch)
        for slot, rows in parts:
            torch.mm(inputs[rows], self.a[slot].t(), out=thin[rows])
        self._scale(thin, batch)
        for slot, rows in parts:
            output[rows].addmm_(thin[rows], self.b[slot])
        return thin

    def backward(self, gradient, inputs, thin, batch: list[Segment], weight_R, d_inputs) -> None:
        """
        Note the gradients of A and B, and add that of `inputs` to `d_inputs`, from the gradient of [`add`]'s output.
        `weight_R` (R, 1), where given, still has to be multiplied into `gradient`, for A and B only.
        """
        keep = self._keep(inputs, batch)
        dropped, gradient = inputs if keep is None else inputs * keep, gradient[:, self.adapter.columns]
        d_thin = torch.zeros_like(thin)
        parts = self._parts(batch)
        for slot, rows in parts:
            torch.mm(gradient[rows], self.b[slot].t(), out=d_thin[rows])
        self._scale(d_thin, batch)
        for slot, rows in parts if d_inputs is not None else ():
            if keep is None:
                d_inputs[rows].addmm_(d_thin[rows], self.a[slot])
            else:
                d_inputs[rows].addcmul_(d_thin[rows] @ self.a[slot], keep[rows])
        if weight_R is not None:
            thin, d_thin = thin * weight_R, d_thin * weight_R
        d_a, d_b = self.gradients
        for slot, rows in parts:
            if d_a is not None:
                d_a[slot] = d_thin[rows].t() @ dropped[rows]
            if d_b is not None:
                d_b[slot] = thin[rows].t() @ gradient[rows]

    def _parts(self, batch: list[Segment]) -> list[tuple[int, slice]]:
        """The adapted segments: place in A and B, and rows of the batch."""
        first, slots = batch[0].start, self.slots
        return [(slots[expert], slice(i - first, j - first)) for expert, i, j in batch if expert in slots]

    def _scale(self, thin: torch.Tensor, batch: list[Segment]) -> None:
        thin *= self.adapter.scale
        if self.serves_R is not None:
            thin *= self.serves_R[_rows(batch)]

    def _keep(self, inputs: torch.Tensor, batch: list[Segment]) -> torch.Tensor | None:
        """What dropout multiplies the inputs with: drawn again, and the same, in backward."""
        if not self.adapter.dropout:
            return None
        generator = torch.Generator().manual_seed(self.seed + batch[0].start)
        share = 1 - self.adapter.dropout
        return torch.empty_like(inputs).bernoulli_(share, generator=generator).div_(share)


class _AdaptedProjection:
    """`x W_e^T + b_e`, frozen, and the adapters beside it."""

    def __init__(self, frozen: Projection, adapters: list[_Products]):
        self.frozen, self.adapters = frozen, adapters

    def __call__(self, rows: torch.Tensor, batch: list[Segment]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(R, out), and what backward needs of each adapter."""
        output = self.frozen(rows, batch)
        return output, [adapter.add(output, rows, batch) for adapter in self.adapters]

    def backward(self, gradient, rows, thins, batch: list[Segment], weight_R=None, needs_rows: bool = True):
        """The gradient of `rows`, None where not needed; the adapters note theirs."""
        d_rows = self.frozen.transposed_product(gradient, batch) if needs_rows else None
        for adapter, thin in zip(self.adapters, thins, strict=True):
            adapter.backward(gradient, rows, thin, batch, weight_R, d_rows)
        return d_rows


def _rows(batch: list[Segment]) -> slice:
    return slice(batch[0].start, batch[-1].stop)


class _Call:
    """One call of the experts on the CPU: its routing and its adapters."""

    def __init__(
        self, experts: Any, top_k_index: torch.Tensor, up: list[LowRank], down: list[LowRank], dtype: torch.dtype
    ):
        self.dtype, self.sum_dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.activation = Activation.of(experts)
        self.segments = find_segments(top_k_index, experts.num_experts, fill_up=dtype.itemsize == 2, may_skip=True)
        self.frozen = [self._projection(experts, name) for name in (first_projection(experts), "down_proj")]
        self.adapters = up, down
        drops = any(adapter.dropout for adapter in (*up, *down))
        self.seed = int(torch.randint(2**62, ()).item()) if drops else 0

    def _projection(self, experts: Any, name: str) -> Projection:
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return Projection(getattr(experts, name), bias, self.dtype, experts.is_transposed)

    def projections(self) -> list[_AdaptedProjection]:
        """The first and the second, with what adapters hold for one direction only."""
        token_R = self.segments.token_R
        step = len(token_R) + 1
        seeds = iter(range(self.seed, self.seed + 2**16 * step, step))
        products = ([_Products(one, self.dtype, next(seeds), token_R) for one in side] for side in self.adapters)
        return [_AdaptedProjection(*pair) for pair in zip(self.frozen, products, strict=True)]

    def batches(self, first: _AdaptedProjection) -> list[list[Segment]]:
        return self.segments.batches(BATCH_BYTES // (first.frozen.out_features * self.dtype.itemsize))

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """`(R, 1)`, 0 for rows that only fill up."""
        weights_P = torch.cat([weights_TK.to(self.dtype).flatten(), weights_TK.new_zeros(1, dtype=self.dtype)])
        return weights_P[self.segments.pair_R, None]

    def forward(self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, keep: bool):
        """The output (T, H), and of each batch what backward needs."""
        rows_TH, weights_R = hidden_TH.to(self.dtype), self.row_weights(weights_TK)
        first, second = self.projections()
        output_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=self.sum_dtype)
        kept: list[torch.Tensor] = []
        for batch in self.batches(first):
            token_R = self.segments.token_R[_rows(batch)]
            first_RU, first_thins = first(rows_TH.index_select(0, token_R), batch)
            second_RH, second_thins = second(self.activation(first_RU).to(self.dtype), batch)
            second_RH *= weights_R[_rows(batch)]
            output_TH.index_add_(0, token_R, second_RH.to(self.sum_dtype))
            if keep:
                kept += (first_RU, *first_thins, *second_thins)
        return output_TH.to(hidden_TH.dtype), kept

    def backward(self, needs_hidden: bool, gradient_TH, hidden_TH, weights_TK, kept: list[torch.Tensor]):
        """The gradients of hidden states (None where not needed), weights and factors."""
        rows_TH, gradient_TH = hidden_TH.to(self.dtype), gradient_TH.to(self.dtype)
        weights_R = self.row_weights(weights_TK)
        first, second = self.projections()
        d_hidden_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=self.sum_dtype) if needs_hidden else None
        d_weights_R = rows_TH.new_zeros(len(weights_R) + 1)  # the last is of the pairs that no expert here serves
        remaining = iter(kept)
        for batch in self.batches(first):
            rows = _rows(batch)
            token_R = self.segments.token_R[rows]
            activated_RI, pull = self.activation.differentiate(next(remaining))
            activated_RI = activated_RI.to(self.dtype)
            first_thins, second_thins = ([next(remaining) for _ in side.adapters] for side in (first, second))
            # y = w (W a + ...) and g = dL/dy: dL/dw = g.(W a + ...) = (W^T g + ...).a, so that y need not be kept.
            gradient_RH = gradient_TH.index_select(0, token_R)
            gradient_RI = second.backward(gradient_RH, activated_RI, second_thins, batch, weights_R[rows])
            torch.linalg.vecdot(gradient_RI, activated_RI, out=d_weights_R[rows])
            second.frozen.add_bias_products(gradient_RH, batch, d_weights_R[rows])
            gradient_RU, _ = pull(gradient_RI.mul_(weights_R[rows]))
            rows_RH = rows_TH.index_select(0, token_R)
            d_rows_RH = first.backward(
                gradient_RU.to(self.dtype), rows_RH, first_thins, batch, needs_rows=needs_hidden
            )
            if d_hidden_TH is not None:
                d_hidden_TH.index_add_(0, token_R, d_rows_RH.to(self.sum_dtype))
        d_weights_TK = d_weights_R[self.segments.row_TK].to(weights_TK.dtype)
        factors = [gradient for side in (first, second) for one in side.adapters for gradient in one.gradients]
        return None if d_hidden_TH is None else d_hidden_TH.to(hidden_TH.dtype), d_weights_TK, *factors


class _LowRankExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, *factors: torch.Tensor):
        state = torch.get_rng_state()
        output_TH, kept = call.forward(hidden_TH, weights_TK, keep=any(ctx.needs_input_grad))
        ctx.call = call
        # A dropout among the experts' activations must drop the same values when backward computes them again.
        ctx.random_state = None if torch.equal(state, torch.get_rng_state()) else state
        ctx.save_for_backward(hidden_TH, weights_TK, *kept)
        return output_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_TH, weights_TK, *kept = ctx.saved_tensors
        with torch.random.fork_rng(devices=[], enabled=ctx.random_state is not None):
            if ctx.random_state is not None:
                torch.set_rng_state(ctx.random_state)
            return None, *ctx.call.backward(ctx.needs_input_grad[1], gradient_TH, hidden_TH, weights_TK, kept)


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
