"""Under DDP and FSDP2, two gloo processes have the gradients that one process has on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experts.parallel_worker import BACKENDS, WRAPPERS, batch, gradients, make_model


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "gradients.pt"
    worker = Path(__file__).with_name("parallel_worker.py")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, out]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    found = torch.load(out)
    assert found["world_size"] == 2
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrapper", [wrapper.__name__ for wrapper in WRAPPERS])
def test_two_processes_have_the_gradients_of_one(two_processes, wrapper, backend):
    model = make_model()
    model.set_experts_implementation("eager")
    found, expected = two_processes[wrapper, backend], gradients(model, batch(model))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7 + 1e-5 * value.abs().max().item())
