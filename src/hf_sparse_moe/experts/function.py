"""
The experts of a layer as one differentiable function: gather, first product, activation, second product, and each
token's weighted sum. Between forward and backward stays the first projection alone, or nothing.

`experts_implementation="sparse_moe"` and `"sparse_moe_recompute"`, for our models and for stock mixtures. The products
are a loop over the experts that have rows, or torch's `grouped_mm` (see products.py).

Shapes: T tokens, K experts a token, E experts, H hidden, I intermediate, U rows of the first projection (2I if gated),
R rows (one for each pair of a token and an expert, and those that fill up), B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.utils import logging

from .activation import Activation
from .choice import FEW, GROUPED, LOOP, STOCK, choose_way, compute_dtype
from .few import few_rows_forward
from .products import suits_grouped
from .projection import Projection, ProjectionGradient
from .segments import Segments, find_segments, find_segments_on_device, require_experts
from .tuning import Turn


logger = logging.get_logger(__name__)

# Rows are gathered, multiplied and activated so many bytes of the first projection at a time: what fits into the
# caches, and below what the C library asks the system anew at every call. Found with benchmarks/experts.py.
BATCH_BYTES = 4 * 2**20


def sparse_moe_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts of one layer, in the interface of transformers' `ALL_EXPERTS_FUNCTIONS`: takes hidden states (T, H),
    the experts of each token (T, K) and their weights (T, K); gives (T, H) in the dtype of the hidden states.

    Computes in the dtype of autocast where that is on and the processor knows it, else in that of the weights. Experts
    with a norm after them it leaves to `grouped_mm`, and says so once.
    """
    return _forward(self, hidden_states, top_k_index, top_k_weights)


