"""Training and measuring with the stock `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_sparse_moe.quickstart.examples import Example


class RichProgress(TrainerCallback):
    """A bar with the running training loss, in the place of Trainer's own lines."""

    def __init__(self, console: Console, name: str):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.progress = Progress(*columns, *times, TextColumn("{task.fields[loss]}"), console=console)
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task(self.name, total=state.max_steps, loss="")
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.progress.update(self.task, loss=f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.stop()


def train(
    model: nn.Module,
    examples: list[Example],
    *,
    batch_size: int,
    learning_rate: float,
    seed: int,
    name: str,
    folder: Path,
    console: Console,
) -> float:
    """One pass over `examples` in their order; returns the seconds it took."""
    trainer = _trainer(model, examples, batch_size, folder, learning_rate=learning_rate, seed=seed)
    progress = RichProgress(console, name)
    trainer.add_callback(progress)
    try:
        return trainer.train().metrics["train_runtime"]
    finally:
        progress.progress.stop()


def held_out_losses(
    model: nn.Module, examples: dict[str, list[Example]], *, batch_size: int, folder: Path
) -> dict[str, float]:
    """The mean task loss in nats a token of each domain; a mixture's balance loss is no part of it."""
    trainer = _trainer(model, None, batch_size, folder)
    metrics = trainer.evaluate(cast(Any, examples))  # a list is all of a data set that it needs
    return {domain: metrics[f"eval_{domain}_loss"] for domain in examples}


def _trainer(model: nn.Module, examples: list[Example] | None, batch_size: int, folder: Path, **arguments) -> Trainer:
    steps = 1 if examples is None else max(1, len(examples) // batch_size)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            num_train_epochs=1,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.01,
            logging_steps=max(1, steps // 20),
            train_sampling_strategy="sequential",  # the order is that of the examples, the same for each model
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],  # Trainer cannot read them from a PeftModel's forward
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=examples,
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
