"""What every test stands on: one seed, one thread, poisoned fresh memory, its own Hugging Face home, real data."""

import gc
import os
import shutil
import tempfile
from pathlib import Path


# Both are read when torch and huggingface_hub are imported. No test reads or writes a person's own cache or token.
os.environ.setdefault("OMP_NUM_THREADS", "1")
HF_HOME = tempfile.mkdtemp(prefix="hf_home_")
os.environ["HF_HOME"] = HF_HOME
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Neither a test nor a process that it starts chooses by the clock how to compute; tests of that choice do.
os.environ["HF_SPARSE_MOE_MEASURE"] = "0"

import hypothesis
import pytest
import torch
from transformers import set_seed


# How long a machine that others use takes to draw an example says nothing of the code. The examples are the same in
# every run, so that what passed here passes in CI; `--hypothesis-profile=explore` draws others.
PATIENT = {"suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("explore", **PATIENT)
hypothesis.settings.register_profile("repeat", derandomize=True, **PATIENT)
hypothesis.settings.load_profile("repeat")

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
DATA = Path(os.environ.get("SPARSE_MOE_DATA") or REPOSITORY.parent / "shared" / "data")


# Of these, nearly every test trains, starts processes or kills one: `make test-slow`.
SLOW = [TESTS / name for name in ("training", "distributed", "quickstart", "ecosystem", "test_quality.py")]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(place) for place in SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What was imported stays. accelerate collects garbage around each training, 0.3 s if it looks at all of that."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()
    shutil.rmtree(HF_HOME, ignore_errors=True)


def require_data(*names: str) -> None:
    """Skip where the data sets `names` are absent; fail instead where CI said that they must be there."""
    missing = [str(DATA / name) for name in names or ("",) if not (DATA / name).exists()]
    if missing and os.environ.get("SPARSE_MOE_REQUIRE_DATA") == "1":
        pytest.fail(f"SPARSE_MOE_REQUIRE_DATA=1, but there is no {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs real data: no {', '.join(missing)}; set SPARSE_MOE_DATA to its folder")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs_data"):
        require_data(*marker.args)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real public data sets; a test that asks for it is skipped where there is none."""
    require_data()
    return DATA


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """`torch.empty` and its kin return NaN (integers: their maximum), so that a weight nobody initialised cannot hide.

    torch fills fresh memory only where deterministic algorithms are asked for; `warn_only` keeps the others usable.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in each test, in whatever order and process it runs."""
    set_seed(0)


@pytest.fixture(autouse=True)
def half_precision(monkeypatch):
    """A CPU with instructions for bf16, as far as the experts know, on whatever machine the tests run."""
    monkeypatch.setattr("hf_sparse_moe.experts.choice.cpu_flags", frozenset)