def sparse_moe_recompute_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[`sparse_moe_experts_forward`], but backward computes the first projection again instead of keeping it."""
    return _forward(self, hidden_states, top_k_index, top_k_weights, recompute=True)


def _forward(self, hidden_states, top_k_index, top_k_weights, recompute: bool = False) -> torch.Tensor:
    if self.has_post_expert_norm:
        if not torch.compiler.is_compiling():
            logger.warning_once(
                "`sparse_moe` does not run with a norm after the experts: these experts run with `grouped_mm`."
            )
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return run_experts(self, hidden_states, top_k_index, top_k_weights, recompute)


def run_experts(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    recompute: bool = False,
    adapters: Any = None,
) -> torch.Tensor:
    """
    [`sparse_moe_experts_forward`] for experts without a norm after them. `adapters`, where given, have `tensors`,
    which get gradients, and `beside(dtype, segments)`, what they add to either [`Projection`]; pairs with an index of
    E are then skipped.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up_bias, down_bias = (getattr(self, f"{up_name}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    up, down = getattr(self, up_name), self.down_proj
    dtype = compute_dtype(up)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    activation = Activation.of(self)
    arguments = (hidden_states, top_k_weights, up, up_bias, down, down_bias, *activation.parameters)
    arguments = (*arguments, *(adapters.tensors if adapters else ()))
    learns = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments)
    on_device = traced or (
        _is_accelerator(hidden_states) and suits_grouped(*up.shape[1:], *down.shape[1:], dtype=dtype)
    )
    if on_device or _is_accelerator(hidden_states):
        turn = Turn(GROUPED if on_device else LOOP)
    else:
        how = {"learns": learns, "adapted": bool(adapters), "recompute": recompute}
        turn = choose_way(self, up, down, top_k_index, dtype, **how)

    def compute(way: str) -> torch.Tensor:
        if way == FEW:
            return few_rows_forward(
                self, hidden_states, top_k_index, top_k_weights, (up, up_bias), (down, down_bias), activation
            )
        if way == STOCK:
            require_experts(top_k_index, self.num_experts)
            return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if on_device:
            segments = find_segments_on_device(top_k_index, self.num_experts)
        else:
            segments = find_segments(
                top_k_index,
                self.num_experts,
                fill_up=dtype.itemsize == 2 and not _is_accelerator(hidden_states),
                may_skip=self._is_expert_parallel or bool(adapters),
                grouped=way == GROUPED,
                batch_rows=BATCH_BYTES // (up.shape[2 if self.is_transposed else 1] * dtype.itemsize),
            ).to(hidden_states.device)
        keep = learns and not recompute
        call = _Call(segments, top_k_index, activation, dtype, self.is_transposed, self.training, keep, adapters, turn)
        # Inside, every dtype is chosen; autocast would choose again for the activation, and only in forward.
        device = hidden_states.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if learns and not traced:
                return _Experts.apply(call, *arguments)
            return call.forward(*arguments)[0]

    with turn.timed(last=not learns):
        return turn.run(compute)


def _is_accelerator(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


@dataclass
class _Call:
    """One call of the experts: its routing and its choices. Owns no memory between forward and backward."""

    segments: Segments
    index_TK: torch.Tensor
    activation: Activation
    dtype: torch.dtype
    transposed: bool
    training: bool
    keep: bool
    adapters: Any
    turn: Turn

    def forward(self, hidden_TH, weights_TK, up, up_bias, down, down_bias, *_) -> tuple[torch.Tensor, list]:
        """The output (T, H), and the first projections (B, U) of each batch if they are to be kept."""
        rows_TH = hidden_TH.to(self.dtype)
        first, second = self._projections(up, up_bias, down, down_bias)
        num_rows, at_once = self.segments.num_rows, self.segments.at_once
        output_RH = rows_TH.new_empty(0 if at_once else num_rows + 1, rows_TH.shape[1])
        output_RH[num_rows:] = 0  # of the pairs that no expert here serves
        kept = []
        for batch in self.segments.batches:
            first_BU = first(rows_TH.index_select(0, batch.token_B), batch)
            activated_BI = self.activation(first_BU).to(self.dtype)
            output_BH = second(activated_BI, batch, out=None if at_once else output_RH[batch.rows])
            if self.keep:
                kept.append(first_BU)
        output_TH = F.embedding_bag(
            self.segments.row_TK,
            output_BH if at_once else output_RH,
            per_sample_weights=weights_TK.to(self.dtype),
            mode="sum",
        )
        return output_TH.to(hidden_TH.dtype), kept

    def backward(self, needs, kept, gradient_TH, hidden_TH, weights_TK, up, up_bias, down, down_bias, *_):
        """The gradients of [`forward`]'s arguments, those that `needs` says."""
        need_hidden, need_weights, need_up, need_up_bias, need_down, need_down_bias, *need_others = needs
        need_first = need_hidden or need_up or need_up_bias or any(need_others)
        rows_TH, gradient_TH = hidden_TH.to(self.dtype), gradient_TH.to(self.dtype)
        first, second = self._projections(up, up_bias, down, down_bias)
        hit = [expert for batch in self.segments.batches for expert in batch.hit]
        d_first = ProjectionGradient(first, need_up, need_up_bias, hit)
        d_second = ProjectionGradient(second, need_down, need_down_bias, hit)
        num_rows, at_once = self.segments.num_rows, self.segments.at_once
        d_rows_RH = rows_TH.new_empty(num_rows + 1 if need_hidden and not at_once else 0, rows_TH.shape[1])
        d_weights_R = rows_TH.new_empty(num_rows)
        weights_R = torch.cat([weights_TK.to(self.dtype).flatten(), rows_TH.new_zeros(1)])[self.segments.pair_R]
        d_parameters = [torch.zeros_like(parameter) for parameter in self.activation.parameters]
        for number, batch in enumerate(self.segments.batches):
            rows = batch.rows
            rows_BH = rows_TH.index_select(0, batch.token_B)
            first_BU = kept[number] if kept else first(rows_BH, batch)
            activated_BI, pull = self.activation.differentiate(first_BU)
            activated_BI = activated_BI.to(self.dtype)
            # With g = dL/dy and y = w (a W + b): dL/dw = g.(a W + b) = (g W^T).a + g.b, so that y need not be kept.
            gradient_BH = gradient_TH.index_select(0, batch.token_B)
            if batch.served_B1 is not None:
                gradient_BH = torch.where(batch.served_B1, gradient_BH, 0)
            if need_weights or need_first:
                gradient_BI = second.transposed_product(gradient_BH, batch)
            if need_weights:
                torch.linalg.vecdot(gradient_BI, activated_BI, out=d_weights_R[rows])
                second.add_bias_products(gradient_BH, batch, d_weights_R[rows])
            d_second.set(gradient_BH.mul_(weights_R[rows, None]), activated_BI, batch)
            if need_first:
                gradient_BU, of_parameters = pull(gradient_BI.mul_(weights_R[rows, None]))
                for total, part in zip(d_parameters, of_parameters, strict=True):
                    if part is not None:
                        total += part
                d_first.set(gradient_BU, rows_BH, batch)
            if need_hidden:
                d_rows_BH = first.transposed_product(gradient_BU, batch, None if at_once else d_rows_RH[rows])
        d_hidden = d_weights = None
        if need_hidden:
            d_rows_RH[num_rows:] = 0
            d_rows_RH = d_rows_BH if at_once else d_rows_RH
            d_hidden = F.embedding_bag(self.segments.row_TK, d_rows_RH, mode="sum").to(hidden_TH.dtype)
        if need_weights:
            d_weights_R = F.pad(d_weights_R, (0, 1))  # of the pairs that no expert here serves
            d_weights = d_weights_R[self.segments.row_TK].to(weights_TK.dtype)
        d_parameters += [gradient for one in (*first.beside, *second.beside) for gradient in one.gradients]
        return (d_hidden, d_weights, d_first.weight, d_first.bias, d_second.weight, d_second.bias, *d_parameters)

    def by(self, way: str) -> _Call:
        """This call, its remaining products by another way if need be."""
        if way == GROUPED or not any(batch.grouped for batch in self.segments.batches):
            return self
        batches = [batch._replace(grouped=False) for batch in self.segments.batches]
        return replace(self, segments=self.segments._replace(batches=batches))

    def plain(self, hidden_TH, weights_TK, up, up_bias, down, down_bias) -> torch.Tensor:
        """[`forward`] in operations that torch differentiates any number of times."""

        def project(rows, weight, bias, expert):
            matrix = weight[expert].mT if self.transposed else weight[expert]
            return F.linear(rows, matrix.to(self.dtype), None if bias is None else bias[expert].to(self.dtype))

        output_TH = torch.zeros_like(hidden_TH, dtype=self.dtype)
        for expert in self.index_TK.unique().tolist():
            if expert >= len(up):  # of another expert-parallel rank
                continue
            token, slot = torch.where(self.index_TK == expert)
            first = project(hidden_TH[token].to(self.dtype), up, up_bias, expert)
            second = project(self.activation.function(first).to(self.dtype), down, down_bias, expert)
            output_TH = output_TH.index_add(0, token, second * weights_TK[token, slot, None].to(self.dtype))
        return output_TH.to(hidden_TH.dtype)

    def differentiable_backward(self, needs, gradient_TH, *arguments):
        """[`backward`] for `create_graph=True`."""
        # Each argument by a name of its own, for one may have been computed from another.
        named = [None if argument is None else argument.view_as(argument) for argument in arguments]
        output_TH = self.plain(*named)
        wanted = [argument for argument, need in zip(named, needs, strict=True) if need and argument is not None]
        found = iter(torch.autograd.grad(output_TH, wanted, gradient_TH, create_graph=True, allow_unused=True))
        return tuple(next(found) if need else None for need in needs)

    def _projections(self, up, up_bias, down, down_bias) -> tuple[Projection, Projection]:
        beside = self.adapters.beside(self.dtype, self.segments) if self.adapters else ((), ())
        return (
            Projection(up, up_bias, self.dtype, self.transposed, beside[0]),
            Projection(down, down_bias, self.dtype, self.transposed, beside[1]),
        )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *arguments: torch.Tensor | None) -> torch.Tensor:
        ctx.call, ctx.num_arguments = call, len(arguments)
        ctx.generator = _generator(call.segments.row_TK.device) if call.training else None
        ctx.random_state = ctx.generator and ctx.generator.get_state()
        output_TH, kept = call.forward(*arguments)
        # A dropout among the experts' activations must drop the same values when backward computes them again.
        if ctx.generator and torch.equal(ctx.random_state, ctx.generator.get_state()):
            ctx.generator = ctx.random_state = None
        ctx.save_for_backward(*arguments, *kept)
        return output_TH

    @staticmethod
    def backward(ctx: Any, gradient_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing hands them out a single time
        arguments, kept = saved[: ctx.num_arguments], saved[ctx.num_arguments :]
        if torch.is_grad_enabled():
            if ctx.call.adapters or ctx.call.activation.parameters or ctx.generator:
                raise NotImplementedError(
                    "The experts implementation `sparse_moe` has no second derivative (`create_graph=True`) with "
                    "adapters, dropout or a learned activation in the experts. "
                    'Call `model.set_experts_implementation("eager")` for it.'
                )
            return None, *ctx.call.differentiable_backward(ctx.needs_input_grad[1:], gradient_TH, *arguments)

        def compute(way: str):
            with _replay(ctx.generator, ctx.random_state):
                return None, *ctx.call.by(way).backward(ctx.needs_input_grad[1:], kept, gradient_TH, *arguments)

        with ctx.call.turn.timed(last=True):
            return ctx.call.turn.run(compute)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return torch.get_device_module(device).default_generators[device.index]


@contextmanager
def _replay(generator: torch.Generator | None, state: torch.Tensor | None) -> Iterator[None]:
    """Draw what was drawn after `state`, and leave the generator alone."""
    if generator is None or state is None:
        yield
        return
    present = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(present)
