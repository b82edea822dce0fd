"""`--distributed_config`: a recipe saves, and goes on from, a model that no process holds whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from hf_sparse_moe.distributed.checkpoint import find_last_checkpoint
from processes import in_processes
from training_runs import command_line, run_as_main


STEPS = 4


@pytest.mark.slow
def test_an_expert_parallel_run_goes_on(checkpoints, files, tmp_path):
    folders = {name: tmp_path / name for name in ("whole", "parts")}
    for name, max_steps in (("whole", STEPS), ("parts", STEPS // 2), ("parts", STEPS)):
        line = command_line(
            {
                "model_name_or_path": checkpoints["decoder"], "train_file": files["docs.jsonl"],
                "output_dir": folders[name], "distributed_config": '{"fsdp_size": 2, "ep_size": 2}',
                "max_steps": max_steps, "save_steps": STEPS // 2, "lr_scheduler_type": "constant",
                "learning_rate": 1e-2, "validation_percentage": 0, "report_to": "none",
            }
        )  # fmt: skip
        assert in_processes(2, run_as_main, "run_clm.py", line) == [0, 0]
    for folder in folders.values():
        last = Path(find_last_checkpoint(folder))
        assert last.name == f"checkpoint-{STEPS}"
        assert len(list(last.glob("shard-*.safetensors"))) == 2
    whole, parts = (load_file(folder / "model.safetensors") for folder in folders.values())
    assert_close(parts, whole, rtol=0, atol=0)
