"""Several processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "monitored_training.py"


@pytest.fixture
def train_on_two_ranks(tmp_path):
    """`train_on_two_ranks(family, fields, bias=False, **arguments)`: what the first of two gloo processes logged."""

    def run(family: str, fields: dict, bias: bool = False, **arguments) -> dict:
        spec = json.dumps({"family": family, "fields": fields, "bias": bias, "arguments": arguments})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, str(SCRIPT), str(tmp_path), spec], env=environment, capture_output=True, text=True, timeout=200
        )
        assert result.returncode == 0, result.stderr[-4000:]
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
        assert first["world_size"] == 2
        return first | {"biases": [first["biases"], second["biases"]]}

    return run
