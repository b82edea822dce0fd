"""Trainings on several ranks."""

import json
import logging

import pytest

from monitored_training import train_as_a_rank
from processes import in_processes


@pytest.fixture
def train_on_two_ranks(tmp_path):
    """`train_on_two_ranks(family, fields, bias=False, **arguments)`: what the first of two gloo processes logged."""

    def run(family: str, fields: dict, bias: bool = False, **arguments) -> dict:
        assert in_processes(2, train_as_a_rank, tmp_path, family, fields, bias, **arguments) == [0, 0]
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
        assert first["world_size"] == 2
        return first | {"biases": [first["biases"], second["biases"]]}

    return run


@pytest.fixture
def warnings_of_ours(caplog, monkeypatch):
    """The warnings of hf_sparse_moe so far; reading them empties the list."""
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    caplog.set_level(logging.WARNING)

    def read():
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("hf_sparse_moe")]
        caplog.clear()
        return messages

    return read
