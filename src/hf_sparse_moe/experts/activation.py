"""What an expert does between its two products, and the gradient of that, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from hf_sparse_moe.models.experts import SparseMoeExperts


PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
Gradients = tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]  # of the rows, and of the parameters
Pullback = Callable[[torch.Tensor], Gradients]


@dataclass
class Activation:
    """The activation of an experts module: rows of the first projection to rows for the second. U = 2I or I."""

    function: Callable[[torch.Tensor], torch.Tensor]  # (R, U) to (R, I)
    # What `act_fn(gate) * up` applies to the gate, where `function` is that and nothing more. Its gradient costs fewer
    # passes over memory than that of `function`, which torch differentiates as it stands.
    gate_function: Callable[[torch.Tensor], torch.Tensor] | None
    parameters: tuple[nn.Parameter, ...]  # what `function` learns, as XIELU does

    @classmethod
    def of(cls, experts: Any) -> Activation:
        """The activation of `experts`, in their present mode (training or not)."""
        gated = experts.has_gate
        named = experts.named_parameters() if torch.is_grad_enabled() else ()
        learnt = [one for name, one in named if one.requires_grad and name.removesuffix("_bias") not in PROJECTIONS]
        gate_function = experts.act_fn if gated and _multiplies_only(experts) else None
        return cls(experts._apply_gate if gated else experts.act_fn, gate_function, tuple(learnt))

    def __call__(self, first_RU: torch.Tensor) -> torch.Tensor:
        if self.gate_function is None:
            return self.function(first_RU)
        gate_RI, up_RI = first_RU.chunk(2, dim=-1)
        return self.gate_function(gate_RI) * up_RI

    def differentiate(self, first_RU: torch.Tensor) -> tuple[torch.Tensor, Pullback]:
        """
        The activation, and the function that takes its gradient (which it may overwrite) to that of `first_RU` and
        those of the parameters.
        """
        if self.gate_function is None:
            return self._autograd(self.function, first_RU)
        gate_RI, up_RI = first_RU.chunk(2, dim=-1)
        activated_RI, pull_gate = self._autograd(self.gate_function, gate_RI)

        def pull_both(gradient_RI: torch.Tensor) -> Gradients:
            gradient_RU = torch.empty_like(first_RU)
            d_gate_RI, d_up_RI = gradient_RU.chunk(2, dim=-1)
            torch.mul(gradient_RI, activated_RI, out=d_up_RI)
            through_gate_RI, of_parameters = pull_gate(gradient_RI.mul_(up_RI))
            d_gate_RI.copy_(through_gate_RI)
            return gradient_RU, of_parameters

        return activated_RI * up_RI, pull_both

    def _autograd(
        self, function: Callable[[torch.Tensor], torch.Tensor], argument: torch.Tensor
    ) -> tuple[torch.Tensor, Pullback]:
        with torch.enable_grad():
            leaf = argument.detach().requires_grad_()
            output = function(leaf)

        def pull(gradient: torch.Tensor) -> Gradients:
            of_leaf, *of_parameters = torch.autograd.grad(
                output, (leaf, *self.parameters), gradient.to(output.dtype), allow_unused=True
            )
            return of_leaf, tuple(of_parameters)

        return output.detach(), pull


def _multiplies_only(experts: Any) -> bool:
    """Whether `_apply_gate` is `act_fn(gate) * up`: transformers' own, or ours without a dropout to apply."""
    apply_gate = type(experts)._apply_gate
    if apply_gate is SparseMoeExperts._apply_gate:
        return not (experts.training and experts.dropout.p > 0)
    return apply_gate is _default_apply_gate
