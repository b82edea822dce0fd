"""
Experts with low-rank adapters beside their frozen weights: `y = W_e x + s B_e (A_e x)`, grouped by expert.

T tokens, K experts a token, E experts, H hidden, I intermediate, U rows of the first projection, R rows, r rank. No
update of W is ever built and W gets no gradient. On the CPU, between forward and backward stay, of each pair of token
and expert, the first projection and the `A_e x`; the rest is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear

from hf_sparse_moe.experts.activation import Activation
from hf_sparse_moe.experts.projection import Projection
from hf_sparse_moe.experts.segment_mm import BATCH_BYTES
from hf_sparse_moe.experts.segments import Segment, find_segments

from .low_rank import LowRank, LowRankProducts


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


class _Call:
    """One call of the experts on the CPU: its routing, its adapters and its frozen projections."""

    def __init__(
        self, experts: Any, top_k_index: torch.Tensor, up: list[LowRank], down: list[LowRank], dtype: torch.dtype
    ):
        self.dtype, self.sum_dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.activation = Activation.of(experts)
        self.segments = find_segments(top_k_index, experts.num_experts, fill_up=dtype.itemsize == 2, may_skip=True)
        self.first = self._projection(experts, "gate_up_proj" if experts.has_gate else "up_proj")
        self.second = self._projection(experts, "down_proj")
        self.adapters = up, down
        drops = any(adapter.dropout for adapter in (*up, *down))
        self.seed = int(torch.randint(2**62, ()).item()) if drops else 0
        rows = BATCH_BYTES // (self.first.out_features * dtype.itemsize)
        self.batches = self.segments.batches(rows)

    def _projection(self, experts: Any, name: str) -> Projection:
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        return Projection(getattr(experts, name), bias, self.dtype, experts.is_transposed)

    def products(self) -> list[list[LowRankProducts]]:
        """Those of the first and of the second projection."""
        number_of_rows = len(self.segments.token_R)
        seeds = iter(range(self.seed, self.seed + 2**16 * (number_of_rows + 1), number_of_rows + 1))
        return [[LowRankProducts(one, self.dtype, next(seeds)) for one in side] for side in self.adapters]

    def tokens(self, batch: list[Segment]) -> torch.Tensor:
        return self.segments.token_R[batch[0].start : batch[-1].stop]

    def row_weights(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """`(R, 1)`, 0 for rows that only fill up."""
        weights_P = torch.cat([weights_TK.to(self.dtype).flatten(), weights_TK.new_zeros(1, dtype=self.dtype)])
        return weights_P[self.segments.pair_R, None]

    def forward(self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, keep: bool):
        """The output (T, H), and of each batch what backward needs."""
        rows_TH, weights_R = hidden_TH.to(self.dtype), self.row_weights(weights_TK)
        first_adapters, second_adapters = self.products()
        output_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=self.sum_dtype)
        kept: list[torch.Tensor] = []
        for batch in self.batches:
            token_R = self.tokens(batch)
            rows_RH = rows_TH.index_select(0, token_R)
            first_RU = self.first(rows_RH, batch)
            thins = [adapter.add(first_RU, rows_RH, batch, token_R) for adapter in first_adapters]
            activated_RI = self.activation(first_RU).to(self.dtype)
            second_RH = self.second(activated_RI, batch)
            thins += [adapter.add(second_RH, activated_RI, batch, token_R) for adapter in second_adapters]
            second_RH *= weights_R[batch[0].start : batch[-1].stop]
            output_TH.index_add_(0, token_R, second_RH.to(self.sum_dtype))
            if keep:
                kept += (first_RU, *thins)
        return output_TH.to(hidden_TH.dtype), kept

    def backward(self, needs_hidden: bool, gradient_TH, hidden_TH, weights_TK, kept: list[torch.Tensor]):
        """The gradients of hidden states (None where not needed), weights and factors."""
        rows_TH, gradient_TH = hidden_TH.to(self.dtype), gradient_TH.to(self.dtype)
        weights_R = self.row_weights(weights_TK)
        first_adapters, second_adapters = self.products()
        for adapter in (*first_adapters, *second_adapters):
            adapter.start_gradients()
        d_hidden_TH = hidden_TH.new_zeros(hidden_TH.shape, dtype=self.sum_dtype) if needs_hidden else None
        d_weights_R = rows_TH.new_zeros(len(weights_R) + 1)
        remaining = iter(kept)
        for batch in self.batches:
            token_R, rows = self.tokens(batch), slice(batch[0].start, batch[-1].stop)
            activated_RI, pull = self.activation.differentiate(next(remaining))
            activated_RI = activated_RI.to(self.dtype)
            first_thins = [next(remaining) for _ in first_adapters]
            # y = w (W a + ...) and g = dL/dy: dL/dw = g.(W a + ...) = (W^T g + ...).a, so that y need not be kept.
            gradient_RH = gradient_TH.index_select(0, token_R)
            gradient_RI = self.second.transposed_product(gradient_RH, batch)
            for adapter in second_adapters:
                thin = next(remaining)
                adapter.backward(gradient_RH, activated_RI, thin, batch, token_R, weights_R[rows], gradient_RI)
            torch.linalg.vecdot(gradient_RI, activated_RI, out=d_weights_R[rows])
            self.second.add_bias_products(gradient_RH, batch, d_weights_R[rows])
            gradient_RU, _ = pull(gradient_RI.mul_(weights_R[rows]))
            gradient_RU = gradient_RU.to(self.dtype)
            rows_RH = rows_TH.index_select(0, token_R)
            d_rows_RH = self.first.transposed_product(gradient_RU, batch) if needs_hidden else None
            for adapter, thin in zip(first_adapters, first_thins, strict=True):
                adapter.backward(gradient_RU, rows_RH, thin, batch, token_R, None, d_rows_RH)
            if d_hidden_TH is not None and d_rows_RH is not None:
                d_hidden_TH.index_add_(0, token_R, d_rows_RH.to(self.sum_dtype))
        d_weights_R[-1] = 0  # of the pairs that no expert here serves
        d_weights_TK = d_weights_R[self.segments.row_TK].to(weights_TK.dtype)
        factors = [
            gradient
            for adapter in (*first_adapters, *second_adapters)
            for gradient in (adapter.gradient_a, adapter.gradient_b)
        ]
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

    first = project(
        "gate_up_proj" if experts.has_gate else "up_proj",
        up,
        torch.where(served_R, hidden_states[token_R].to(dtype), 0),
    )
    second = project("down_proj", down, experts._apply_gate(first) if experts.has_gate else experts.act_fn(first))
    if experts.has_post_expert_norm:
        second = experts.post_expert_norm(second)
    weighted = second * torch.where(served_R, top_k_weights.flatten()[order_R, None], 0)
    output = hidden_states.new_zeros(hidden_states.shape, dtype=torch.promote_types(weighted.dtype, torch.float32))
    return output.index_add(0, token_R, weighted.to(output.dtype)).to(hidden_states.dtype)
