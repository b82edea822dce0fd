"""Killed at any moment and started again, a training ends as one that nothing disturbed, bit for bit."""

import random
import signal

import pytest
import torch

from distributed.recovery_runs import STEPS, Kill, Run, facts, final_weights, train
from hf_sparse_moe.distributed.checkpoint import INCOMPLETE_NAME, find_last_checkpoint
from processes import in_processes


# Each engine with what it may lose: the selection bias, the load of the global batch, the random state of dropout.
RANDOM = {"expert_dropout": 0.1, "router_jitter_noise": 0.1}
BIAS = {"scoring_func": "sigmoid", "router_aux_loss_coef": 0.0, **RANDOM}
GLOBAL = {"balance_scope": "global_batch", **RANDOM}
FULL = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}
RUNS = [
    pytest.param(Run("encoder", fields=GLOBAL), (0,), marks=pytest.mark.conformance),
    (Run("decoder", fields=BIAS), (0,)),
    pytest.param(Run("encoder_decoder", fields=RANDOM), (0,), marks=pytest.mark.conformance),
    (Run("decoder", lora=True, fields=RANDOM), (0,)),
    (Run("encoder", "ddp", 2, fields=GLOBAL), (0,)),
    pytest.param(Run("decoder", "ddp", 2, fields=BIAS), (1,), marks=pytest.mark.conformance),
    (Run("encoder_decoder", "ddp", 2, fields=RANDOM), (0, 1)),
    pytest.param(Run("decoder", "ddp", 2, lora=True, fields=RANDOM), (0, 1), marks=pytest.mark.conformance),
    pytest.param(Run("decoder", "fsdp2", 2, fields=GLOBAL), (0,), marks=pytest.mark.conformance),
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
def test_killed_again_and_again_at_any_file(tmp_path):
    """In the middle of checkpoints too, which are written after each step here."""
    run = Run("decoder", fields=BIAS, arguments={"save_steps": 1, "save_total_limit": 1})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_processes(1, train, run, whole) == [0]
    chance, incomplete, last = random.Random(0), 0, None
    for _ in range(12):
        codes = in_processes(1, train, run, killed, resume=last, kill_at=chance.randrange(80))
        incomplete += len(list(killed.glob(f"checkpoint-*/{INCOMPLETE_NAME}")))
        earlier, last = last, find_last_checkpoint(killed)
        assert step_of(last) >= step_of(earlier)  # no kill costs the last whole one
        if codes == [0]:
            break
        assert codes == [-signal.SIGKILL]
    assert incomplete > 0
    assert in_processes(1, train, run, killed, resume=last) == [0]
    assert_same(whole, killed, run)


def step_of(checkpoint):
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
