"""benchmarks/tasks.py: its rows say what the recipes understand, and a row is run once, resumed, and compared."""

import json
import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from training_runs import COMMON, TRAINING


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tasks

    return tasks


@pytest.fixture
def small_row(tasks, checkpoints, files, tmp_path):
    """A table with one row, of the tests' own model and data, which is trained for a step first."""
    path = tmp_path / "tasks.toml"
    shared = {name: value for name, value in COMMON.items() if name != "num_experts"} | {"save_strategy": "no"}
    start = f'model_name_or_path = "{checkpoints["encoder"]}"\ntrain_file = "{files["docs.jsonl"]}"\nmax_steps = 1'
    path.write_text(
        "[shared]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in shared.items())
        + "[arms.dense]\ndense = true\n[arms.mixture]\nnum_experts = 2\n"
        + '[models.small]\nmodel_name_or_path = "{cache}/small"\n'
        + f'[models.small.prepare]\nrecipe = "run_mlm.py"\n{start}\n'
        + '[rows.length]\ntask = "length"\nrecipe = "run_classification.py"\nmodel = "small"\n'
        + 'metric = "eval_accuracy"\nfurther_metrics = ["eval_f1"]\n'
        + f'[rows.length.arguments]\ntrain_file = "{files["docs.jsonl"]}"\nmax_steps = 2\n'
    )  # fmt: skip
    return tasks.Table(path, tmp_path / "cache")


def test_a_row_is_measured_once(tasks, small_row, call_recipe, tmp_path, monkeypatch):
    cache, calls, fresh_process = tmp_path / "cache", [], tasks.subprocess.run

    def run_recipe(line, **options):
        calls.append(line)
        if len(calls) <= 2:
            return fresh_process(line, **options)
        call_recipe(Path(line[1]).name, *line[2:])  # the others here, where the imports are done
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(tasks.subprocess, "run", run_recipe)
    first = tasks.measure(small_row, "length", [0, 1], cache)
    assert first["arms"].keys() == {"dense", "mixture"}
    assert all(len(values) == 2 and min(values) >= 0 for values in first["arms"].values())
    low, high = first["interval"]
    assert low <= first["difference"] <= high
    assert first["parameters_total"]["mixture"] > first["parameters_total"]["dense"]
    assert first["parameters_active"]["dense"] == first["parameters_total"]["dense"]
    assert (cache / "small" / "model.safetensors").is_file()
    assert not list((cache / "runs").rglob("*.safetensors"))

    assert len(calls) == 5
    (cache / "runs" / "length" / "mixture-1" / "run.json").unlink()  # all that a kill would leave
    again = tasks.measure(small_row, "length", [0, 1], cache)
    assert again["arms"] == first["arms"]  # the same seed, the same bits
    assert len(calls) == 6
    small_row.row("length")["arguments"]["max_steps"] = 1
    tasks.measure(small_row, "length", [0], cache)
    assert len(calls) == 8


def test_differences_are_of_pairs(tasks):
    mean, interval = tasks.compared([0.5, 0.6, 0.7], [0.6, 0.7, 0.8])
    assert mean == pytest.approx(0.1)
    assert interval == pytest.approx([0.1, 0.1])  # the seeds differ, the pairs do not
    mean, (low, high) = tasks.compared([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert tasks.compared([1.0], [2.0]) == (1.0, None)


def test_every_row_speaks_the_language_of_its_recipe(tasks, monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    table = tasks.Table(tasks.ROWS, Path("cache"))
    known: dict[str, set[str]] = {}

    def names(recipe: str) -> set[str]:
        if recipe not in known:
            monkeypatch.setattr(sys, "argv", [recipe])
            module = runpy.run_path(str(TRAINING / recipe), run_name="recipe_of_a_row")
            mine = [each for each in module.values() if isinstance(each, type) and is_dataclass(each)]
            import recipe as shared

            mine += [shared.ModelArguments, shared.TrainingArguments]
            known[recipe] = {field.name for each in mine for field in fields(each)}
        return known[recipe]

    for name, row in table.rows.items():
        monkeypatch.setattr(tasks, "find_spec", lambda package: type("Spec", (), {"origin": "/x/__init__.py"}))
        for options in table.arms.values():
            unknown = set(table.arguments(row, seed=0, **options)) - names(row["recipe"])
            assert not unknown, name
