"""A checkpoint of two ranks goes on with one, and the other way round, with the numbers of an undisturbed training."""

import signal

import pytest
import torch

from distributed.recovery_runs import Kill, Run, facts, final_weights, train
from hf_sparse_moe.distributed.checkpoint import find_last_checkpoint
from pairwise import pairwise
from processes import in_processes


# The load of the global batch, so that one process and two have the same loss; no random numbers, which are a rank's.
FIELDS = {"balance_scope": "global_batch"}


@pairwise("engine,ranks", ["ddp", "fsdp2"], [(2, 1), (1, 2)], strength=1)
def test_a_training_goes_on_with_another_number_of_ranks(engine, ranks, tmp_path):
    first, second = ranks
    runs = {
        count: Run("decoder", engine, count, fields=FIELDS, arguments={"gradient_accumulation_steps": 1})
        for count in ranks
    }
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert in_processes(first, train, runs[first], whole) == [0] * first
    kill = Kill(5, "step", ranks=(0, 1))
    assert in_processes(first, train, runs[first], moved, kill=kill) == [-signal.SIGKILL] * first
    assert in_processes(second, train, runs[second], moved, resume=find_last_checkpoint(moved)) == [0] * second
    assert facts(moved)["world_size"] == second
    expected, found = final_weights(whole), final_weights(moved)
    assert expected.keys() == found.keys()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    losses = [[line["loss"] for line in facts(folder)["log"] if "loss" in line] for folder in (whole, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
