"""The record of a training, written beside the weights while it runs; the card is rendered from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sized
from datetime import UTC, datetime
from numbers import Number
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import hf_sparse_moe
from hf_sparse_moe.checkpoints.files import read_json, write_whole

from .adapter_files import record_base
from .checkpoint import RECORD_NAME, mapping


_RUNTIME = re.compile(r"eval(?:_(.+))?_runtime")
_NO_RESULT = ("runtime", "per_second", "model_preparation_time")  # of the machine, not of the model
_READERS = ("json", "csv", "text", "parquet", "arrow", "generator")  # of `datasets`: no names of data


class ModelCardCallback(TrainerCallback):
    """
    Records a training for the model card, in `training_record.json` beside the weights of each checkpoint and of the
    end: data, hyperparameters, device, versions, the routers' health and every evaluation. Where an adapter is
    trained, `adapter_base.json` says what tells its base from others.

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
        self._card = {"license": license, "language": _listed(language), "tags": _listed(tags)}
        self._data: dict[str, Any] = {}
        self._evaluation: dict[str, Any] = {"task": eval_task, "metrics": eval_metrics, "data": {}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self._data = _describe_data(train_dataloader, self._train_names)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        part, _ = read_evaluation(metrics or {})
        if part is None:
            return
        self._evaluation["data"][part] = _describe_data(eval_dataloader, self._eval_names)
        self._evaluation["date"] = _now()
        if state.global_step == 0 or _divided(state)[1]:  # no training runs
            self.write(args, state, str(args.output_dir))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir():
            self.write(args, state, folder, kwargs.get("model"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.write(args, state, str(args.output_dir), kwargs.get("model"))

    def record(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """What is known by now, in plain values. Numbers that are not finite become strings, since JSON has none."""
        during, after = _divided(state)
        best = state.best_global_step if args.load_best_model_at_end and after else None
        step = best or state.global_step  # of the weights
        logs = [log for log in during if "loss" in log and log["step"] <= step]
        evaluations = [(log, *read_evaluation(log)) for log in during]
        evaluations = [entry for entry in evaluations if entry[1] is not None]
        at_step = {part: results for log, part, results in evaluations if log["step"] == step}
        at_end = {part: results for part, results in map(read_evaluation, after) if part is not None}
        training = {
            **self._data,
            "steps": state.global_step,
            "weights_of_step": step,
            "epochs": state.epoch,
            "tokens": state.num_input_tokens_seen or None,
            "last_log": logs[-1] if logs else {},
        }
        evaluation = {
            **self._evaluation,
            "results": at_step | at_end,
            "log": [
                {"step": log["step"], "epoch": log.get("epoch"), "part": part, **results}
                for log, part, results in evaluations
            ],
        }
        hyperparameters = extract_hyperparameters_from_trainer(SimpleNamespace(args=args))
        hyperparameters |= {"optimizer": args.optim, "weight_decay": args.weight_decay, "bf16": args.bf16}
        is_cuda = args.device.type == "cuda"
        device = torch.cuda.get_device_name(args.device) if is_cuda else args.device.type
        packages = (hf_sparse_moe, transformers, torch)
        return _plain(
            {
                "training": training if state.global_step else {},
                "hyperparameters": hyperparameters,
                "evaluation": evaluation,
                "card": self._card,
                "hardware": {"device": device, "processes": args.world_size},
                "versions": {package.__name__: package.__version__ for package in packages},
            }
        )

    def write(self, args: TrainingArguments, state: TrainerState, folder: str | Path, model: Any = None) -> None:
        """Write `training_record.json`, and of an adapter's base `adapter_base.json`, on the main process."""
        if state.is_world_process_zero:
            _write_record(self.record(args, state), folder)
            if hasattr(model, "peft_config"):
                record_base(model, folder)


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
    record = read_json(Path(folder) / RECORD_NAME, optional=True)
    evaluation = mapping(record.get("evaluation"))
    record["evaluation"] = {
        **evaluation,
        "results": {**mapping(evaluation.get("results")), **results},
        "data": {**mapping(evaluation.get("data")), **{part: {"data": _listed(data)} for part in results}},
        "metrics": metrics or evaluation.get("metrics"),
        "date": _now(),
    }
    _write_record(_plain(record), folder)


def read_evaluation(metrics: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """
    The part of the evaluation data (empty for the whole) and the results in a log of `Trainer.evaluate`, which names
    the parts where `eval_dataset` is a dict; `(None, {})` of another log.
    """
    found = next((found for name in metrics if (found := _RUNTIME.fullmatch(name))), None)
    if found is None:
        return None, {}
    prefix = found[0].removesuffix("runtime")
    results = {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and isinstance(value, Number | str) and not name.endswith(_NO_RESULT)
    }
    return found[1] or "", results


def _divided(state: TrainerState) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The logs of a training, and those from its end on: they are of the weights as they are then."""
    history = state.log_history
    end = next((index for index, log in enumerate(history) if "train_runtime" in log), len(history))
    return history[:end], history[end:]


def _describe_data(dataloader: Any, names: list[str]) -> dict[str, Any]:
    data = getattr(dataloader, "dataset", None)
    info, split = getattr(data, "info", None), getattr(data, "split", None)
    own = getattr(info, "dataset_name", None)
    if not names and own is not None and own not in _READERS:
        names = [own if split is None else f"{own} ({split})"]
    return {"data": names, "rows": len(data) if isinstance(data, Sized) else None}


def _write_record(record: Mapping[str, Any], folder: str | Path) -> None:
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: numbers of numpy and torch become plain ones, and those that are not finite strings."""
    return json.loads(json.dumps(record, default=float), parse_constant=str)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _listed(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())
