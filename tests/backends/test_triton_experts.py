"""The CUDA backend, run by Triton's interpreter: equal to the plain backend, gradients too."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed here", allow_module_level=True)

WORKER = Path(__file__).with_name("triton_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """The interpreter is chosen when Triton is imported, so it runs in a process of its own."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(WORKER), str(path)], check=True, env=environment, timeout=600)
    return torch.load(path)


CASES = ["gated", "plain", "gated_biased", "plain_biased", "transposed", "sigmoid_gate", "dropout"]


@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_plain_backend(results, case):
    for name, (ours, plain) in results[case].items():
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ["bfloat16", "float16", "autocast"])
def test_half_precision_is_near_float32(results, case):
    for name, (ours, float32) in results[case].items():
        error = (ours.float() - float32).norm() / float32.norm().clamp(min=1e-6)
        assert error < 2e-2, (name, error)


@pytest.mark.parametrize("case", ["one_expert_takes_all", "empty_experts", "one_expert", "all_experts", "one_token"])
def test_uneven_loads(results, case):
    for name, (ours, plain) in results[case].items():
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_experts_of_another_rank_add_nothing(results):
    for ours, expected in results["expert_parallel"].values():
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_no_tokens(results):
    assert results["no_tokens"]["output"][0].shape == (0, 24)


def test_stock_mixtral_trains_with_it(results):
    for name, (ours, plain) in results["mixtral"].items():
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_cpu_tensor_without_the_interpreter_is_refused():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import hf_sparse_moe.backends  # noqa: F401
    from tiny_models import tiny_inputs, tiny_sparse

    model = tiny_sparse("llama")
    assert "triton_mm" in ALL_EXPERTS_FUNCTIONS
    plain = copy.deepcopy(model)
    model.set_experts_implementation("triton_mm")
    with pytest.raises(ValueError, match="runs on CUDA"):
        model(**tiny_inputs(plain))
