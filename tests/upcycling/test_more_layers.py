"""A mixture grows by layers, in memory and from disk to disk, and goes on computing what it computed."""

import json
import signal

import pytest
import torch

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe import upcycle
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.upcycling import verify
from processes import in_processes, kill_at_file
from tiny_models import enlarge_weights, tiny_dense, tiny_inputs, tiny_sparse


def grown_block_of(grown, first) -> str:
    known = [name for name, module in first.named_modules() if module in first.sparse_blocks]
    return next(name for name, module in grown.named_modules() if module in grown.sparse_blocks and name not in known)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_more_layers_keep_the_function(name, tmp_path):
    kinds = {"encoder": [1], "decoder": [0]} if name == "bart" else [1]
    more = {"encoder": [0]} if name == "bart" else [0]
    first = upcycle(tiny_dense(name), num_experts=3, layers=kinds)
    with torch.no_grad():  # what was trained stays
        for block in first.sparse_blocks:
            block.experts.down_proj.add_(0.1 * torch.randn_like(block.experts.down_proj))
            block.gate.weight.normal_()
    grown = upcycle(first, layers=more, seed=7)
    assert len(grown.sparse_blocks) == len(first.sparse_blocks) + 1
    inputs = tiny_inputs(first)
    torch.testing.assert_close(grown(**inputs).logits, first(**inputs).logits)
    kept = grown.state_dict()
    for key, tensor in first.state_dict().items():
        assert key not in kept or torch.equal(kept[key], tensor), key
    grown.save_pretrained(tmp_path / "grown")
    loaded = type(grown).from_pretrained(tmp_path / "grown")
    assert torch.equal(loaded(**inputs).logits, grown(**inputs).logits)
    assert loaded.receipt["more_layers"]["layers"] == [grown_block_of(grown, first)]
    assert loaded.receipt["arguments"]["method"] == "copy"


def test_refusals():
    mixture = tiny_sparse("llama", mlp_layer_types=["dense", "sparse"])
    with pytest.raises(ValueError, match="mixture already"):
        upcycle(mixture, layers=[1])
    with pytest.raises(ValueError, match="`layers` and `seed` alone"):
        upcycle(mixture, num_experts=4)
    with pytest.raises(ValueError, match="experts of this method have 48"):
        upcycle(tiny_sparse("llama", mlp_layer_types=["dense", "sparse"], moe_intermediate_size=24))
    with pytest.raises(ValueError, match="shared experts"):
        upcycle(tiny_sparse("llama", mlp_layer_types=["dense", "sparse"], num_shared_experts=1))


HALF = {"llama": {"mlp_layer_types": ["sparse", "dense"]}, "bert": {"mlp_layer_types": ["sparse", "dense"]}}
HALF["t5"] = {"encoder_mlp_layer_types": ["sparse", "dense"], "decoder_mlp_layer_types": ["dense", "sparse"]}


@pytest.mark.parametrize("name", HALF)
def test_on_disk_as_in_memory(name, tmp_path):
    dtype = torch.bfloat16 if name == "llama" else torch.float32
    scoring = {"scoring_func": "sigmoid"} if name == "llama" else {}  # its bias stays in float32
    model = enlarge_weights(tiny_sparse(name, **HALF[name], **scoring)).to(dtype)
    model.save_pretrained(tmp_path / "half")
    half = load_whole(tmp_path / "half")
    layers = {"encoder": "all", "decoder": [0]} if name == "t5" else "all"
    report = upcycle(tmp_path / "half", layers=layers, seed=5, output=tmp_path / "whole", max_shard_size="20KB")
    expected, streamed = upcycle(half, layers=layers, seed=5), load_whole(tmp_path / "whole")
    assert streamed.config.to_diff_dict() == expected.config.to_diff_dict()
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 1
    pairs = zip(expected.state_dict().items(), streamed.state_dict().items(), strict=True)
    for (key, tensor), (other, read) in pairs:
        assert (key, tensor.dtype) == (other, read.dtype)
        assert torch.equal(tensor, read), key
    verified = verify(tmp_path / "whole", tmp_path / "half")
    assert verified.passed, verified.findings
    assert verified.promised
    assert report.receipt["more_layers"]["source"]["architecture"] == type(model).__name__
    loaded = upcycle(tmp_path / "half", layers=layers, seed=5)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in expected.state_dict().items())


def test_command_says_what_was_added(tmp_path):
    half = enlarge_weights(tiny_sparse("llama", **HALF["llama"]))
    half.save_pretrained(tmp_path / "half")
    finished = run_cli("upcycle", tmp_path / "half", tmp_path / "whole", "--layers", "last_1", "--json")
    assert finished.code == 0, finished
    told = json.loads(finished.out)["receipt"]["more_layers"]
    assert (len(told["layers"]), told["exact"]) == (1, True)
    finished = run_cli("verify", tmp_path / "whole", "--against", tmp_path / "half")
    assert finished.code == 0, finished
    assert "more sparse layers" in finished.out
    finished = run_cli("upcycle", tmp_path / "half", tmp_path / "no", "--num-experts", 8)
    assert_one_sentence(finished, "`layers` and `seed` alone")
    assert not (tmp_path / "no").exists()


def test_verify_tells_what_was_not_copied(tmp_path):
    half = enlarge_weights(tiny_sparse("llama", **HALF["llama"]))
    half.save_pretrained(tmp_path / "half")
    grown = upcycle(half, layers="all")
    for part in ("layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj", "norm.weight"):
        changed = upcycle(half, layers="all")
        changed.receipt = grown.receipt
        with torch.no_grad():
            next(value for name, value in changed.named_parameters() if part in name).add_(1)
        changed.save_pretrained(tmp_path / part)
        assert not verify(tmp_path / part, tmp_path / "half").passed


def add_until_killed(source, target, kill_at=None, layers="all", **arguments):
    """To run in a process of its own, killed at the `kill_at`-th file in the folder where it works."""
    if kill_at is not None:
        kill_at_file(target.with_name(f".{target.name}."), kill_at)
    upcycle(source, layers=layers, output=target, max_shard_size="4KB", **arguments)


def test_killed_and_resumed(tmp_path):
    source, target, whole = tmp_path / "half", tmp_path / "out", tmp_path / "whole"
    tiny_sparse("llama", **HALF["llama"]).save_pretrained(source)
    add_until_killed(source, whole)
    for kill_at in (20, 45):
        assert in_processes(1, add_until_killed, source, target, kill_at, resume=True) == [-signal.SIGKILL]
        assert not target.exists()
    with pytest.raises(ValueError, match=r"cannot be resumed: .*`seed` was 0 and is 1"):
        add_until_killed(source, target, resume=True, seed=1)
    add_until_killed(source, target, resume=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
