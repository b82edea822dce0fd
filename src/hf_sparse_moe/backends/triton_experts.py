"""
Experts on CUDA: gather, grouped product and activation in one kernel, product and scatter in another.

`experts_implementation="triton_mm"`. It has passed its tests in Triton's interpreter and has not been timed on a GPU,
so nothing chooses it by itself.

Shapes: T tokens, K experts a token, E experts, H hidden, I intermediate, U rows of the first projection (2I if gated),
R = T * K rows, sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .activation import Activation
from .triton_kernels import GELU, GELU_TANH, INTERPRETED, NO_GATE, RELU, SILU, matrices_product, rows_product


def triton_mm_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts of one layer, in the interface of transformers' `ALL_EXPERTS_FUNCTIONS`, for CUDA.

    Computes in the dtype of autocast where that is on, else in the dtype of the experts' weights; sums in float32.
    Nothing waits for the host, and the result does not depend on the order in which blocks run.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, H)`): The tokens.
        top_k_index (`torch.LongTensor` of shape `(T, K)`): The experts of each token.
        top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.

    Returns:
        `torch.Tensor` of shape `(T, H)`, in the dtype of `hidden_states`.

    Raises:
        ValueError: tensors on another device, a norm after the experts, or float64, which no kernel here has.
    """
    device = hidden_states.device.type
    if device != "cuda" and not INTERPRETED:
        raise ValueError(
            f'`experts_implementation="triton_mm"` runs on CUDA, and these tensors are on `{device}`. Use '
            '"segment_mm" on a CPU, or "grouped_mm".'
        )
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, up_name), self.down_proj
    if self.has_post_expert_norm or up.dtype == torch.float64:
        obstacle = "a norm after the experts" if self.has_post_expert_norm else "float64 weights"
        raise ValueError(f'`experts_implementation="triton_mm"` does not run {obstacle}. Use "grouped_mm".')
    up_bias, down_bias = (getattr(self, f"{up_name}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else up.dtype
    activation = Activation.of(self)
    rows = _Rows.sort(top_k_index, self.num_experts, self._is_expert_parallel)
    call = _Call(rows, activation, dtype, self.is_transposed)
    with torch.autocast(device, enabled=False):
        return _TritonExperts.apply(
            call, hidden_states, top_k_weights, up, up_bias, down, down_bias, *activation.parameters
        )


@dataclass
class _Rows:
    """The pairs of token and slot, sorted by expert; those of another expert-parallel rank's experts come last."""

    pair_R: torch.Tensor  # t * K + k
    token_R: torch.Tensor
    expert_R: torch.Tensor  # E for a pair that no expert here serves
    offsets: torch.Tensor  # (E + 1,), int32
    may_skip: bool

    @classmethod
    def sort(cls, top_k_index: torch.Tensor, num_experts: int, may_skip: bool) -> _Rows:
        expert_R, pair_R = top_k_index.reshape(-1).clamp(max=num_experts).sort(stable=True)
        bounds = torch.arange(num_experts + 1, device=expert_R.device, dtype=expert_R.dtype)
        offsets = torch.searchsorted(expert_R, bounds, out_int32=True)
        return cls(pair_R, pair_R // top_k_index.shape[-1], expert_R, offsets, may_skip)

    def served(self, rows: torch.Tensor, num_experts: int) -> torch.Tensor:
        """`rows`, zeros written into those that no kernel wrote."""
        if not self.may_skip:
            return rows
        return rows.masked_fill_((self.expert_R == num_experts).reshape(-1, *[1] * (rows.dim() - 1)), 0.0)


@dataclass
class _Call:
    """One call of the experts: its routing and its choices."""

    rows: _Rows
    activation: Activation
    dtype: torch.dtype
    transposed: bool

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """(E, out, in), in the dtype of the products."""
        weight = weight.to(self.dtype)
        return weight.transpose(1, 2) if self.transposed else weight

    def forward(self, hidden_TH, weights_TK, up, up_bias, down, down_bias, *_) -> tuple[torch.Tensor, Any, Any]:
        """
        The output (T, H), the first projections (R, U), and, where torch applied the activation, what it gave with the
        function for its gradient: such an activation may drop at random, so backward must not apply it again.
        """
        rows, matrix_EUH, matrix_EHI = self.rows, self.matrices(up), self.matrices(down)
        num_experts, units, hidden = matrix_EUH.shape
        num_tokens, top_k = weights_TK.shape
        hidden_TH = hidden_TH.contiguous()
        tokens_TH = hidden_TH.to(self.dtype)
        num_rows, gate = num_tokens * top_k, _fused_gate(self.activation)
        first_RU = tokens_TH.new_empty(num_rows, units)
        activated_RI = tokens_TH.new_empty(num_rows, units // 2) if gate else None
        rows_product(
            tokens_TH, matrix_EUH, rows.offsets, num_rows, out=first_RU, bias=_cast(up_bias, self.dtype),
            read_index=rows.token_R, gate=gate, activated=activated_RI,
        )  # fmt: skip
        rows.served(first_RU, num_experts)
        by_torch = None
        if activated_RI is None:
            by_torch = self.activation.differentiate(first_RU)
            activated_RI = by_torch[0].to(self.dtype).contiguous()
        pairs_PH = tokens_TH.new_zeros(num_rows, hidden)  # a pair without an expert here stays 0
        rows_product(
            activated_RI, matrix_EHI, rows.offsets, num_rows, out=pairs_PH, bias=_cast(down_bias, self.dtype),
            row_scale=weights_TK.reshape(-1)[rows.pair_R], write_index=rows.pair_R,
        )  # fmt: skip
        return pairs_PH.view(num_tokens, top_k, hidden).sum(dim=1).to(hidden_TH.dtype), first_RU, by_torch

    def backward(
        self, needs, first_RU, by_torch, gradient_TH, hidden_TH, weights_TK, up, up_bias, down, down_bias, *parameters
    ):  # fmt: skip
        """The gradients of [`forward`]'s arguments, those that `needs` says."""
        need_hidden, need_weights, need_up, need_up_bias, need_down, need_down_bias, *_ = needs
        rows, matrix_EUH, matrix_EHI = self.rows, self.matrices(up), self.matrices(down)
        num_experts, _, hidden = matrix_EUH.shape
        num_tokens, top_k = weights_TK.shape
        num_rows = num_tokens * top_k
        gradient_TH = gradient_TH.to(self.dtype).contiguous()
        weight_R = weights_TK.reshape(-1)[rows.pair_R]
        activated_RI, pull = by_torch or self.activation.differentiate(first_RU)
        activated_RI = activated_RI.to(self.dtype).contiguous()
        # With g = dL/dy and y = w (a W + b): dL/dw = g.(a W + b) = (g W^T).a + g.b, so that y need not be kept.
        gradient_RI = torch.zeros_like(activated_RI)
        rows_product(
            gradient_TH, matrix_EHI.transpose(1, 2), rows.offsets, num_rows, out=gradient_RI, read_index=rows.token_R
        )
        d_weights = None
        if need_weights:
            d_weight_R = (gradient_RI.float() * activated_RI.float()).sum(dim=-1)
            if down_bias is not None:
                bias_RH = down_bias[rows.expert_R.clamp(max=num_experts - 1)].float()
                d_weight_R += (gradient_TH[rows.token_R].float() * bias_RH).sum(dim=-1)
            d_weight_R = rows.served(d_weight_R, num_experts)
            d_weights = torch.empty_like(d_weight_R).index_copy_(0, rows.pair_R, d_weight_R)
            d_weights = d_weights.view(num_tokens, top_k).to(weights_TK.dtype)
        d_down = d_down_bias = d_up = d_up_bias = d_hidden = None
        if need_down:
            d_down = torch.empty_like(down)
            matrices_product(
                gradient_TH, activated_RI, rows.offsets, out=d_down.transpose(1, 2) if self.transposed else d_down,
                row_scale=weight_R, left_index=rows.token_R,
            )  # fmt: skip
        if need_down_bias:
            weighted_RH = gradient_TH[rows.token_R] * weight_R[:, None].to(self.dtype)
            d_down_bias = self._sum_by_expert(weighted_RH, down_bias)
        gradient_RU, d_parameters = pull(gradient_RI.mul_(weight_R[:, None]))
        gradient_RU = gradient_RU.to(self.dtype).contiguous()
        if need_up:
            d_up = torch.empty_like(up)
            matrices_product(
                gradient_RU, hidden_TH.to(self.dtype).contiguous(), rows.offsets,
                out=d_up.transpose(1, 2) if self.transposed else d_up, right_index=rows.token_R,
            )  # fmt: skip
        if need_up_bias:
            d_up_bias = self._sum_by_expert(gradient_RU, up_bias)
        if need_hidden:
            pairs_PH = gradient_TH.new_zeros(num_rows, hidden)
            rows_product(
                gradient_RU, matrix_EUH.transpose(1, 2), rows.offsets, num_rows, out=pairs_PH,
                write_index=rows.pair_R,
            )  # fmt: skip
            d_hidden = pairs_PH.view(num_tokens, top_k, hidden).sum(dim=1).to(hidden_TH.dtype)
        return d_hidden, d_weights, d_up, d_up_bias, d_down, d_down_bias, *d_parameters

    def _sum_by_expert(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(like) + 1, like.shape[1], dtype=torch.float32, device=rows.device)
        return sums.index_add_(0, self.rows.expert_R, rows.float())[:-1].to(like.dtype)


class _TritonExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *arguments: torch.Tensor | None) -> torch.Tensor:
        output_TH, first_RU, ctx.by_torch = call.forward(*arguments)
        ctx.call = call
        ctx.save_for_backward(first_RU, *arguments)
        return output_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first_RU, *arguments = ctx.saved_tensors
        return None, *ctx.call.backward(ctx.needs_input_grad[1:], first_RU, ctx.by_torch, gradient_TH, *arguments)


def _cast(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype).contiguous()


def _fused_gate(activation: Activation) -> int:
    """The kernel's own code for this activation, if it has it; else torch applies it between the products."""
    function = activation.gate_function
    if isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation":
        return SILU
    if isinstance(function, nn.GELU):
        return GELU_TANH if function.approximate == "tanh" else GELU
    named = {"GELUActivation": GELU, "GELUTanh": GELU_TANH, "PytorchGELUTanh": GELU_TANH, "ReLU": RELU}
    return named.get(type(function).__name__, NO_GATE)
