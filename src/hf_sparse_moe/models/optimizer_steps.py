"""Trainer tells the mixtures that it trains of each optimizer step."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.utils import logging

from .balancing import OptimizerStep


logger = logging.get_logger(__name__)


class OptimizerStepCallback(TrainerCallback):
    """Starts the [`OptimizerStep`] of each mixture in the model. A coefficient among its arguments (TRL's) counts."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        given = getattr(args, "router_aux_loss_coef", None)
        for step in _optimizer_steps(kwargs["model"]):
            if given is not None and step.settings.router_aux_loss_coef != given:
                logger.warning(
                    f"`router_aux_loss_coef` is {given} in the trainer's arguments and "
                    f"{step.settings.router_aux_loss_coef} in the model; the trainer's counts."
                )
                step.settings.router_aux_loss_coef = given

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        micro_batches = _micro_batches(args.gradient_accumulation_steps, state.global_step, kwargs["train_dataloader"])
        for step in _optimizer_steps(kwargs["model"]):
            step.start(micro_batches, _loss_scale(kwargs["optimizer"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for step in _optimizer_steps(kwargs["model"]):
            step.reset()


def add_to_trainers() -> None:
    """Give every Trainer that is made from now on an [`OptimizerStepCallback`]."""
    if OptimizerStepCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(OptimizerStepCallback)  # type: ignore[arg-type]


def _optimizer_steps(model: nn.Module) -> list[OptimizerStep]:
    found = (getattr(module, "optimizer_step", None) for module in model.modules())
    return [step for step in found if isinstance(step, OptimizerStep)]


def _micro_batches(accumulation: int, global_step: int, dataloader: Any) -> int:
    """Of the step to come: the last one of an epoch may have fewer."""
    try:
        length = len(dataloader)
    except TypeError:  # a stream
        return accumulation
    steps = -(-length // accumulation)
    is_last = global_step % steps == steps - 1
    return length - accumulation * (steps - 1) if is_last else accumulation


def _loss_scale(optimizer: Any) -> float:
    """By which the loss is multiplied in mixed precision with float16."""
    scaler = getattr(optimizer, "scaler", None)  # of Accelerate
    if scaler is not None:
        return scaler.get_scale()
    return float(getattr(getattr(optimizer, "optimizer", None), "loss_scale", 1.0))  # DeepSpeed's optimizers have one
