"""The experts of one layer as fused 3-D parameters, in the interface of transformers' experts backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
    use_experts_implementation,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)


class SparseMoeExperts(nn.Module):
    """
    E feed-forwards, each `down(act(gate(x)) * up(x))` (gated) or `down(act(up(x)))` (plain), with or without biases.

    The names and shapes of the parameters are those that experts backends, expert-parallel plans and PEFT's
    `target_parameters` key on: `gate_up_proj` (E, 2I, H), the gate's rows first, or `up_proj` (E, I, H), and
    `down_proj` (E, H, I), each with its `*_bias` (E, ...) where the layout has biases. Built by [`make_experts`].
    """

    gated: bool
    biased: bool

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        dropout: float,
        num_experts: int | None = None,
    ):
        super().__init__()
        self.num_experts = num_experts or config.num_experts
        self.hidden_dim = hidden_size
        self.intermediate_dim = intermediate_size
        self.up_name = "gate_up_proj" if self.gated else "up_proj"
        up_rows = 2 * intermediate_size if self.gated else intermediate_size
        setattr(self, self.up_name, nn.Parameter(torch.empty(self.num_experts, up_rows, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, intermediate_size))
        if self.biased:
            setattr(self, f"{self.up_name}_bias", nn.Parameter(torch.empty(self.num_experts, up_rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden_size))
        self.dropout = nn.Dropout(dropout)
        # Backends activate plain experts through `act_fn` alone, so that is where their dropout must sit.
        self.act_fn = act_fn if self.gated or dropout == 0 else _ActivationThenDropout(act_fn, dropout)

    def reset_parameters(self, std_up: float, std_down: float) -> None:
        """Normal weights, zero biases. Leaves alone what a checkpoint has filled."""
        init.normal_(getattr(self, self.up_name), mean=0.0, std=std_up)
        init.normal_(self.down_proj, mean=0.0, std=std_down)
        if self.biased:
            init.zeros_(getattr(self, f"{self.up_name}_bias"))
            init.zeros_(self.down_proj_bias)

    @property
    def is_aligned(self) -> bool:
        """Whether the rows of both projections are whole multiples of 16 bytes."""
        return all(size * self.down_proj.element_size() % 16 == 0 for size in (self.hidden_dim, self.intermediate_dim))

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.dropout(self.act_fn(gate) * up)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        The plain backend (`"eager"`): expert after expert, as the formula reads.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, H)`): The tokens.
            top_k_index (`torch.LongTensor` of shape `(T, K)`): The experts of each token.
            top_k_weights (`torch.Tensor` of shape `(T, K)`): Their weights.

        Returns:
            `torch.Tensor` of shape `(T, H)`.
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # a token of another expert-parallel rank
                continue
            token, slot = torch.where(top_k_index == expert)
            up = self._project(self.up_name, expert, hidden_states[token])
            intermediate = self._apply_gate(up) if self.gated else self.act_fn(up)
            weighted = self._project("down_proj", expert, intermediate) * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output

    def _project(self, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.biased else None
        return nn.functional.linear(rows, getattr(self, name)[expert], bias)

    def extra_repr(self) -> str:
        shape = f"num_experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"{shape}, biased={self.biased}"


def _run_where_possible(experts_class: Any) -> Any:
    """
    Another backend where the one that was chosen cannot run. `grouped_mm` of torch refuses rows that are no multiple
    of 16 bytes, and ONNX has no such product. An exported graph may not loop over the experts of its example.
    """

    def forward(self, hidden_states, top_k_index, top_k_weights):
        arguments = (self, hidden_states, top_k_index, top_k_weights)
        implementation = self.config._experts_implementation
        if torch.compiler.is_exporting():
            if torch.onnx.is_in_onnx_export() or not self.is_aligned:
                return batched_mm_experts_forward(*arguments)
            if implementation == "eager":
                return grouped_mm_experts_forward(*arguments)
        if implementation == "grouped_mm" and not self.is_aligned:
            logger.warning_once(
                f"Experts of {self.hidden_dim} x {self.intermediate_dim} in {self.down_proj.dtype} have rows that are "
                "no multiple of 16 bytes, which `grouped_mm` needs: they run with the slower `eager` backend."
            )
            return SparseMoeExperts.forward(*arguments)
        return ALL_EXPERTS_FUNCTIONS.get_interface(implementation, SparseMoeExperts.forward)(*arguments)

    experts_class.forward = forward
    return experts_class


@_run_where_possible
@use_experts_implementation(has_gate=True, has_bias=False)
class SparseMoeGatedExperts(SparseMoeExperts):
    gated, biased = True, False


@_run_where_possible
@use_experts_implementation(has_gate=True, has_bias=True)
class SparseMoeGatedBiasedExperts(SparseMoeExperts):
    gated, biased = True, True


@_run_where_possible
@use_experts_implementation(has_gate=False, has_bias=False)
class SparseMoePlainExperts(SparseMoeExperts):
    gated, biased = False, False


@_run_where_possible
@use_experts_implementation(has_gate=False, has_bias=True)
class SparseMoePlainBiasedExperts(SparseMoeExperts):
    gated, biased = False, True


def make_experts(
    config: PreTrainedConfig, *args, gated: bool, biased: bool, num_experts: int | None = None
) -> SparseMoeExperts:
    """The experts class of this layout, built with `args` as [`SparseMoeExperts`] takes them."""
    kinds: Any = SparseMoeExperts.__subclasses__()
    return next(kind for kind in kinds if (kind.gated, kind.biased) == (gated, biased))(config, *args, num_experts)


class _ActivationThenDropout(nn.Module):
    def __init__(self, act_fn: Callable[[torch.Tensor], torch.Tensor], dropout: float):
        super().__init__()
        self.act_fn = act_fn
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.act_fn(hidden_states))
