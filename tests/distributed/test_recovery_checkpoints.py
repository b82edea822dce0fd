"""No checkpoint is taken for whole that is not, whatever ended its writing."""

import json
import logging
import resource
import shutil
import signal

import pytest
import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from distributed.recovery_runs import Kill, Run, final_weights, make_trainer, train
from hf_sparse_moe.distributed.checkpoint import (
    INCOMPLETE_NAME,
    checkpoint_damage,
    find_last_checkpoint,
    keep_checkpoints_whole,
)
from processes import in_processes


RUN = Run("decoder", arguments={"max_steps": 4})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of steps 2 and 4, by a stock trainer."""
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(RUN, folder, whole=False).train()
    return folder


@pytest.fixture
def checkpoints(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "checkpoints")


@pytest.fixture
def warnings_of_ours(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_sparse_moe")]


def test_the_newest_whole_checkpoint_is_found(checkpoints):
    for step in (2, 4):
        assert checkpoint_damage(checkpoints / f"checkpoint-{step}") is None
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-10")
    assert find_last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-10")  # by number, not by name
    assert find_last_checkpoint(checkpoints / "none such") is None


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", [*FILES, "training_args.bin", "config.json"])
def test_a_checkpoint_with_a_file_cut_short_is_skipped(name, checkpoints, warnings_of_ours):
    path = checkpoints / "checkpoint-4" / name
    for size in (path.stat().st_size - 2, path.stat().st_size // 2, 0):
        with path.open("r+b") as file:
            file.truncate(size)
        assert find_last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
        assert f"its {name} is cut short" in warnings_of_ours()[-1]
    assert get_last_checkpoint(str(checkpoints)).endswith("checkpoint-4")  # which is why ours is needed


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_lacks_a_file_is_skipped(name, checkpoints, warnings_of_ours):
    (checkpoints / "checkpoint-4" / name).unlink()
    assert find_last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    assert "`" + str(checkpoints / "checkpoint-4") + "` is skipped" in warnings_of_ours()[-1]


def test_a_checkpoint_with_a_record_cut_short_is_skipped(checkpoints, warnings_of_ours):
    (checkpoints / "checkpoint-4" / "training_record.json").write_text('{"dataset": ["a')
    assert find_last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    assert "its training_record.json is cut short" in warnings_of_ours()[-1]


def test_a_checkpoint_that_lacks_a_shard_is_skipped(checkpoints, tmp_path, warnings_of_ours):
    model, folder = make_trainer(RUN, tmp_path / "out").model, checkpoints / "checkpoint-4"
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert checkpoint_damage(folder) is None
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert find_last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    assert f"it lacks {shard.name}" in warnings_of_ours()[-1]


def test_a_checkpoint_of_the_model_alone_counts(tmp_path):
    run = Run("decoder", arguments={"max_steps": 2, "save_only_model": True})
    make_trainer(run, tmp_path).train()
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_killed_while_a_checkpoint_is_written(tmp_path, warnings_of_ours):
    """Its weights, optimizer and random state are there, and older ones would have had to go."""
    run = Run("decoder", arguments={"save_total_limit": 1})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_processes(1, train, run, whole) == [0]
    assert in_processes(1, train, run, killed, kill=Kill(4, "save")) == [-signal.SIGKILL]
    assert (killed / "checkpoint-4" / "optimizer.pt").exists()
    assert find_last_checkpoint(killed) == str(killed / "checkpoint-2")
    assert "its writing was not finished" in warnings_of_ours()[-1]
    assert in_processes(1, train, run, killed, resume=find_last_checkpoint(killed)) == [0]
    for name, value in final_weights(whole).items():
        assert torch.equal(value, final_weights(killed)[name]), name
    # What the kill left is gone, and the limit holds.
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-7"]
    assert not (killed / "checkpoint-7" / INCOMPLETE_NAME).exists()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_rank_killed_while_a_checkpoint_is_written(engine, tmp_path):
    run = Run("decoder", engine, 2)
    codes = in_processes(2, train, run, tmp_path, kill=Kill(4, "save"))
    assert codes == [-signal.SIGKILL, 1]
    assert (tmp_path / "checkpoint-4" / "rng_state_1.pth").exists()
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def train_on_a_full_disk(folder, size) -> None:
    trainer = make_trainer(RUN, folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # larger files fail as on a full disk
    with pytest.raises(OSError, match=r"disk of `.*checkpoint-4` is full.*earlier ones.*Free some space"):
        trainer.train(resume_from_checkpoint=find_last_checkpoint(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_told_and_leaves_the_older_checkpoint(name, checkpoints):
    shutil.rmtree(checkpoints / "checkpoint-4")
    before = {path: path.read_bytes() for path in (checkpoints / "checkpoint-2").iterdir()}
    size = len(before[checkpoints / "checkpoint-2" / name]) - 1
    assert in_processes(1, train_on_a_full_disk, checkpoints, size) == [0]
    assert {path: path.read_bytes() for path in (checkpoints / "checkpoint-2").iterdir()} == before
    assert find_last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    assert in_processes(1, train, RUN, checkpoints, resume=find_last_checkpoint(checkpoints)) == [0]


def test_an_error_that_is_no_full_disk_is_not_called_one(tmp_path):
    trainer = make_trainer(RUN, tmp_path)
    trainer.save_model = lambda *arguments, **named: (tmp_path / "no such folder" / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        trainer.train()
    assert find_last_checkpoint(tmp_path) is None


def test_each_checkpoint_is_logged(tmp_path):
    """Else the routers' counts since the last log would be lost in a resume."""
    trainer = make_trainer(Run("decoder", arguments={"logging_steps": 3, "save_steps": 2}), tmp_path)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2, 3, 4, 6, 7]


def test_asked_for_twice_it_is_done_once(tmp_path):
    trainer = make_trainer(RUN, tmp_path)
    saver, callbacks = trainer._save_checkpoint, list(trainer.callback_handler.callbacks)
    keep_checkpoints_whole(trainer)
    assert trainer._save_checkpoint is saver
    assert trainer.callback_handler.callbacks == callbacks
    assert Trainer._save_checkpoint is not saver


def test_the_state_names_what_the_trainer_was_asked_for(tmp_path):
    """The limit is put off while a checkpoint is written, and is what it was after."""
    trainer = make_trainer(Run("decoder", arguments={"max_steps": 4, "save_total_limit": 1}), tmp_path)
    trainer.train()
    assert trainer.args.save_total_limit == 1
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
