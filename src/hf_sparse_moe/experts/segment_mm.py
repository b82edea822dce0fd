"""
Experts on the CPU: one differentiable function for the whole call, which runs plain products over segments of rows.

`experts_implementation="segment_mm"`, named after DGL's product over segments of sorted rows, beside transformers' own
`batched_mm` and `grouped_mm`; and `"segment_mm_recompute"`, which keeps nothing for backward but its arguments.

Shapes: T tokens, K experts a token, E experts, H hidden, I intermediate, U rows of the first projection (2I if gated),
R rows (one for each pair of a token and an expert, and those that fill up).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.utils import logging

from .activation import Activation
from .projection import Projection, ProjectionGradient
from .segments import Segment, Segments, find_segments


logger = logging.get_logger(__name__)

# Rows are gathered, multiplied and activated so many bytes of the first projection at a time: what fits into the
# caches, and below what the C library asks the system anew at every call. Found with benchmarks/experts.py.
BATCH_BYTES = 4 * 2**20


def segment_mm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts of one layer on the CPU, in the interface of transformers' `ALL_EXPERTS_FUNCTIONS`: takes hidden states
    (T, H), the experts of each token (T, K) and their weights (T, K); gives (T, H) in the dtype of the hidden states.

    Computes in the dtype of autocast where that is on, else in that of the weights. What it cannot do (other devices,
    a norm after the experts, being traced into one graph) it leaves to `grouped_mm`, and says so once.
    """
    return _forward(self, hidden_states, top_k_index, top_k_weights)


