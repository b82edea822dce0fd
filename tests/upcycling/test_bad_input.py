"""Bad input ends with one sentence and exit code 2, and leaves nothing at the target."""

import json
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch
import transformers as hf

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe import upcycle
from hf_sparse_moe.checkpoints.folder import new_folder, write_checkpoint
from hf_sparse_moe.cli.app import leave_on_signal
from tiny_models import tiny_dense


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources") / "llama"
    tiny_dense("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def source(llama, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(llama, tmp_path / "source")


@pytest.fixture
def workplace(tmp_path):
    """Where the target would be; a test must find it empty at the end."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("missing", ["/nowhere/model", "./nowhere", "nowhere", "a/b/c"])
def test_no_such_path(missing, workplace):
    assert_one_sentence(run_cli("upcycle", missing, workplace / "out"), f"`{missing}` is n", "a folder", "Hub")


def test_hub_id_out_of_reach(workplace, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_one_sentence(run_cli("upcycle", "nobody/nothing", workplace / "out"), "`nobody/nothing`", "Hub")


def test_sparse_already(llama, tmp_path, workplace):
    write_checkpoint(upcycle(str(llama), num_experts=2, num_experts_per_tok=1), tmp_path / "sparse")
    assert_one_sentence(run_cli("upcycle", tmp_path / "sparse", workplace / "out"), "mixture already", "Pass a dense")


@pytest.mark.parametrize(
    "config",
    [
        hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4),
        hf.RwkvConfig(vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2),
    ],
    ids=["mamba", "rwkv"],
)
def test_no_feed_forward_that_we_know(config, tmp_path, workplace):
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    assert_one_sentence(
        run_cli("upcycle", tmp_path / "source", workplace / "out"), "has no feed-forward of a known layout"
    )


def test_no_text_model(tmp_path, workplace):
    config = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    hf.ViTModel(config).save_pretrained(tmp_path / "source")
    assert_one_sentence(run_cli("upcycle", tmp_path / "source", workplace / "out"), "vit", "no text model")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_truncated_weights(kept, source, workplace):
    weights = source / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_one_sentence(run_cli("upcycle", source, workplace / "out"), "model.safetensors", "truncated or corrupt")


def test_weights_that_are_something_else(source, workplace):
    (source / "model.safetensors").write_text("<html>404: not found</html>" * 100)
    assert_one_sentence(run_cli("upcycle", source, workplace / "out"), "truncated or corrupt", "Fetch it again")


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_config_that_is_no_config(content, source, workplace):
    (source / "config.json").write_text(content)
    assert_one_sentence(run_cli("upcycle", source, workplace / "out"), "config")


def test_missing_weight(source, workplace):
    tensors = hf.AutoModelForCausalLM.from_pretrained(source).state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_one_sentence(run_cli("upcycle", source, workplace / "out"), "layers.1.mlp.up_proj.weight", "complete")


def test_pickle_only_when_asked_for(source, tmp_path, workplace):
    torch.save(hf.AutoModelForCausalLM.from_pretrained(source).state_dict(), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert_one_sentence(run_cli("upcycle", source, workplace / "out"), "pickle", "--allow-pickle")
    told = run_cli("prune", source, workplace / "out", "--drop", "0:1")
    assert_one_sentence(told, "pickle", "load and save it with transformers")
    assert "--allow-pickle" not in told.err
    assert run_cli("upcycle", source, tmp_path / "made", "--allow-pickle").code == 0
    assert (tmp_path / "made" / "model.safetensors").exists()


def test_target_is_taken(llama, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    assert_one_sentence(run_cli("upcycle", llama, taken), "not empty")
    assert_one_sentence(run_cli("upcycle", llama, taken / "thesis.txt"), "is a file")
    assert (taken / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "thesis.txt"]


def test_empty_target_is_fine(llama, tmp_path):
    (tmp_path / "out").mkdir()
    assert run_cli("upcycle", llama, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "sparse_moe_decoder"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--num-experts", 2, "--num-experts-per-tok", 3), ("num_experts_per_tok=3", "between 1 and `num_experts=2`")),
        (("--num-experts", 0), ("num_experts=0", "at least 1")),
        (("--method", "magic"), ("method='magic'", "copy")),
        (("--dtype", "int8"), ("`dtype='int8'`", "floating-point")),
    ],
)
def test_wrong_options(options, parts, llama, workplace):
    assert_one_sentence(run_cli("upcycle", llama, workplace / "out", *options), *parts)


@pytest.fixture
def small_files():
    """No file of this process may pass 20,000 bytes: the system then refuses a write as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_weights_do_not_fit(llama, workplace, small_files):
    assert_one_sentence(run_cli("upcycle", llama, workplace / "out"), "is full", "nothing was written")


def test_disk_fills(llama, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        # The weights alone would fit; the code that goes with them is what finds the disk full.
        assert_one_sentence(run_cli("upcycle", llama, disk / "out", "--num-experts", 4), "is full")
        assert list(disk.iterdir()) == []
        assert_one_sentence(run_cli("upcycle", llama, disk / "out", "--num-experts", 64), "needs", "MB left")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_folders_above_the_target_come_and_go(workplace):
    def fail_inside():
        with new_folder(workplace / "a" / "b") as folder:
            (folder / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_inside()
    assert not (workplace / "a").exists()
    with new_folder(workplace / "a" / "b") as folder:
        (folder / "whole").write_text("written")
    assert [path.name for path in (workplace / "a" / "b").iterdir()] == ["whole"]
    shutil.rmtree(workplace / "a")


def test_terminationleave_on_signals_nothing(workplace):
    def be_terminated():
        with new_folder(workplace / "out") as folder:
            (folder / "half").write_text("written")
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave_on_signal)
    try:
        with pytest.raises(SystemExit, match="143"):
            be_terminated()
    finally:
        signal.signal(signal.SIGTERM, before)
