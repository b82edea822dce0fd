"""The record of an adapter's base tells that base from others by the hashes of its files."""

import pytest
import torch

from adapted_models import adapted, stock_mixture
from hf_sparse_moe import SparseMoeDecoderForCausalLM
from hf_sparse_moe.hub.adapter_files import base_difference, identify_base, record_base
from tiny_models import tiny_dense, tiny_sparse


OTHER_FILE = "its `model.safetensors` is another file (its sha256 differs)"


def difference(recorded: dict, model) -> str | None:
    return base_difference(recorded, identify_base(model)["sha256"])


@pytest.mark.parametrize("model", [tiny_sparse("bert"), stock_mixture("mixtral")], ids=["ours", "stock"])
def test_files_with_other_contents_are_another_base(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    load = type(model).from_pretrained
    told = identify_base(load(tmp_path / "base"))
    assert list(told["sha256"]) == ["model.safetensors"]
    assert difference(told, load(tmp_path / "base", dtype=torch.bfloat16)) is None
    assert difference(told, adapted(load(tmp_path / "base"), experts={0: [1]})) is None
    other = load(tmp_path / "base")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert difference(told, other) is None  # changed in memory
    other.save_pretrained(tmp_path / "other")
    assert difference(told, load(tmp_path / "other")) == OTHER_FILE


def test_a_folder_s_path_is_not_recorded(tmp_path):
    tiny_sparse("llama").save_pretrained(tmp_path / "mine")
    model = SparseMoeDecoderForCausalLM.from_pretrained(tmp_path / "mine")
    assert identify_base(model)["name_or_path"] == "mine"
    model.config._name_or_path = "user/name"
    assert identify_base(model)["name_or_path"] == "user/name"


def test_a_record_of_version_0_1_is_read():
    """It holds shapes and samples of weights, which are not compared any more; hashes are."""
    shapes = {"model.layers.0.mlp": {"down_proj": {"shape": [4, 2, 3], "samples": "AAAA"}}}
    told = {"name_or_path": "base", "sha256": {"model.safetensors": "0" * 64}, "layers": shapes}
    assert base_difference(told, {"model.safetensors": "0" * 64}) is None
    assert base_difference(told, {"model.safetensors": "1" * 64}) == OTHER_FILE


def test_a_dense_base_has_no_record(tmp_path):
    record_base(tiny_dense("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("told", [{"sha256": 3}, {"sha256": {"model.safetensors": 4}}, {"layers": {"x": 3}}])
def test_a_record_of_somebody_else_may_hold_anything(told):
    base_difference(told, {"model.safetensors": "0" * 64})