def segment_mm_recompute_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[`segment_mm_experts_forward`], but backward computes the first projection again instead of keeping it."""
    return _forward(self, hidden_states, top_k_index, top_k_weights, recompute=True)


def _forward(self, hidden_states, top_k_index, top_k_weights, recompute: bool = False) -> torch.Tensor:
    if (reason := unsupported(self, hidden_states)) is not None:
        if not torch.compiler.is_compiling():
            logger.warning_once(f"`segment_mm` does not run {reason}: these experts run with `grouped_mm`.")
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return run_segments(self, hidden_states, top_k_index, top_k_weights, recompute)


def run_segments(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    recompute: bool = False,
    adapters: Any = None,
) -> torch.Tensor:
    """
    [`segment_mm_experts_forward`] for what it can run. `adapters`, where given, have `tensors`, which get gradients,
    and `beside(dtype, segments)`, what they add to either [`Projection`]; pairs with an index of E are then skipped.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up_bias, down_bias = (getattr(self, f"{up_name}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    up = getattr(self, up_name)
    dtype = compute_dtype(up)
    activation = Activation.of(self)
    arguments = (hidden_states, top_k_weights, up, up_bias, self.down_proj, down_bias, *activation.parameters)
    arguments = (*arguments, *(adapters.tensors if adapters else ()))
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments)
    segments = find_segments(
        top_k_index, self.num_experts, fill_up=dtype.itemsize == 2, may_skip=self._is_expert_parallel or bool(adapters)
    )
    call = _Call(segments, activation, dtype, self.is_transposed, learns and not recompute, adapters)
    # Inside, every dtype is chosen; autocast would choose again for the activation, and only in forward.
    with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
        return _SegmentedExperts.apply(call, *arguments) if learns else call.forward(*arguments)[0]


def unsupported(experts: nn.Module, hidden_states: torch.Tensor) -> str | None:
    """What keeps [`run_segments`] from running, in words; None where nothing does."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "while being traced"
    if hidden_states.device.type != "cpu":
        return f"on `{hidden_states.device.type}` tensors"
    return "with a norm after the experts" if experts.has_post_expert_norm else None


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """What autocast would choose for a product with this weight: it leaves float64 alone."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


@dataclass
class _Call:
    """One call of the experts: its routing and its choices. Owns no memory between forward and backward."""

    segments: Segments
    activation: Activation
    dtype: torch.dtype
    transposed: bool
    keep: bool
    adapters: Any

    def forward(self, hidden_TH, weights_TK, up, up_bias, down, down_bias, *_) -> tuple[torch.Tensor, list]:
        """The output (T, H), and the first projections (R, U) of each batch if they are to be kept."""
        rows_TH = hidden_TH.to(self.dtype)
        first, second = self._projections(up, up_bias, down, down_bias)
        num_rows = len(self.segments.token_R)
        output_RH = rows_TH.new_empty(num_rows + 1, second.out_features)
        output_RH[num_rows] = 0  # of the pairs that no expert here serves
        kept = []
        for batch in self._batches(first):
            first_RU = first(rows_TH.index_select(0, self._tokens(batch)), batch)
            second(self.activation(first_RU).to(self.dtype), batch, out=output_RH[batch[0].start : batch[-1].stop])
            if self.keep:
                kept.append(first_RU)
        output_TH = F.embedding_bag(
            self.segments.row_TK, output_RH, per_sample_weights=weights_TK.to(self.dtype), mode="sum"
        )
        return output_TH.to(hidden_TH.dtype), kept

    def backward(self, needs, kept, gradient_TH, hidden_TH, weights_TK, up, up_bias, down, down_bias, *_):
        """The gradients of [`forward`]'s arguments, those that `needs` says."""
        need_hidden, need_weights, need_up, need_up_bias, need_down, need_down_bias, *need_others = needs
        need_first = need_hidden or need_up or need_up_bias or any(need_others)
        rows_TH, gradient_TH = hidden_TH.to(self.dtype), gradient_TH.to(self.dtype)
        first, second = self._projections(up, up_bias, down, down_bias)
        d_first = ProjectionGradient(first, need_up, need_up_bias, self.segments)
        d_second = ProjectionGradient(second, need_down, need_down_bias, self.segments)
        num_rows = len(self.segments.token_R)
        d_rows_RH = rows_TH.new_empty(num_rows + 1, rows_TH.shape[1]) if need_hidden else None
        d_weights_R = rows_TH.new_empty(num_rows + 1)
        weights_R = torch.cat([weights_TK.to(self.dtype).flatten(), rows_TH.new_zeros(1)])[self.segments.pair_R]
        d_parameters = [torch.zeros_like(parameter) for parameter in self.activation.parameters]
        for number, batch in enumerate(self._batches(first)):
            rows = slice(batch[0].start, batch[-1].stop)
            tokens = self._tokens(batch)
            rows_RH = rows_TH.index_select(0, tokens)
            first_RU = kept[number] if kept else first(rows_RH, batch)
            activated_RI, pull = self.activation.differentiate(first_RU)
            activated_RI = activated_RI.to(self.dtype)
            # With g = dL/dy and y = w (a W + b): dL/dw = g.(a W + b) = (g W^T).a + g.b, so that y need not be kept.
            gradient_RH = gradient_TH.index_select(0, tokens)
            if need_weights or need_first:
                gradient_RI = second.transposed_product(gradient_RH, batch)
            if need_weights:
                torch.linalg.vecdot(gradient_RI, activated_RI, out=d_weights_R[rows])
                second.add_bias_products(gradient_RH, batch, d_weights_R[rows])
            d_second.set(gradient_RH.mul_(weights_R[rows, None]), activated_RI, batch)
            if need_first:
                gradient_RU, of_parameters = pull(gradient_RI.mul_(weights_R[rows, None]))
                for total, part in zip(d_parameters, of_parameters, strict=True):
                    if part is not None:
                        total += part
                d_first.set(gradient_RU, rows_RH, batch)
            if d_rows_RH is not None:
                first.transposed_product(gradient_RU, batch, out=d_rows_RH[rows])
        d_hidden = d_weights = None
        if d_rows_RH is not None:
            d_rows_RH[num_rows] = 0
            d_hidden = F.embedding_bag(self.segments.row_TK, d_rows_RH, mode="sum").to(hidden_TH.dtype)
        if need_weights:
            d_weights_R[num_rows] = 0
            d_weights = d_weights_R[self.segments.row_TK].to(weights_TK.dtype)
        d_parameters += [gradient for one in (*first.beside, *second.beside) for gradient in one.gradients]
        return (d_hidden, d_weights, d_first.weight, d_first.bias, d_second.weight, d_second.bias, *d_parameters)

    def _projections(self, up, up_bias, down, down_bias) -> tuple[Projection, Projection]:
        beside = self.adapters.beside(self.dtype, self.segments) if self.adapters else ((), ())
        return (
            Projection(up, up_bias, self.dtype, self.transposed, beside[0]),
            Projection(down, down_bias, self.dtype, self.transposed, beside[1]),
        )

    def _batches(self, first: Projection) -> list[list[Segment]]:
        return self.segments.batches(BATCH_BYTES // (first.out_features * self.dtype.itemsize))

    def _tokens(self, batch: list[Segment]) -> torch.Tensor:
        return self.segments.token_R[batch[0].start : batch[-1].stop]


class _SegmentedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *arguments: torch.Tensor | None) -> torch.Tensor:
        state = torch.get_rng_state()
        output_TH, kept = call.forward(*arguments)
        ctx.call, ctx.num_arguments = call, len(arguments)
        # A dropout among the experts' activations must drop the same values when backward computes them again.
        ctx.random_state = None if torch.equal(state, torch.get_rng_state()) else state
        ctx.save_for_backward(*arguments, *kept)
        return output_TH

    @staticmethod
    def backward(ctx: Any, gradient_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "The experts backend `segment_mm` has no second derivative (`create_graph=True`). "
                'Call `model.set_experts_implementation("eager")` for it.'
            )
        saved = ctx.saved_tensors  # once: gradient checkpointing hands them out a single time
        arguments, kept = saved[: ctx.num_arguments], saved[ctx.num_arguments :]
        with torch.random.fork_rng(devices=[], enabled=ctx.random_state is not None):
            if ctx.random_state is not None:
                torch.set_rng_state(ctx.random_state)
            return None, *ctx.call.backward(ctx.needs_input_grad[1:], kept, gradient_TH, *arguments)
