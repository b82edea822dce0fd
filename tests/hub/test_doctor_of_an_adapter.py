"""`hf-sparse-moe doctor` of an adapter: a whole one passes on its base, and each thing that can be wrong is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.hub.adapter_publish import stage_adapter
from hf_sparse_moe.hub.examination import FAILED, NOT_CHECKED, PASSED, examine_adapter
from hf_sparse_moe.hub.health_check import doctor
from hf_sparse_moe.hub.publishable import publishable_files
from hub_adapters import save_adapter, save_base
from tiny_models import tiny_sparse


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def published(base, tmp_path_factory) -> Path:
    """An adapter as a push leaves it, with its fingerprint."""
    folder, staged = tmp_path_factory.mktemp("adapter"), tmp_path_factory.mktemp("staged")
    save_adapter(folder, base)
    stage_adapter(publishable_files(folder)[0], staged, str(base), None)
    return staged


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(published, tmp_path / "adapter"))


def failed(folder: Path, base: Path) -> set[str]:
    return {finding.check for finding in examine_adapter(folder, base) if finding.verdict == FAILED}


def change(folder: Path, edit, name: str = "adapter_model.safetensors") -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def test_a_whole_adapter_passes(folder, base):
    told = run_cli("doctor", folder, "--base", base)
    assert told.code == 0, told
    for word in (
        "4 of 4 adapted tensors found, 4 moved.",
        "base is its own",
        "plain PEFT computes the same",
        "outputs change",
    ):
        assert word in told.out
    assert "failed" not in told.out
    assert {finding.verdict for finding in doctor(folder, base=str(base)).findings} == {PASSED}


def test_without_a_base_it_is_asked_for(folder, tmp_path):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    assert_one_sentence(run_cli("doctor", folder), "`--base`")
    assert_one_sentence(run_cli("doctor", tmp_path / "adapter", "--base", tmp_path), "config.json")
    assert_one_sentence(run_cli("doctor", save_base(tmp_path / "model"), "--base", tmp_path), "is not an adapter")


def roll(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".experts." in name or name.endswith(".gate.weight")]:
        tensors[name] = tensors[name].roll(1, dims=0).contiguous()


def test_a_base_with_its_experts_in_another_order_is_told(folder, base, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    change(other, roll, "model.safetensors")
    assert failed(folder, other) == {"base is its own", "outputs equal the fingerprint"}


def test_a_base_of_another_shape_does_not_load(folder, tmp_path):
    tiny_sparse("llama", num_experts=8).save_pretrained(tmp_path / "other")
    assert failed(folder, tmp_path / "other") == {"loads"}


@pytest.mark.parametrize(
    ("edit", "checks"),
    [
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.experts.lora" in name],
            {"loads"},
        ),
        (lambda tensors: tensors.pop(sorted(tensors)[0]), {"loads"}),
        (lambda tensors: tensors.update(stray=torch.zeros(2)), {"loads"}),
        (
            lambda tensors: tensors[sorted(tensors)[-1]].fill_(float("nan")),
            {
                "every tensor finite",
                "outputs equal the fingerprint",
                "plain PEFT computes the same",
            },
        ),
        (lambda tensors: tensors[sorted(tensors)[-1]].mul_(1.1), {"outputs equal the fingerprint"}),
        (
            lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name],
            {"outputs change", "outputs equal the fingerprint"},
        ),
    ],
    ids=["too few", "a factor alone", "too many", "not finite", "changed", "zero"],
)
def test_what_is_wrong_with_its_tensors_is_told(folder, base, edit, checks):
    change(folder, edit)
    assert failed(folder, base) == checks


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "NONE"}'),
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["x"]}'),
    ],
)
def test_what_does_not_load_is_told_in_a_row(folder, base, spoil):
    spoil(folder)
    assert failed(folder, base) == {"loads"}


def test_an_adapter_that_was_never_pushed_is_checked_all_the_same(base, tmp_path):
    save_adapter(tmp_path, base)
    (tmp_path / "adapter_base.json").unlink()
    rows = {finding.check: finding.verdict for finding in doctor(tmp_path).findings}  # its config names the base
    assert rows.pop("base is its own") == rows.pop("outputs equal the fingerprint") == NOT_CHECKED
    assert set(rows.values()) == {PASSED}
