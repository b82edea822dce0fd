"""The record of a training, written beside the weights while it runs; the card is rendered from it."""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sized
from datetime import UTC, datetime
from enum import Enum
from numbers import Number
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import hf_sparse_moe
from hf_sparse_moe.checkpoints.files import read_json, write_whole

from .adapter_base import record_base
from .checkpoint import RECORD_NAME, mapping


_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "torch_compile",
    "seed",
    "data_seed",
)
_RUNTIME = re.compile(r"(.+)_runtime")
_NO_RESULT = ("runtime", "per_second", "model_preparation_time")  # of the machine, not of the model
_READERS = ("json", "csv", "text", "parquet", "arrow", "generator")  # of `datasets`: no names of data


class ModelCardCallback(TrainerCallback):
    """
    Records a training for the model card, in `training_record.json` beside the weights of each checkpoint and of the
    end: data, hyperparameters, hardware, versions, duration, the routers' health and every evaluation. Where an
    adapter is trained, `adapter_base.json` says what tells its base from others.

    It watches the stock [`Trainer`]. The names of data that were not loaded by `datasets` are known only where they
    are passed. No path, token or host name is recorded.

    Args:
        train_data (`str` or `Iterable[str]`, *optional*):
            The training data's names; `"hf://datasets/user/name"`, with `@revision` or without, for data of the Hub.
            By default what the `datasets` library says of its own data set.
        eval_data (`str` or `Iterable[str]`, *optional*): The same of the evaluation data.
        eval_task (`str`, defaults to `"default"`): Which task of an evaluation data set of the Hub was measured.
        license (`str`, *optional*): The model's licence, such as `"apache-2.0"`.
        language (`str` or `Iterable[str]`, *optional*): Codes, such as `"en"`.
        tags (`Iterable[str]`, *optional*): Further tags of the card.
        eval_metrics (`str`, *optional*):
            How the metrics were computed, such as `"F1 is the macro average; beam search with 4 beams"`.

    Example:
        ```python
        trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[ModelCardCallback()])
        trainer.train()
        trainer.save_model()
        ```
    """

    def __init__(
        self,
        train_data: str | Iterable[str] | None = None,
        eval_data: str | Iterable[str] | None = None,
        eval_task: str = "default",
        license: str | None = None,
        language: str | Iterable[str] | None = None,
        tags: Iterable[str] | None = None,
        eval_metrics: str | None = None,
    ):
        self._train_names, self._eval_names = _listed(train_data), _listed(eval_data)
        self._started: float | None = None  # while a training runs
        self._seconds_before, self._resumed_at = 0.0, list[int]()
        self._train_data: dict[str, Any] = {}
        self._record: dict[str, Any] = {
            "training": {},
            "hyperparameters": {},
            "evaluation": {"task": eval_task, "metrics": eval_metrics, "data": {}, "results": {}, "log": []},
            "card": {"license": license, "language": _listed(language), "tags": _listed(tags)},
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._started, self._seconds_before, self._resumed_at = time.perf_counter(), 0.0, []
        self._train_data = _describe_data(train_dataloader, self._train_names)
        self._record["hyperparameters"] = hyperparameters(args)
        if state.global_step > 0:  # resumed
            earlier = mapping(_read_record(_checkpoint_folder(args, state)).get("training"))
            seconds, steps = earlier.get("seconds"), earlier.get("resumed_at_steps")
            self._seconds_before = float(seconds) if isinstance(seconds, int | float) else 0.0
            self._resumed_at = [*(steps if isinstance(steps, list) else ()), state.global_step]

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        group, results = read_evaluation(metrics or {})
        if group is None:
            return
        evaluation = self._record["evaluation"]
        evaluation["data"][group] = _describe_data(eval_dataloader, self._eval_names)
        evaluation["date"] = _now()
        if self._started is None:  # of the weights as they are at the end
            evaluation["results"][group] = results
            self.write(args, state, str(args.output_dir))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (folder := _checkpoint_folder(args, state)).is_dir():
            self.write(args, state, folder)
            self._write_base(kwargs.get("model"), state, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = state.best_global_step if args.load_best_model_at_end else None
        self._follow(state, best or state.global_step)
        self._started = None
        self.write(args, state, str(args.output_dir))
        self._write_base(kwargs.get("model"), state, args.output_dir)

    def record(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """What is known by now, in plain values. Numbers that are not finite become strings, since JSON has none."""
        if self._started is not None:
            self._follow(state, state.global_step)
        return _plain({**self._record, "hardware": _hardware(args), "versions": _versions()})

    def write(self, args: TrainingArguments, state: TrainerState, folder: str | Path) -> None:
        """Write `training_record.json`, on the main process."""
        if state.is_world_process_zero:
            write_record(self.record(args, state), folder)

    def _write_base(self, model: Any, state: TrainerState, folder: str | Path | None) -> None:
        if folder is not None and state.is_world_process_zero and hasattr(model, "peft_config"):
            record_base(model, folder)

    def _follow(self, state: TrainerState, step: int) -> None:
        """Bring the record of a running training up to date, for the weights of `step`."""
        evaluations = [(log, *read_evaluation(log)) for log in state.log_history]
        evaluations = [entry for entry in evaluations if entry[1] is not None]
        self._record["evaluation"] |= {
            "results": {group: results for log, group, results in evaluations if log.get("step") == step},
            "log": [
                {"step": log.get("step"), "epoch": log.get("epoch"), "part": group, **results}
                for log, group, results in evaluations
            ],
        }
        logs = [log for log in state.log_history if "loss" in log and log.get("step", 0) <= step]
        elapsed = 0.0 if self._started is None else time.perf_counter() - self._started
        self._record["training"] = {
            **self._train_data,
            "steps": state.global_step,
            "weights_of_step": step,
            "epochs": state.epoch,
            "tokens": state.num_input_tokens_seen or None,
            "seconds": round(self._seconds_before + elapsed, 3),
            "resumed_at_steps": self._resumed_at,
            "last_log": logs[-1] if logs else {},
        }


def write_record(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write a record as `training_record.json` into `folder`, whole or not at all."""
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return path


def record_results(
    folder: str | Path,
    results: Mapping[str, Mapping[str, float]],
    data: str | Iterable[str] | None = None,
    metrics: str | None = None,
) -> None:
    """
    Add results that were not measured by `Trainer.evaluate` to the record of a checkpoint.

    Args:
        folder (`str` or `Path`): Of the checkpoint.
        results (`Mapping[str, Mapping[str, float]]`):
            Results by name, for each part (a domain, a language) of the evaluation data; `""` is the whole.
        data (`str` or `Iterable[str]`, *optional*): The data's names, see [`ModelCardCallback`].
        metrics (`str`, *optional*): How the results were computed.
    """
    record = dict(_read_record(Path(folder)))
    evaluation = dict(mapping(record.get("evaluation")))
    described = {part: {"data": _listed(data), "rows": None} for part in results}
    record["evaluation"] = evaluation | {
        "results": {**mapping(evaluation.get("results")), **results},
        "data": {**mapping(evaluation.get("data")), **described},
        "metrics": metrics or evaluation.get("metrics"),
        "date": _now(),
    }
    write_record(_plain(record), folder)


def read_evaluation(metrics: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """
    The part of the evaluation data (empty for the whole) and the results in a log of `Trainer.evaluate`, which names
    the parts where `eval_dataset` is a dict; `(None, {})` of another log.
    """
    prefix = next((found[1] for name in metrics if (found := _RUNTIME.fullmatch(name))), "")
    if prefix != "eval" and not prefix.startswith("eval_"):
        return None, {}
    results = {
        name.removeprefix(f"{prefix}_"): value
        for name, value in metrics.items()
        if name.startswith(f"{prefix}_") and isinstance(value, Number | str) and not name.endswith(_NO_RESULT)
    }
    return prefix.removeprefix("eval").removeprefix("_"), results


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The arguments that shape what is learnt: named one by one, so that no token, path or name slips in."""
    chosen = {name: getattr(args, name) for name in _ARGUMENTS if hasattr(args, name)}
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return _plain({**chosen, "total_train_batch_size": batch})


def _describe_data(dataloader: Any, names: list[str]) -> dict[str, Any]:
    data = getattr(dataloader, "dataset", None)
    info, split = getattr(data, "info", None), getattr(data, "split", None)
    own = getattr(info, "dataset_name", None)
    if not names and own is not None and own not in _READERS:
        names = [own if split is None else f"{own} ({split})"]
    return {"data": names, "rows": len(data) if isinstance(data, Sized) else None}


def _hardware(args: TrainingArguments) -> dict[str, Any]:
    cuda = args.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(args.device) if cuda else args.device.type,
        "processes": args.world_size,
        "machine": platform.machine(),
        "threads_per_process": torch.get_num_threads(),
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(args.device) if cuda else None,
    }


def _versions() -> dict[str, str]:
    return {
        "hf_sparse_moe": hf_sparse_moe.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _read_record(folder: Path) -> Mapping[str, Any]:
    return read_json(folder / RECORD_NAME, optional=True)


def _listed(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bool | str | int | None):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)
