"""Importing the package costs nothing, and transformers knows it whichever of the two was imported first."""

import subprocess
import sys
from pathlib import Path

import pytest

import hf_sparse_moe
from tiny_models import tiny_sparse


CASES = (
    "help_of_every_command",
    "ours_first",
    "transformers_first",
    "from_the_middle_of_transformers",
    "from_the_middle_of_ours_without_extras",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "mixture"
    tiny_sparse("llama").save_pretrained(folder)
    command = [sys.executable, Path(__file__).with_name("start_worker.py"), folder]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("case", CASES)
def test_in_a_fresh_process(finished, case):
    assert f"{case} passed" in finished.stdout.splitlines(), finished.stderr


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_sparse_moe.nothing  # noqa: B018
