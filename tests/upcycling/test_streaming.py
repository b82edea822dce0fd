"""Streaming gives the bits of the in-memory path, and survives being killed."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from hf_sparse_moe import upcycle
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.folder import new_folder, write_checkpoint
from hf_sparse_moe.checkpoints.reader import TensorFiles
from hf_sparse_moe.checkpoints.writer import DTYPE_NAMES, ShardWriter
from pairwise import pairwise
from processes import in_processes, kill_at_file
from tiny_models import tiny_dense


METHODS = [
    {"method": "copy"},
    {"method": "copy", "norm_topk_prob": False, "layers": "last_1"},
    {"method": "noise", "seed": 3},
    {"method": "drop", "seed": 1, "drop_ratio": 0.3},
    {"method": "split"},
    {"method": "partition", "partition": "contiguous"},
    {"method": "partition", "partition": "random", "seed": 2},
    {"method": "partition", "partition": "k_means", "shared_units": 16},
    {"method": "graft", "moe_intermediate_size": 12},
]


@pytest.fixture
def dense(tmp_path):
    """Save a tiny dense model, with what else a checkpoint holds, and return its folder."""

    def save(name, *args, dtype=torch.float32, **save_arguments):
        folder = tmp_path / "dense"
        tiny_dense(name, *args).to(dtype).save_pretrained(folder, **save_arguments)
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "LICENSE").write_text("free")
        return folder

    return save


def tensors_of(folder):
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def assert_same_checkpoint(streamed, saved):
    here, there = tensors_of(streamed), tensors_of(saved)
    assert here.keys() == there.keys()
    for key, tensor in here.items():
        assert tensor.dtype == there[key].dtype, key
        assert torch.equal(tensor, there[key]), key
    others = {path.name for path in saved.iterdir() if "safetensors" not in path.name}
    assert others == {path.name for path in streamed.iterdir() if "safetensors" not in path.name}
    for name in others - {"receipt.json"}:
        assert (streamed / name).read_bytes() == (saved / name).read_bytes(), name
    receipts = [json.loads((folder / "receipt.json").read_text()) for folder in (streamed, saved)]
    assert receipts[0].pop("equality") == {"note": "not measured here: run `hf-sparse-moe verify`"}
    receipts[1].pop("equality")
    assert receipts[0] == receipts[1]


def both_ways(folder, tmp_path, max_shard_size="20KB", **arguments):
    arguments = {"num_experts": 4, **arguments}
    streamed, saved = tmp_path / "streamed", tmp_path / "saved"
    upcycle(folder, output=streamed, max_shard_size=max_shard_size, **arguments)
    write_checkpoint(upcycle(str(folder), **arguments), saved, folder, max_shard_size=max_shard_size)
    assert_same_checkpoint(streamed, saved)
    assert [path.name for path in tmp_path.glob(".*")] == []
    return streamed


@pairwise("name,arguments", ["llama", "gpt2", "bert"], METHODS, strength=1)
def test_same_bits_for_every_method(name, arguments, dense, tmp_path):
    both_ways(dense(name), tmp_path, **arguments)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "bart", "modernbert", "phi3", "opt", "falcon"])
def test_same_bits_for_every_layout(name, dense, tmp_path):
    both_ways(dense(name), tmp_path, method="noise")


@pairwise("name,stored,asked", ["t5", "llama"], ["bfloat16", "float32", "float16"], ["auto", "bfloat16"], strength=1)
def test_same_bits_in_every_dtype(name, stored, asked, dense, tmp_path):
    asked = asked if asked == "auto" else getattr(torch, asked)
    both_ways(dense(name, dtype=getattr(torch, stored)), tmp_path, method="drop", dtype=asked)


def test_sharded_source(dense, tmp_path):
    folder = dense("llama", max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    both_ways(folder, tmp_path)


def test_other_files_in_the_folder_are_not_weights(dense, tmp_path):
    folder = dense("llama")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "consolidated.safetensors")
    both_ways(folder, tmp_path)


def test_one_file_where_it_fits(dense, tmp_path):
    streamed = both_ways(dense("bert"), tmp_path, max_shard_size="4GB")
    assert [path.name for path in streamed.glob("*.safetensors*")] == ["model.safetensors"]


def test_headless_checkpoint(dense, tmp_path):
    streamed = both_ways(dense("bert", hf.AutoModel), tmp_path)
    assert json.loads((streamed / "config.json").read_text())["architectures"] == ["SparseMoeEncoderModel"]


def rename(folder, new_name):
    state = load_file(folder / "model.safetensors")
    save_file({new_name(key): tensor for key, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


def test_names_of_old_checkpoints(dense, tmp_path):
    folder = dense("bert")
    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rename(folder, lambda key: next((key.replace(new, old) for new, old in renamed.items() if new in key), key))
    assert any("gamma" in name for name in TensorFiles([folder / "model.safetensors"]).names)
    both_ways(folder, tmp_path)


def test_missing_base_model_prefix(dense, tmp_path):
    folder = dense("gpt2")
    rename(folder, lambda key: key.removeprefix("transformer."))
    both_ways(folder, tmp_path)


def test_tied_weights_under_their_other_name(dense, tmp_path):
    folder = dense("gpt2")
    rename(folder, lambda key: key.replace("transformer.wte.weight", "lm_head.weight"))
    both_ways(folder, tmp_path)


def add_head(folder, factor):
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = factor * state["transformer.wte.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_tied_weights_stored_twice(dense, tmp_path):
    folder = dense("gpt2")
    add_head(folder, 1)
    streamed = both_ways(folder, tmp_path)
    assert "dense.lm_head.weight" not in tensors_of(streamed)


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr("hf_sparse_moe.upcycling.mixtures.logger.warning", lines.append)
    return lines


def test_what_cannot_be_streamed_is_upcycled_in_memory(dense, tmp_path, log):
    folder = dense("gpt2")
    add_head(folder, 2)
    receipt = upcycle(folder, 4, output=tmp_path / "a").receipt
    assert receipt["equality"]["max_abs_difference"] < 1e-4
    assert "differ" in log.pop()
    data = [torch.arange(5, 45).reshape(2, 20)]
    upcycle(folder, 4, output=tmp_path / "b", method="partition", partition="activation", data=data)
    assert "`data`" in log.pop()
    upcycle(output=tmp_path / "c", method="branches", sources=[str(folder), folder])
    assert "`sources`" in log.pop()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    upcycle(folder, 4, output=tmp_path / "d", allow_pickle=True)
    assert "no safetensors" in log.pop()
    assert not log


def test_mixture_loads_and_computes_what_the_dense_model_computes(dense, tmp_path):
    folder = dense("llama")
    upcycle(folder, 4, output=tmp_path / "out", max_shard_size="20KB")
    ids = torch.arange(5, 25).reshape(1, 20)
    models = [hf.AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "out")]
    torch.testing.assert_close(*[model(ids).logits for model in models], rtol=1e-5, atol=1e-5)


# ---- interruptions --------------------------------------------------------------------------------------------------


def stream(source, target, kill_at=None, **arguments):
    """To run in a process of its own, killed at the `kill_at`-th file in the folder where it works."""
    if kill_at is not None:
        kill_at_file(target.with_name(f".{target.name}."), kill_at)
    upcycle(source, 8, output=target, method="drop", max_shard_size="4KB", **arguments)


def journal_of(folder):
    """What the call that was ended in `folder` can be resumed from; nothing where it was ended before that."""
    return {key: value for path in folder.glob(".out.*/journal.json") for key, value in read_json(path).items()}


@pytest.mark.slow
def test_killed_at_any_file(tmp_path):
    folder, target = tmp_path / "dense", tmp_path / "out"
    tiny_dense("llama", num_hidden_layers=16).save_pretrained(folder)
    stream(folder, tmp_path / "whole")
    chance, kept, resumed = random.Random(0), {}, 0
    for _ in range(5):
        assert in_processes(1, stream, folder, target, chance.randrange(200), resume=True) == [-signal.SIGKILL]
        assert not target.exists()
        finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".out.*/content/*.safetensors")}
        assert kept.items() <= finished.items()  # a finished shard is not written again
        resumed += bool(kept)
        kept = finished if journal_of(tmp_path) else {}
    assert resumed
    stream(folder, target, resume=True)
    assert not list(tmp_path.glob(".*"))
    for path in (tmp_path / "whole").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.fixture
def interrupted(dense, tmp_path, monkeypatch):
    """A stream that a person ended after some shards: its source and target."""
    folder, target = dense("llama"), tmp_path / "out"

    def interrupt():
        monkeypatch.setattr("hf_sparse_moe.upcycling.streaming.copy_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            upcycle(folder, 4, output=target, max_shard_size="20KB")
        monkeypatch.undo()

    def stop(*_):
        raise KeyboardInterrupt

    interrupt()
    assert not target.exists()
    assert journal_of(tmp_path)
    return folder, target


def test_resume_only_with_the_same_arguments(interrupted, tmp_path):
    folder, target = interrupted
    before = sorted(tmp_path.glob(".out.*/**/*"))
    with pytest.raises(ValueError, match=r"`seed` was 0 and is 1.*without `resume`"):
        upcycle(folder, 4, output=target, seed=1, max_shard_size="20KB", resume=True)
    with pytest.raises(ValueError, match=r"`max_shard_size` was '20KB'"):
        upcycle(folder, 4, output=target, resume=True)
    assert sorted(tmp_path.glob(".out.*/**/*")) == before


def test_resume_only_with_the_same_source(interrupted):
    folder, target = interrupted
    state = load_file(folder / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"`model.safetensors` was '[0-9a-f]{64}'"):
        upcycle(folder, 4, output=target, max_shard_size="20KB", resume=True)


def test_without_resume_it_starts_afresh(interrupted, tmp_path):
    folder, target = interrupted
    upcycle(folder, 4, output=target, seed=1, max_shard_size="1MB")
    assert [path.name for path in target.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob(".*"))


def test_two_writers_of_one_target(dense, tmp_path):
    folder, target = dense("llama"), tmp_path / "out"
    with new_folder(target) as work:
        (work / "here").write_text("first")
        with pytest.raises(OSError, match="Another process is writing"):
            upcycle(folder, 4, output=target)
        assert (work / "here").exists()


@pytest.mark.parametrize("change", ["grows", "is replaced", "is cut"])
def test_source_that_changes_while_read(change, dense, tmp_path, monkeypatch):
    folder = dense("llama")
    weights = folder / "model.safetensors"
    write, calls = ShardWriter.write, []

    def change_then_write(self, *args):
        calls.append(args)
        if len(calls) == 3:
            if change == "grows":
                with weights.open("ab") as file:
                    file.write(b"more")
            elif change == "is replaced":
                shutil.copyfile(weights, folder / "new")
                os.replace(folder / "new", weights)
            else:
                os.truncate(weights, 20_000)
        return write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", change_then_write)
    with pytest.raises(ValueError, match=r"changed while it was read|cut short"):
        upcycle(folder, 4, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_disk_too_small(dense, tmp_path, monkeypatch):
    folder = dense("llama")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match=r"needs 0\.. MB and its disk has 0\.0 MB left"):
        upcycle(folder, 4, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_missing_and_misshapen_weights(dense, tmp_path):
    folder = dense("llama")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**state, name: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"`{name}` has the shape \[3, 3\]"):
        upcycle(folder, 4, output=tmp_path / "out")
    del state[name]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks weights.*{name}"):
        upcycle(folder, 4, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


# ---- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_what_is_written_is_read_by_safetensors(dtype, tmp_path):
    tensors = {
        "odd": torch.tensor([1, 0, 1]).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "matrix": torch.ones(5, 7).to(dtype),
        "float": torch.randn(3, 3, dtype=torch.float64),
    }
    writer = ShardWriter(tmp_path, {key: tensor.to("meta") for key, tensor in tensors.items()}, "1MB")
    writer.write("matrix", tensors["matrix"][2:], 2 * 7 * dtype.itemsize)
    for key in ("float", "scalar", "empty", "odd"):
        writer.write(key, tensors[key])
    assert not (tmp_path / "model.safetensors").exists()
    writer.write("matrix", tensors["matrix"][:2])
    writer.close()
    read = load_file(tmp_path / "model.safetensors")
    files = TensorFiles([Path(tmp_path / "model.safetensors")])
    for key, tensor in tensors.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key].double(), tensor.double())
        memory = torch.empty(1000, dtype=torch.uint8)
        assert torch.equal(files.read(key, torch.float32, memory), tensor.float())
