"""Each operation is killed, also while it measures losses, and goes on from what is finished when called again."""

import json
import os
import signal

import pytest
import torch

from hf_sparse_moe import measure_experts, merge_experts, prune_experts, to_dense
from processes import in_processes, kill_at_file
from routing.test_mixture_layers import build
from tiny_models import tiny_inputs, tiny_sparse


OPERATIONS = {
    "pruned": lambda source, measured, **settings: prune_experts(source, measured, keep=3, **settings),
    "merged": lambda source, measured, **settings: merge_experts(source, measured, into=3, **settings),
    "to_dense": lambda source, measured, **settings: to_dense(source, measured, "merge", **settings),
}


class Fatal(list):
    """Batches whose reader is killed."""

    def __iter__(self):
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__iter__()


def operate(operation, source, target, kill_at=None, batches=list, **settings):
    if isinstance(kill_at, int):
        kill_at_file(target.with_name(f".{target.name}."), kill_at)
    texts = batches([{"input_ids": torch.arange(24).reshape(2, 12)}])
    settings |= {"max_shard_size": "4KB", "evaluation": (texts, ["law", "code"])}
    OPERATIONS[operation](source, source.with_name("measured"), output=target, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "stock"), [*((name, False) for name in OPERATIONS), ("to_dense", True)])
def test_killed_and_resumed(operation, stock, tmp_path):
    source, target, whole = tmp_path / "mixture", tmp_path / "out", tmp_path / "whole"
    model = build("mixtral").eval() if stock else tiny_sparse("llama")
    model.save_pretrained(source)
    measure_experts(model, [tiny_inputs(model, batch=8, length=16)]).save(tmp_path / "measured")
    operate(operation, source, whole)
    killed = [-signal.SIGKILL]
    for kill_at in (10, 22):
        assert in_processes(1, operate, operation, source, target, kill_at, resume=True) == killed
    finished = shards(tmp_path, target)
    assert 0 < len(finished) < len([*whole.glob("*.safetensors")])
    assert in_processes(1, operate, operation, source, target, batches=Fatal, resume=True) == killed
    assert not target.exists()
    operate(operation, source, target, resume=True)
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.suffix != ".md"} == {
        path.name: path.read_bytes() for path in whole.iterdir() if path.suffix != ".md"
    }
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in target.iterdir()}.items()
    loss = json.loads((target / "receipt.json").read_text())[operation]["loss"]
    assert loss.keys() == {"law", "code", "all"}
    assert not [*tmp_path.glob(".out*")]


def shards(folder, target):
    """When each finished file of weights was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(f".{target.name}.*/content/*.safetensors")}


def test_other_arguments_are_not_gone_on_with(tmp_path):
    source, target = tmp_path / "mixture", tmp_path / "out"
    model = tiny_sparse("llama")
    model.save_pretrained(source)
    measure_experts(model, [tiny_inputs(model, batch=8, length=16)]).save(tmp_path / "measured")
    assert in_processes(1, operate, "pruned", source, target, 40, resume=True) == [-signal.SIGKILL]
    with pytest.raises(ValueError, match=r"cannot be resumed: .*`method` was 'reap' and is 'random'"):
        prune_experts(source, keep=3, method="random", output=target, max_shard_size="4KB", resume=True)
