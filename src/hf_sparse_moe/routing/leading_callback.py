"""Callbacks whose numbers reach everyone who logs."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback


def add_leading_callback(trainer: Trainer, callback: TrainerCallback) -> None:
    """
    Add `callback` ahead of all others.

    `Trainer(callbacks=[...])` and `trainer.add_callback` put a callback behind the progress bar and the integrations
    of `report_to` (TensorBoard, W&B, ...), which then have sent the logs before it can add to them.

    Args:
        trainer (`Trainer`): A trainer, of any subclass.
        callback (`TrainerCallback`): Adds numbers to `logs` in its `on_log`.
    """
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
