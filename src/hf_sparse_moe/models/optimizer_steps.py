"""Trainer says where an optimizer step begins, which `balance_scope="global_batch"` must know."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS


def start_optimizer_step(model: nn.Module) -> None:
    """Tell each mixture in `model` that the next micro-batch is the first one of an optimizer step."""
    for module in model.modules():
        if (load := getattr(module, "global_load", None)) is not None:
            load.start_step()


class OptimizerStepCallback(TrainerCallback):
    """Calls [`start_optimizer_step`]."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        start_optimizer_step(model)


def add_to_trainers() -> None:
    """Give every Trainer that is made from now on an [`OptimizerStepCallback`]."""
    if OptimizerStepCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(OptimizerStepCallback)  # type: ignore[arg-type]
