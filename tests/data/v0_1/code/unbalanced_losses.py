"""Losses that somebody else computes and that leave the balance loss out: refused, never silently unbalanced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .moe_block import SparseMoeBlock
from .routing_record import outer_record


LEFT_OUT = (
    "The loss of this backward pass leaves out the balance loss, so the experts would collapse unnoticed (a "
    "`compute_loss` of one's own and Trainer's `label_smoothing_factor` compute such a loss). Add "
    "`model.config.router_aux_loss_coef * outputs.aux_loss` to it, or train without balance loss: "
    "`model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0`."
)


def has_balance_loss(config: PreTrainedConfig) -> bool:
    """Whether a loss of the router is on."""
    return config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0


def router_trains(model: nn.Module) -> bool:
    """Whether a router inside has a parameter that is not frozen."""
    blocks = (module for module in model.modules() if isinstance(module, SparseMoeBlock))
    return any(parameter.requires_grad for block in blocks for parameter in block.gate.parameters())


def refuse_body_alone(config: PreTrainedConfig, body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that raises where somebody runs the body in training to put a head of their own on it."""
    if torch.compiler.is_compiling() or outer_record() is not None:
        return
    trains = body.training and torch.is_grad_enabled() and has_balance_loss(config) and router_trains(body)
    if trains or kwargs.get("output_router_logits"):
        raise ValueError(
            f"The body of this model was run by itself, `{type(body).__name__}`, so its balance loss is missing from "
            "the loss (TRL's trainers put a head of their own on it). Call the whole model, in a subclass of TRL's "
            "`SFTTrainer` by `compute_loss = transformers.Trainer.compute_loss`; or train without balance loss: "
            "`router_aux_loss_coef=0` and `router_z_loss_coef=0`."
        )


@torch.compiler.disable(reason="`labels` are missing, so somebody else computes the loss, and is watched in backward")
def refuse_loss_without(balance_loss: torch.Tensor, router_logits: torch.Tensor, sentence: str = LEFT_OUT) -> None:
    """Raise `sentence` in the backward pass of a loss that the balance loss is no part of."""
    if not (balance_loss.requires_grad and router_logits.requires_grad):
        return
    reached: list[bool] = []

    def note(gradient: torch.Tensor | None) -> None:  # None where another output of one function has a gradient
        if gradient is not None:
            reached.append(True)

    def check(gradient: torch.Tensor | None) -> None:  # runs when all that flows into the logits has been summed
        if not reached:
            raise ValueError(sentence)

    balance_loss.register_hook(note)
    router_logits.register_hook(check)
