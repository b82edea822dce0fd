"""Exports that are killed, resumed, refused: nothing half at the target, and the bytes of an undisturbed run."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.stock import export
from processes import in_processes


SHARD = "10KB"  # so that there are many


@pytest.fixture
def saved(mixture, tmp_path):
    """Save a tiny mixture and return its folder."""

    def save(dense="llama", **fields):
        folder = tmp_path / "ours"
        mixture(dense, **fields).save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return save


def export_and_die(writes, source, target):
    """To run in a process of its own, killed when it has written so many tensors, and a list of what is finished."""
    write, calls = ShardWriter.write, []

    def write_or_die(self, *args):
        calls.append(args)
        if len(calls) > writes:
            while not any(json.loads(path.read_text()) for path in target.parent.glob(".stock.*/journal.json")):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, *args)

    ShardWriter.write = write_or_die
    export(source, target, max_shard_size=SHARD, resume=True)


def killed_after(writes, source, target):
    """The finished shards of an export that was killed when it had written so many tensors."""
    assert in_processes(1, export_and_die, writes, source, target) == [-signal.SIGKILL]
    return {path.name: path.stat().st_mtime_ns for path in shards_of(target)}


def shards_of(target):
    return target.parent.glob(f".{target.name}.*/content/*.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["llama", "qwen2"])
def test_killed_and_resumed(saved, tmp_path, dense):
    folder, whole, target = saved(dense), tmp_path / "whole", tmp_path / "stock"
    export(folder, whole, max_shard_size=SHARD)
    kept = {}
    for writes in (0, 12, 1, 20):
        finished = killed_after(writes, folder, target)
        assert not target.exists()
        assert kept.items() <= finished.items()  # a finished shard is not written again
        kept = finished
    assert 2 < len(kept) < len(list(whole.glob("*.safetensors")))
    export(folder, target, max_shard_size=SHARD, resume=True)
    assert {name: (target / name).stat().st_mtime_ns for name in kept} == kept
    assert {path.name for path in target.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "whole", "stock"}


def test_resume_only_with_the_same_arguments_and_source(saved, tmp_path):
    folder, target = saved(), tmp_path / "stock"
    kept = killed_after(12, folder, target)
    with pytest.raises(ValueError, match=r"`architecture` was 'mixtral' and is 'qwen2_moe'.*without `resume`"):
        export(folder, target, "qwen2_moe", max_shard_size=SHARD, resume=True)
    with pytest.raises(ValueError, match=r"`max_shard_size` was '10KB' and is '4GB'"):
        export(folder, target, resume=True)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"`model.safetensors` was '[0-9a-f]{64}'"):
        export(folder, target, max_shard_size=SHARD, resume=True)
    assert kept == {path.name: path.stat().st_mtime_ns for path in shards_of(target)}
    export(folder, target)  # afresh
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "stock"}
    assert [path.name for path in target.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_model_in_memory_cannot_be_resumed(mixture, tmp_path):
    with pytest.raises(ValueError, match="`resume=True` is not allowed with a model in memory"):
        export(mixture("llama"), tmp_path / "stock", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_source_that_changes_while_it_is_read(saved, tmp_path, monkeypatch):
    folder, write = saved(), ShardWriter.write

    def change_then_write(self, *args):
        os.utime(folder / "model.safetensors", ns=(0, time.time_ns()))
        return write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", change_then_write)
    with pytest.raises(ValueError, match=r"`ours` changed while it was read"):
        export(folder, tmp_path / "stock")
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_a_disk_too_small(saved, mixture, tmp_path, monkeypatch):
    folder = saved()
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    for source in (folder, mixture("llama")):
        with pytest.raises(OSError, match=r"needs 0\.. MB and its disk has 0\.0 MB left"):
            export(source, tmp_path / "stock")
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_progress_is_shown_on_stderr(saved, tmp_path, capsys):
    export(saved(), tmp_path / "stock", show_progress=True)
    shown = capsys.readouterr()
    assert "kB" in shown.err
    assert shown.out == ""


def test_a_dtype_without_tensors_is_refused_by_name(saved, tmp_path):
    folder = saved()
    weights = load_file(folder / "model.safetensors")
    name = "dense.model.norm.weight"
    save_file({**weights, name: weights[name].to(torch.complex64)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"`{name}` is stored as C64"):
        export(folder, tmp_path / "stock")
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}
