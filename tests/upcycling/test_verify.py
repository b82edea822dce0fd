"""`verify` says whether a mixture still is what its receipt says."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_sparse_moe import upcycle
from hf_sparse_moe.checkpoints.folder import write_checkpoint
from hf_sparse_moe.upcycling import verify
from tiny_models import tiny_dense


@pytest.fixture
def dense(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def mixture(dense, tmp_path):
    upcycle(dense, 4, output=tmp_path / "mixture")
    return tmp_path / "mixture"


def change(path, key, function):
    state = load_file(path)
    state[key] = function(state[key])
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("family", ["encoder", "decoder", "encoder_decoder"])
def test_streamed_mixture_computes_what_was_promised(family, tmp_path):
    tiny_dense(family).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", 4, output=tmp_path / "mixture")
    report = verify(tmp_path / "mixture", tmp_path / "dense")
    assert report.passed, report.findings
    assert 0 < report.measured["float32"]["max_abs_difference"] < 1e-4
    assert report.recorded is None
    assert "as promised" in report.findings[0]
    assert "have the hashes" in report.findings[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["copy", "noise"])
def test_numbers_of_the_receipt_come_again(method, dtype, dense, tmp_path):
    model = upcycle(str(dense), 4, method=method, dtype=dtype)
    write_checkpoint(model, tmp_path / "mixture")
    report = verify(tmp_path / "mixture", dense)
    assert report.passed, report.findings
    assert report.measured["as_stored"]["max_abs_difference"] == report.recorded["max_abs_difference"]
    assert ("does not promise" in report.findings[0]) == (method == "noise")


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 50, (2, 16), generator=generator) for _ in range(2)]


def test_a_method_without_a_promise_is_never_called_equal(dense, tmp_path):
    """Its loss may be far from the dense model's, and the receipt is right all the same."""
    write_checkpoint(upcycle(str(dense), 4, method="drop"), tmp_path / "mixture")
    report = verify(tmp_path / "mixture", dense, evaluation=batches())
    assert report.passed, report.findings
    assert not report.promised
    assert "does not promise what the dense model computes" in report.verdict
    assert "train the mixture before use" in report.verdict
    assert ("higher" in report.findings[3]) == (report.loss["mixture"] > report.loss["dense"])
    assert "does not promise the same" in report.findings[3]
    assert report.to_dict()["verdict"] == report.verdict


def test_a_promise_of_equality_holds_for_the_loss_too(dense, mixture):
    report = verify(mixture, dense, evaluation=batches())
    assert report.passed, report.findings
    assert "computes what its dense model computes" in report.verdict
    assert "er;" not in report.findings[3]
    change(mixture / "model.safetensors", "dense.lm_head.weight", lambda tensor: tensor * 1.5)
    report = verify(mixture, dense, evaluation=batches())
    assert report.verdict.startswith("not verified")
    assert "the method promises the same" in report.findings[3]


def test_changed_mixture(dense, mixture):
    key = "dense.model.layers.0.mlp.experts.down_proj"
    change(mixture / "model.safetensors", key, lambda tensor: tensor + 0.01)
    report = verify(mixture, dense)
    assert not report.passed
    assert "but should differ by at most" in report.findings[0]


def test_changed_numbers(dense, tmp_path):
    write_checkpoint(upcycle(str(dense), 4, method="noise"), tmp_path / "mixture")
    path = tmp_path / "mixture" / "receipt.json"
    receipt = json.loads(path.read_text())
    receipt["equality"]["max_abs_difference"] *= 0.5
    path.write_text(json.dumps(receipt))
    report = verify(tmp_path / "mixture", dense)
    assert not report.passed
    assert "which is not the same" in report.findings[1]


def test_other_dense_checkpoint(dense, mixture):
    change(dense / "model.safetensors", "model.norm.weight", lambda tensor: tensor + 1)
    report = verify(mixture, dense)
    assert not report.passed
    assert "`model.safetensors` differs" in report.findings[2]


def test_nothing_to_verify(dense, mixture, tmp_path):
    with pytest.raises(ValueError, match=r"no(t a)? mixture"):
        verify(dense, dense)
    tiny_dense("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*made of a LlamaForCausalLM"):
        verify(mixture, tmp_path / "gpt2")
    (mixture / "receipt.json").unlink()
    with pytest.raises(ValueError, match="no receipt"):
        verify(mixture, dense)


def test_a_mixture_with_missing_weights_is_refused(dense, mixture):
    """`from_pretrained` would draw them at random, and the promise would seem broken."""
    state = load_file(mixture / "model.safetensors")
    state.pop(next(key for key in state if "experts" in key))
    save_file(state, mixture / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="`mixture` lacks weights that `SparseMoeDecoderForCausalLM` needs"):
        verify(mixture, dense)
