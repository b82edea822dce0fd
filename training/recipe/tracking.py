"""One training is one run in trackio and TensorBoard, however often it is resumed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


RUN_NAME = "run_name"  # a file in each checkpoint


class _KeepRunName(TrainerCallback):
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            (folder / RUN_NAME).write_text(str(args.run_name), encoding="utf-8")


def keep_one_run(trainer: Trainer, checkpoint: str | None) -> None:
    """
    Name the run of a training, where `run_name` does not, and give a resumed one the name of its checkpoint.

    Args:
        trainer (`Trainer`): Before `train`.
        checkpoint (`str`, *optional*): The folder that it resumes from.
    """
    args, output = trainer.args, Path(str(trainer.args.output_dir))
    recorded = None if checkpoint is None else Path(checkpoint) / RUN_NAME
    if args.run_name is None and recorded is not None and recorded.is_file():
        args.run_name = recorded.read_text(encoding="utf-8")
    args.run_name = args.run_name or f"{output.resolve().name}-{datetime.now():%Y-%m-%d-%H-%M-%S}"
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output / "runs" / args.run_name)
    trainer.add_callback(_KeepRunName())
