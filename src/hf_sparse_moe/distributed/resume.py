"""Save and resume for models that `from_pretrained(distributed_config=...)` spread over the ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.distributed.checkpoint import (
    _load_model_checkpoint_distributed,
    load_optimizer_distributed,
    save_optimizer_distributed,
)
from transformers.trainer import OPTIMIZER_NAME_BIN, SCHEDULER_NAME


_OPTIMIZER_FOLDER = f"{Path(OPTIMIZER_NAME_BIN).stem}_0"  # as FSDP's checkpoints name it


class ResumableTrainer(Trainer):
    """
    A `Trainer` whose checkpoints hold shards of weights and optimizer, one file a rank, for expert, tensor and data
    parallelism of transformers (`DistributedConfig`), which the stock `Trainer` trains and refuses to save.

    A checkpoint can be resumed under another layout, such as FSDP alone after expert parallelism. Adapters are whole
    on every rank, and their checkpoints those of `Trainer`. For other engines use the stock `Trainer`.

    Args:
        model (`PreTrainedModel`): From `from_pretrained(..., distributed_config=DistributedConfig(...))`.
        args (`TrainingArguments`): As for `Trainer`.
        **arguments: As for `Trainer`.

    Raises:
        ValueError: a model that is not spread over the ranks.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, **arguments: Any):
        if not getattr(model, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "`model` is not spread over the ranks. Load it with `from_pretrained(..., distributed_config="
                "DistributedConfig(...))`, or use `Trainer`."
            )
        only_model, args.save_only_model = args.save_only_model, True  # `Trainer` refuses anything else here
        try:
            super().__init__(model, args, **arguments)
        finally:
            args.save_only_model = only_model
        self._trains_adapters = hasattr(model, "peft_config")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Inside of a checkpoint, a file of shards a rank; at the end of a training, normal weights."""
        if not _internal_call or output_dir is None or self._trains_adapters:
            return super().save_model(output_dir, _internal_call)
        model: Any = self.model
        model.save_pretrained(output_dir, distributed_checkpoint=True, is_main_process=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._trains_adapters and state_dict is None:  # else PEFT gathers the whole base on each rank
            model: Any = self.model
            state_dict = {
                name: value
                for name, value in model.state_dict(keep_vars=True).items()
                if value.requires_grad or not isinstance(value, DTensor)
            }
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._trains_adapters:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer, scheduler = self._prepared()
        save_optimizer_distributed(self.model, optimizer, os.path.join(output_dir, _OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._trains_adapters:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        _load_model_checkpoint_distributed(model or self.model, resume_from_checkpoint)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._trains_adapters:
            return super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not os.path.isdir(os.path.join(checkpoint, _OPTIMIZER_FOLDER)):
            return None
        optimizer, scheduler = self._prepared()
        load_optimizer_distributed(self.model, optimizer, os.path.join(checkpoint, _OPTIMIZER_FOLDER))
        states = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
        # Another layout has other groups of parameters, all with the same learning rate.
        groups = len(optimizer.param_groups)
        states = {name: value[:1] * groups if isinstance(value, list) else value for name, value in states.items()}
        scheduler.load_state_dict(states)
        return None

    def _prepared(self) -> tuple[Any, Any]:
        """Optimizer and scheduler, without what accelerate puts around the former."""
        prepared: Any = self.optimizer
        return prepared.optimizer, self.lr_scheduler

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


class ResumableSeq2SeqTrainer(ResumableTrainer, Seq2SeqTrainer):
    """A [`ResumableTrainer`] that can generate in evaluation, as `Seq2SeqTrainer` does."""
