"""Killed at any moment and started again, a training ends as one that nothing disturbed, bit for bit."""

import random
import signal
import time

import pytest
import torch

from distributed.recovery_runs import (
    PROCESSES,
    STEPS,
    Kill,
    Run,
    facts,
    final_weights,
    in_processes,
    train,
)
from hf_sparse_moe.distributed.checkpoint import find_last_checkpoint


# Each engine with what it may lose: the selection bias, the load of the global batch, the random state of dropout.
RANDOM = {"expert_dropout": 0.1, "router_jitter_noise": 0.1}
BIAS = {"scoring_func": "sigmoid", "router_aux_loss_coef": 0.0, **RANDOM}
GLOBAL = {"balance_scope": "global_batch", **RANDOM}
FULL = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
RUNS = [
    (Run("encoder", fields=GLOBAL), (0,)),
    (Run("decoder", fields=BIAS), (0,)),
    (Run("encoder_decoder", fields=RANDOM), (0,)),
    (Run("decoder", lora=True, fields=RANDOM), (0,)),
    (Run("encoder", "ddp", 2, fields=GLOBAL), (0,)),
    (Run("decoder", "ddp", 2, fields=BIAS), (1,)),
    (Run("encoder_decoder", "ddp", 2, fields=RANDOM), (0, 1)),
    (Run("decoder", "ddp", 2, lora=True, fields=RANDOM), (0, 1)),
    (Run("decoder", "fsdp2", 2, fields=GLOBAL), (0,)),
    (Run("decoder", "fsdp2", 2, fields=BIAS), (1,)),
    (Run("decoder", "fsdp2", 2, fields=BIAS, arguments=FULL), (0, 1)),
    (Run("decoder", "fsdp2", 2, lora=True, fields=RANDOM), (1,)),
]
WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}


def assert_same(whole, again, run):
    """The same weights and the same log: losses, gradient norms, learning rates, and the routers' health."""
    expected, found = final_weights(whole), final_weights(again)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert steps_logged(whole) == steps_logged(again)
    assert steps_logged(again)[-1]["step"] == run.arguments.get("max_steps", STEPS)
    for folder in (whole, again):
        assert facts(folder)["world_size"] == run.ranks
        assert facts(folder)["wrapper"].startswith(WRAPPERS.get(run.engine, ""))


def steps_logged(folder):
    log = [line for line in facts(folder)["log"] if "loss" in line]
    assert all("router/entropy" in line for line in log)
    return log


@pytest.mark.parametrize(
    ("run", "ranks"),
    RUNS,
    ids=lambda value: "kill" + "".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_a_killed_training_ends_as_an_undisturbed_one(run, ranks, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_processes(run.ranks, train, run, whole) == [0] * run.ranks
    chance = random.Random(str(run))
    kill = Kill(chance.randrange(4, STEPS), chance.choice(["forward", "step"]), ranks)
    codes = in_processes(run.ranks, train, run, killed, kill=kill)
    # The other ranks end in an error, and do not hang.
    assert codes == [-signal.SIGKILL if rank in ranks else 1 for rank in range(run.ranks)]
    assert not (killed / "final.pt").exists()
    last = find_last_checkpoint(killed)
    assert last is not None
    assert in_processes(run.ranks, train, run, killed, resume=last) == [0] * run.ranks
    assert_same(whole, killed, run)


@pytest.mark.slow
def test_killed_again_and_again_at_random_moments(tmp_path):
    """In the middle of checkpoints too, which are written after each step here."""
    run = Run("decoder", fields=BIAS, arguments={"save_steps": 1, "save_total_limit": 1})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_processes(1, train, run, whole) == [0]
    chance, incomplete = random.Random(0), 0
    for _ in range(20):
        last = find_last_checkpoint(killed) if killed.exists() else None
        process = PROCESSES.Process(target=train, args=(run, killed), kwargs={"resume": last})
        process.start()
        begun = len(list(killed.glob("checkpoint-*/model.safetensors")))
        while process.is_alive() and len(list(killed.glob("checkpoint-*/model.safetensors"))) == begun:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        incomplete += len(list(killed.glob("checkpoint-*/checkpoint-is-incomplete.txt")))
        assert last is None or find_last_checkpoint(killed) is not None  # no kill costs the last whole one
        if (killed / "final.pt").exists():
            break
    assert incomplete > 0
    assert in_processes(1, train, run, killed, resume=find_last_checkpoint(killed)) == [0]
    assert_same(whole, killed, run)
