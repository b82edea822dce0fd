"""Scores in the form that the Hub reads: `.eval_results/*.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from .checkpoint import mapping


RESULTS_FILE = ".eval_results/hf-sparse-moe.yaml"
_HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def hub_data(name: object) -> tuple[str, str | None] | None:
    """Id and revision of data that are named as `hf://datasets/user/name@revision`; None of other names."""
    found = _HUB_DATA.fullmatch(name) if isinstance(name, str) else None
    return None if found is None else (found[1], found[2])


def evaluation_entries(record: Mapping[str, Any]) -> list[EvalResultEntry]:
    """
    An entry for each number that a training record has of evaluation data on the Hub. Of data that are not there, or
    of several that were measured together, nothing can be said in this form.
    """
    evaluation = mapping(record.get("evaluation"))
    date, entries = evaluation.get("date"), []
    for part, results in mapping(evaluation.get("results")).items():
        names = mapping(mapping(evaluation.get("data")).get(part)).get("data")
        source = hub_data(names[0]) if isinstance(names, list) and len(names) == 1 else None
        entries += [
            EvalResultEntry(
                dataset_id=source[0],
                dataset_revision=source[1],
                task_id=str(evaluation.get("task") or "default"),
                value=value,
                date=date if isinstance(date, str) else None,
                notes=f"{metric}, part {part}" if part else str(metric),
            )
            for metric, value in mapping(results).items()
            if source is not None and type(value) in (int, float)  # no bool
        ]
    return entries


def write_evaluation_results(record: Mapping[str, Any], folder: str | Path) -> None:
    """Write the entries of a record to `.eval_results/hf-sparse-moe.yaml`; without any, remove that file."""
    path = Path(folder) / RESULTS_FILE
    if path.parent.is_symlink() or path.is_symlink():
        raise ValueError(f"`{path}` leads elsewhere by a link, so nothing was written. Remove the link.")
    if entries := eval_result_entries_to_yaml(evaluation_entries(record)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(entries, sort_keys=False, allow_unicode=True), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
