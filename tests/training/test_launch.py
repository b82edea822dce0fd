"""What would quietly run in fewer processes, or on another engine, than was asked for is refused in a sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig

from hf_sparse_moe.upcycling.streaming import check_distributed_config
from recipe.launch import check_processes, check_tied_weights
from tiny_models import tiny_sparse


ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
BOTH_RANKS = """
import sys

import torch.distributed as dist
from transformers import TrainingArguments

from recipe.launch import check_processes, check_same_everywhere

arguments = TrainingArguments(sys.argv[1], use_cpu=sys.argv[2] == "cpu", report_to=[])
check_processes(arguments)
if sys.argv[3] == "differ":
    arguments.max_steps = 10 + arguments.process_index
check_same_everywhere(arguments)
dist.barrier()
"""


def run(launcher: tuple[str, ...], *line: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *launcher, *line], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "both_ranks.py"
    path.write_text(BOTH_RANKS)
    return str(path)


@pytest.mark.slow
def test_ranks_that_agree_go_on(script, tmp_path):
    result = run(TORCHRUN, script, str(tmp_path), "cpu", "agree")
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_ranks_with_different_arguments_stop_all_of_them(script, tmp_path):
    result = run(TORCHRUN, script, str(tmp_path), "cpu", "differ")
    assert result.returncode != 0
    assert "The ranks differ in `--max_steps`: 10 on rank 0, 11 on rank 1." in result.stderr


@pytest.mark.slow
@pytest.mark.skipif("CUDA_VISIBLE_DEVICES" in os.environ, reason="with GPUs the processes find each other")
def test_torchrun_without_gpus_and_without_use_cpu(script, tmp_path):
    result = run(TORCHRUN, script, str(tmp_path), "gpu", "agree")
    assert result.returncode != 0
    assert "2 processes were launched, but each would train alone" in result.stderr


@pytest.mark.slow
def test_accelerate_that_starts_one_process_for_two(script, tmp_path):
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2")
    result = run(launcher, script, str(tmp_path), "cpu", "agree")
    assert result.returncode != 0
    assert "`accelerate launch` was asked for 2 processes and started 1" in result.stderr


@pytest.mark.slow
def test_fsdp_that_would_be_ddp(tmp_path):
    program = tmp_path / "fsdp.py"
    program.write_text(
        "import sys\n"
        "from transformers import Trainer, TrainingArguments\n"
        "from tiny_models import tiny_sparse\n"
        "from recipe.launch import check_engine\n"
        "arguments = TrainingArguments(sys.argv[1], use_cpu=True, fsdp='full_shard', report_to=[])\n"
        "check_engine(Trainer(model=tiny_sparse('decoder'), args=arguments))\n"
    )
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, str(program), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert "FSDP was asked for, but on `cpu` Accelerate runs MULTI_CPU in its place" in result.stderr


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
