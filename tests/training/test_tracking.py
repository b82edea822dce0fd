"""A training that was interrupted is one run, in the trackers' own words."""

import sqlite3
import sys
from unittest.mock import MagicMock

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils

from recipe.tracking import keep_one_run
from tiny_models import tiny_sparse


ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 60, (8, 6), generator=torch.manual_seed(0))]


def train(folder, max_steps, checkpoint=None, **arguments) -> None:
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_steps": 2}
    args = TrainingArguments(str(folder), max_steps=max_steps, **quiet | arguments)
    trainer = Trainer(model=tiny_sparse("llama"), args=args, train_dataset=ROWS)
    keep_one_run(trainer, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)


def test_tensorboard_has_one_run(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    train(tmp_path / "out", 2, report_to=["tensorboard"])
    train(tmp_path / "out", 4, str(tmp_path / "out" / "checkpoint-2"), report_to=["tensorboard"])
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "out" / "runs")).Reload()
    (name,) = runs.Runs()
    assert name.startswith("out-")
    assert [event.step for event in runs.Scalars(name, "train/loss")] == [1, 2, 3, 4]


@pytest.fixture
def trackio(monkeypatch):
    """Stands in for the package: what Trainer's own callback calls it with."""
    package = MagicMock(__version__="0.1")
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    return package


def test_trackio_has_one_run(tmp_path, trackio):
    train(tmp_path / "out", 2, report_to=["trackio"])
    train(tmp_path / "out", 4, str(tmp_path / "out" / "checkpoint-2"), report_to=["trackio"])
    train(tmp_path / "other", 2, report_to=["trackio"])
    first, resumed, other = (call.kwargs for call in trackio.init.call_args_list)
    assert first["name"] == resumed["name"] != other["name"]
    assert resumed["resume"] == "allow"


def test_trackio_itself_has_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train(tmp_path / "out", 2, report_to=["trackio"])
    train(tmp_path / "out", 4, str(tmp_path / "out" / "checkpoint-2"), report_to=["trackio"])
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as tables:
        assert len(tables.execute("SELECT DISTINCT run_name FROM metrics").fetchall()) == 1
        assert len(tables.execute("SELECT step FROM metrics").fetchall()) >= 4


def test_a_name_that_is_given_stays(tmp_path, trackio):
    train(tmp_path / "out", 2, report_to=["trackio"], run_name="mine")
    assert trackio.init.call_args.kwargs["name"] == "mine"
    assert (tmp_path / "out" / "checkpoint-2" / "run_name").read_text() == "mine"
