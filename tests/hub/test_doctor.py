"""`hf-sparse-moe doctor`: a whole checkpoint passes, and each thing that can be wrong with one is named."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import create_dynamic_module

from adapted_models import stock_mixture
from cli_client import run_cli
from hf_sparse_moe.hub.examination import FAILED, NOT_CHECKED, PASSED, WARNING, examine
from hf_sparse_moe.hub.fingerprint import FINGERPRINT_NAME, fingerprint_difference, make_fingerprint
from hf_sparse_moe.hub.health_check import REMOTE_CODE, doctor
from hub_checkpoints import save_mixture
from tiny_models import tiny_dense


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = save_mixture(tmp_path_factory.mktemp("checkpoint"))
    make_fingerprint(folder, folder / FINGERPRINT_NAME)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "mixture"))


def verdicts(folder: Path) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in examine(folder)[0]}


def failed(folder: Path) -> set[str]:
    return {check for check, verdict in verdicts(folder).items() if verdict == FAILED}


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_whole_checkpoint_passes(folder):
    told = run_cli("doctor", folder)
    assert told.code == 0, told
    for word in ("every tensor present", "outputs equal the fingerprint", "passed", "--trust-remote-code"):
        assert word in told.out
    assert "failed" not in told.out


@pytest.mark.slow
def test_its_own_code_is_run_where_a_person_says_so_and_never_otherwise(folder, tmp_path):
    ran = tmp_path / "ran"
    code = folder / "modeling_sparse_moe.py"
    code.write_text(code.read_text() + f"\nopen({str(ran)!r}, 'w').close()\n")
    rows = {finding.check: finding for finding in doctor(folder).findings}
    assert not ran.exists()
    assert rows[REMOTE_CODE].verdict == NOT_CHECKED
    assert rows["code for loading without the package"].verdict == WARNING
    create_dynamic_module("transformers_modules/of_another")  # what loading one leaves in this process' path
    rows = {finding.check: finding.verdict for finding in doctor(folder, trust_remote_code=True).findings}
    assert ran.exists()
    assert rows.pop("code for loading without the package") == WARNING
    assert set(rows.values()) == {PASSED}


def test_code_that_does_not_run_or_sees_a_token_is_told(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = folder / "modeling_sparse_moe.py"
    code.write_text("import os\nraise ImportError(f\"token {os.environ.get('HF_TOKEN')}\")\n")
    report = doctor(folder, trust_remote_code=True)
    assert not report.healthy
    assert report.findings[-1].verdict == FAILED
    assert "token None" in report.findings[-1].detail


def test_a_missing_tensor_is_never_drawn_in_silence(folder):
    change_weights(folder, lambda tensors: tensors.pop(next(name for name in tensors if "experts" in name)))
    assert {"every tensor present", "outputs equal the fingerprint"} <= failed(folder)


def test_a_tensor_too_many_and_a_wrong_shape_are_told(folder):
    change_weights(folder, lambda tensors: tensors.update(stray=torch.zeros(2)))
    assert failed(folder) == {"config and weights agree"}
    change_json(folder / "config.json", num_experts=3)
    assert "config and weights agree" in failed(folder)


def test_a_number_that_is_not_finite_is_told(folder):
    change_weights(folder, lambda tensors: tensors[next(n for n in tensors if "experts" in n)].fill_(float("nan")))
    assert {"every tensor finite", "outputs equal the fingerprint"} <= failed(folder)


def test_one_changed_weight_changes_the_fingerprint(folder):
    change_weights(folder, lambda tensors: tensors[next(n for n in sorted(tensors) if "down_proj" in n)].mul_(1.01))
    assert failed(folder) == {"outputs equal the fingerprint"}


def test_experts_in_another_order_change_the_fingerprint(folder):
    name = "down_proj"

    def roll(tensors):
        for key in [key for key in tensors if key.endswith(name)]:
            tensors[key] = tensors[key].roll(1, dims=0).contiguous()

    change_weights(folder, roll)
    assert failed(folder) == {"outputs equal the fingerprint"}


def test_equal_experts_need_a_receipt_that_says_copy(folder):
    (folder / FINGERPRINT_NAME).unlink()

    def copy(tensors):
        for key in [key for key in tensors if ".experts." in key]:
            tensors[key] = tensors[key][:1].expand_as(tensors[key]).contiguous()

    change_weights(folder, copy)
    assert failed(folder) == {"experts differ"}
    (folder / "receipt.json").write_text(json.dumps({"arguments": {"method": "noise"}}))
    assert failed(folder) == {"experts differ"}
    (folder / "receipt.json").write_text(json.dumps({"arguments": {"method": "split", "granularity": 2}}))
    assert failed(folder) == {"experts differ"}
    for arguments in ({"method": "copy"}, {"method": "split", "granularity": 1}):
        (folder / "receipt.json").write_text(json.dumps({"arguments": arguments}))
        assert failed(folder) == set()


@pytest.mark.parametrize("factor", [0.0, 1e4])
def test_a_router_that_is_blind_or_saturated_is_told(folder, factor):
    (folder / FINGERPRINT_NAME).unlink()

    def scale(tensors):
        for key in [key for key in tensors if key.endswith("gate.weight")]:
            tensors[key] *= factor

    change_weights(folder, scale)
    assert failed(folder) == {"routers choose"}


def test_weights_that_should_be_tied_and_are_not_are_told(folder):
    (folder / FINGERPRINT_NAME).unlink()
    config = json.loads((folder / "config.json").read_text())
    assert config["dense_config"].get("tie_word_embeddings", True)

    def untie(tensors):
        embedding = next(key for key in tensors if key.endswith("word_embeddings.weight"))
        tensors["dense.cls.predictions.decoder.weight"] = tensors[embedding] + 1

    change_weights(folder, untie)
    assert "tied weights tied" in failed(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: change_json(folder / "config.json", architectures=["Nothing"]),
    ],
)
def test_what_does_not_load_is_told_in_a_row(folder, spoil):
    spoil(folder)
    assert failed(folder) == {"loads"}


def test_a_checkpoint_that_fails_ends_with_exit_code_1_and_none_with_2(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"short")
    told = run_cli("doctor", folder, "--json")
    assert (told.code, json.loads(told.out)["healthy"]) == (1, False)
    assert run_cli("doctor", tmp_path).code == 2


def test_a_wrong_path_is_told():
    with pytest.raises(ValueError, match=r"`no/such/folder` is not a Hub id .* the path if you meant a folder"):
        doctor("no/such/folder")


def test_a_dense_model_has_no_mixture_to_check(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path)
    found = verdicts(tmp_path)
    assert found["experts differ"] == found["routers choose"] == NOT_CHECKED
    assert FAILED not in found.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stock_mixture_is_checked_and_its_next_step_named(tmp_path, dtype):
    stock_mixture("mixtral").to(dtype).save_pretrained(tmp_path)
    rows = {finding.check: finding for finding in examine(tmp_path)[0]}
    assert "`hf-sparse-moe import-stock`" in rows["loads"].detail
    assert "2 sparse layers" in rows["loads"].detail
    assert rows["experts differ"].verdict == rows["routers choose"].verdict == PASSED
    assert FAILED not in {finding.verdict for finding in rows.values()}


def test_a_number_that_is_none_is_no_small_difference():
    taken = {"shape": [2], "outputs": [1.0, 2.0], "largest": 2.0}
    assert fingerprint_difference({"shape": [2], "outputs": [1.0, 2.0]}, taken) == 0
    for outputs in ([1.0, math.nan], [1.0, "2"], [1.0]):
        assert fingerprint_difference({"shape": [2], "outputs": outputs}, taken) == math.inf
    assert fingerprint_difference({"shape": [1, 2], "outputs": [1.0, 2.0]}, taken) == math.inf
