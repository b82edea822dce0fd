"""What would quietly run in fewer processes, or on another engine, than was asked for is refused in a sentence."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from hf_sparse_moe.upcycling.streaming import check_distributed_config
from processes import in_processes
from recipe.launch import check_engine, check_processes, check_same_everywhere, check_tied_weights
from tiny_models import tiny_sparse
from training_runs import TRAINING


def message_of_a_rank(folder: Path, use_cpu: bool = True, differ: bool = False, fsdp: bool = False) -> None:
    """Writes, by the rank's number, the sentence that a check of recipe/launch.py ends with."""
    rank, sentence = os.environ["RANK"], ""
    options = {"fsdp": "full_shard"} if fsdp else {}
    try:
        arguments = TrainingArguments(str(folder / "run"), use_cpu=use_cpu, report_to=[], **options)
        check_processes(arguments)
        if differ:
            arguments.max_steps = 10 + arguments.process_index
        check_same_everywhere(arguments)
        if fsdp:
            check_engine(Trainer(model=tiny_sparse("decoder"), args=arguments))
    except ValueError as error:
        sentence = str(error)
    (folder / rank).write_text(sentence)
    while len(list(folder.glob("[01]"))) < 2:  # one that leaves resets connections that the other still makes
        time.sleep(0.01)


def messages(folder: Path, **options: bool) -> list[str]:
    """Of two ranks."""
    assert in_processes(2, message_of_a_rank, folder, **options) == [0, 0]
    return [(folder / rank).read_text() for rank in "01"]


def test_ranks_that_agree_go_on(tmp_path):
    assert messages(tmp_path) == ["", ""]


def test_ranks_with_different_arguments_stop_all_of_them(tmp_path):
    for message in messages(tmp_path, differ=True):
        assert "The ranks differ in `--max_steps`: 10 on rank 0, 11 on rank 1." in message


@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="with GPUs the processes find each other")
def test_ranks_without_gpus_and_without_use_cpu(tmp_path):
    for message in messages(tmp_path, use_cpu=False):
        assert "2 processes were launched, but each would train alone" in message


def test_fsdp_that_would_be_ddp(tmp_path):
    for message in messages(tmp_path, fsdp=True):
        assert "FSDP was asked for, but on `cpu` Accelerate runs MULTI_CPU in its place" in message


@pytest.mark.slow
def test_accelerate_that_starts_one_process_for_two(tmp_path):
    script = tmp_path / "one_rank.py"
    script.write_text(
        "from transformers import TrainingArguments\n"
        "from recipe.launch import check_processes\n"
        f"check_processes(TrainingArguments({str(tmp_path)!r}, use_cpu=True, report_to=[]))\n"
    )
    path = os.pathsep.join([str(TRAINING), os.environ.get("PYTHONPATH", "")])
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")
    command = [sys.executable, "-m", *launcher, str(script)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode != 0
    assert "`accelerate launch` was asked for 2 processes and started 1" in result.stderr


def test_sizes_that_do_not_make_up_the_processes():
    with pytest.raises(ValueError, match=r"is for 4 processes .* but 2 run"):
        check_distributed_config(DistributedConfig(fsdp_size=2, tp_size=2), num_experts=4, processes=2)


def test_experts_that_the_ranks_do_not_divide():
    sizes = DistributedConfig(fsdp_size=3, ep_size=3)
    with pytest.raises(ValueError, match=r"`num_experts=4` cannot be shared out over `ep_size=3`.*\[1, 2, 4\]"):
        check_distributed_config(sizes, num_experts=4, processes=3)
    check_distributed_config(DistributedConfig(fsdp_size=4, ep_size=2), num_experts=4, processes=4)


def test_slurm_tasks_that_know_nothing_of_each_other(tmp_path, monkeypatch):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    check_processes(arguments)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="`srun` started 4 tasks that know nothing of each other"):
        check_processes(arguments)


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("bert", True), ("t5", True)])
def test_tied_weights_that_accelerate_cannot_shard(name, tied, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=tiny_sparse(name), args=arguments)
    if tied:
        with pytest.raises(ValueError, match="share a parameter"):
            check_tied_weights(trainer)
    else:
        check_tied_weights(trainer)
