"""Training and measuring with the stock `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_sparse_moe.quickstart.examples import Example


class _ProgressBar(TrainerCallback):
    def __init__(self, progress: Progress, name: str):
        self.progress, self.task = progress, progress.add_task(name)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step, total=state.max_steps)


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
    trainer = _trainer(model, batch_size, folder, examples, learning_rate=learning_rate, seed=seed)
    with Progress(console=console) as progress:
        trainer.add_callback(_ProgressBar(progress, name))
        return trainer.train().metrics["train_runtime"]


def held_out_losses(
    model: nn.Module, examples: dict[str, list[Example]], *, batch_size: int, folder: Path
) -> dict[str, float]:
    """The mean task loss in nats a token of each domain; a mixture's balance loss is no part of it."""
    metrics = _trainer(model, batch_size, folder).evaluate(cast(Any, examples))  # lists do as data sets
    return {domain: metrics[f"eval_{domain}_loss"] for domain in examples}


def _trainer(
    model: nn.Module, batch_size: int, folder: Path, examples: list[Example] | None = None, **arguments: Any
) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a share
        weight_decay=0.01,
        train_sampling_strategy="sequential",  # the same order for each model
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],  # Trainer cannot read them from a PeftModel's forward
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, args, train_dataset=examples, data_collator=default_data_collator)
    trainer.remove_callback(PrinterCallback)
    return trainer
