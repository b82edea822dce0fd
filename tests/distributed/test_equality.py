"""Training on several processes gives the numbers of one: `benchmarks/equality.py`, the parts of it that are quick."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "equality.py"
WRAPPERS = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "families", "variants", "processes"),
    [
        ("ddp", ["encoder"], ["micro_batch", "global_batch"], 2),
        ("fsdp2", ["decoder"], ["accumulation"], 2),
        ("fsdp2_native", ["encoder_decoder"], ["accumulation"], 2),
        pytest.param("zero2", ["decoder"], ["accumulation"], 2, marks=needs_deepspeed),
        pytest.param("zero3", ["encoder_decoder"], ["accumulation"], 2, marks=needs_deepspeed),
        ("ep2", ["decoder"], ["accumulation", "checkpointing"], 2),
        ("tp", ["decoder"], ["micro_batch"], 4),
    ],
)
def test_several_processes_train_as_one(engine, families, variants, processes, tmp_path):
    out = tmp_path / "rows.json"
    chosen = ["--engines", engine, "--families", *families, "--variants", *variants, "--json", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *chosen], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    rows = json.loads(out.read_text())
    assert len(rows) == len(families) * len(variants)
    for row in rows:
        assert row["world_size"] == processes
        assert row["wrapper"].startswith(WRAPPERS.get(engine, "FSDP"))
        assert max(row["loss"], row["gradient"]) <= 1e-5
