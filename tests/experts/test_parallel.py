"""Under DDP and FSDP2, two gloo processes have the gradients that one process has on the whole batch."""

import pytest
import torch

from experts.parallel_worker import BACKENDS, WRAPPERS, batch, gradients, gradients_of_a_rank, make_model
from processes import in_processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "gradients.pt"
    assert in_processes(2, gradients_of_a_rank, out) == [0, 0]
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
