"""Checkpoints of a Trainer that are whole, or known not to be."""

from __future__ import annotations

import copy
import json
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints
from transformers.utils import CONFIG_NAME, logging

from hf_sparse_moe.checkpoints.files import tensor_names
from hf_sparse_moe.checkpoints.folder import flush, full_disk_told


logger = logging.get_logger(__name__)

INCOMPLETE_NAME = "checkpoint-is-incomplete.txt"  # as the JIT checkpoints of transformers name it
ADAPTER_NAME = "adapter_model.safetensors"

# What the engines write: `latest` is DeepSpeed's, `.metadata` is what torch writes last.
_WEIGHTS = (
    "*.safetensors",
    f"*/{ADAPTER_NAME}",
    "pytorch_model_fsdp*.bin",
    "pytorch_model_fsdp_*/.metadata",
    "latest",
)
# What a training needs beside the weights; a checkpoint with `save_only_model=True` has none of it.
_STATES = {
    "the optimizer's state": ("optimizer*.pt", "optimizer*.bin", "optimizer_*/.metadata", "latest"),
    "the scheduler's state": ("scheduler.pt", "latest"),
    "the random state": ("rng_state*.pth",),
}
_FULL_DISK = (
    "This checkpoint is incomplete; earlier ones are as they were. Free some space, and start the same command again."
)


def keep_checkpoints_whole(trainer: Trainer) -> None:
    """
    Have a trainer mark each checkpoint while it is being written, so that [`find_last_checkpoint`] never takes one for
    whole that a kill, a crash or a power cut ended.

    On this one trainer, whatever its subclass and engine, a checkpoint is whole when all ranks have written their part
    and the disk holds it; only then older ones go by `save_total_limit`. A full disk ends the
    training with one sentence, and leaves the older checkpoints as they are. Each checkpoint is logged, so that the
    numbers of the steps since the last log are not lost in a resume. A training that is resumed from the checkpoint of
    its last step takes no further step.

    Args:
        trainer (`Trainer`): Call it before `train`.

    Example:
        ```python
        trainer = Trainer(model=model, args=args, train_dataset=dataset)
        keep_checkpoints_whole(trainer)
        trainer.train(resume_from_checkpoint=find_last_checkpoint(args.output_dir))
        ```
    """
    if "_save_checkpoint" not in trainer.__dict__:
        trainer.__dict__["_save_checkpoint"] = partial(_save_whole, trainer, trainer._save_checkpoint)
        trainer.__dict__["_run_epoch"] = partial(_run_unfinished_epoch, trainer, trainer._run_epoch)
        trainer.add_callback(_LogAtCheckpoints())


def find_last_checkpoint(folder: str | Path) -> str | None:
    """
    The last checkpoint in `folder` from which a training can resume. Those that are incomplete or damaged are skipped
    with a warning; `transformers.trainer_utils.get_last_checkpoint` takes them.

    Args:
        folder (`str` or `Path`): The `output_dir` of a training; it need not exist.

    Returns:
        `str`: its path, or None where there is none.
    """
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-[0-9]+", path.name)
    }
    for _, path in sorted(steps.items(), reverse=True):
        damage = checkpoint_damage(path)
        if damage is None:
            return str(path)
        logger.warning(f"`{path}` is skipped: {damage}.")
    return None


def checkpoint_damage(folder: str | Path) -> str | None:
    """
    What keeps a training from resuming from a checkpoint; None where nothing does. JSON files are parsed; weights and
    states are held against their own headers and indices, and not read.
    """
    folder = Path(folder)
    if (folder / INCOMPLETE_NAME).exists():
        return "its writing was not finished"
    if not (folder / TRAINER_STATE_NAME).is_file():
        return f"it has no {TRAINER_STATE_NAME}"
    if not _has(folder, _WEIGHTS):
        return "it has no weights"
    missing = [name for name, patterns in _STATES.items() if not _has(folder, patterns)]
    if 0 < len(missing) < len(_STATES):
        return f"it lacks {missing[0]}"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if path.name.endswith(".safetensors.index.json"):
                    for shard in sorted(set(content["weight_map"].values())):
                        if not (path.parent / shard).is_file():
                            return f"it lacks {shard}"
            elif path.suffix == ".safetensors":
                tensor_names(path)
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):  # what torch.save writes
                return f"its {path.relative_to(folder)} is cut short"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return f"its {path.relative_to(folder)} is cut short"
    return None


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


class _LogAtCheckpoints(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or (args.save_strategy == SaveStrategy.BEST and control.should_evaluate):
            control.should_log = True

    on_epoch_end = on_step_end


def _run_unfinished_epoch(trainer: Trainer, run_epoch: Any, **arguments: Any) -> None:
    """Trainer asks only after a step whether it was the last, and would take one too many."""
    if trainer.state.global_step >= trainer.state.max_steps:
        trainer.control.should_training_stop = True
    else:
        run_epoch(**arguments)


def _save_whole(trainer: Trainer, save: Any, model: nn.Module, trial: Any) -> None:
    args, step = trainer.args, trainer.state.global_step
    run = Path(trainer._get_output_dir(trial=trial))
    folder = run / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    mark, limit = folder / INCOMPLETE_NAME, args.save_total_limit
    if args.should_save:
        if mark.exists():  # left by a training that was killed
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(f"The checkpoint of step {step} is being written.\n", encoding="utf-8")
    trainer.accelerator.wait_for_everyone()  # no rank writes before the mark is there
    args.save_total_limit = None  # nothing older goes before this one is whole
    try:
        # What is left of the checkpoint is marked, and goes when its step is saved again.
        with full_disk_told(folder, _FULL_DISK):
            save(model, trial)
            if args.should_save:
                _save_config(trainer, folder)
            flush(folder)
            trainer.accelerator.wait_for_everyone()
    finally:
        args.save_total_limit = limit
    if args.should_save:
        mark.unlink()
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(str(run), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


def _save_config(trainer: Trainer, folder: Path) -> None:
    """Engines that leave the weights in shards save no config with them, without which they cannot be loaded."""
    model: Any = trainer.model
    if hasattr(model, "peft_config") or not hasattr(model, "config") or (folder / CONFIG_NAME).exists():
        return
    config = copy.copy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
