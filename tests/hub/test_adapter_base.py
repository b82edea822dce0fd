"""The record of an adapter's base knows that base in any dtype, and tells it from others by shapes and file hashes."""

import json
import re

import pytest
import torch

from adapted_models import STOCK, adapted, stock_mixture
from hf_sparse_moe import SparseMoeDecoderForCausalLM
from hf_sparse_moe.hub.adapter_base import base_difference, identify_base, read_base, record_base
from tiny_models import tiny_dense, tiny_sparse


def mixture(name: str):
    return stock_mixture(name) if name in STOCK else tiny_sparse(name)


def recorded(model) -> dict:
    return json.loads(json.dumps(identify_base(model)))


@pytest.mark.parametrize("name", ["llama", "bert", "t5", *STOCK])
def test_a_base_is_known_again(name):
    told = recorded(mixture(name))
    assert told["layers"]
    assert base_difference(told, mixture(name)) is None


def test_a_base_is_known_below_its_adapter():
    plain = recorded(mixture("qwen3_moe"))
    for choice in ({}, {"router": True, "attention": True}, {"experts": {0: [1]}, "projections": ("down",)}):
        peft_model = adapted(mixture("qwen3_moe"), **choice)
        assert recorded(peft_model) == plain
        assert base_difference(plain, peft_model) is None


def test_a_quantised_base_is_known():
    pytest.importorskip("bitsandbytes")
    from hf_sparse_moe.adapters.quantized_experts import quantize_experts

    plain = recorded(mixture("qwen3_moe"))
    quantised = quantize_experts(mixture("qwen3_moe"))
    assert base_difference(plain, quantised) is None
    assert base_difference(recorded(quantised), mixture("qwen3_moe")) is None


def test_files_with_other_contents_are_another_base(tmp_path):
    tiny_sparse("llama").save_pretrained(tmp_path / "base")
    load = SparseMoeDecoderForCausalLM.from_pretrained
    told = recorded(load(tmp_path / "base"))
    assert list(told["sha256"]) == ["model.safetensors"]
    assert base_difference(told, load(tmp_path / "base", dtype=torch.bfloat16)) is None
    other = load(tmp_path / "base")
    other.sparse_blocks[0].experts.down_proj.data = other.sparse_blocks[0].experts.down_proj.data.flip(0).contiguous()
    other.save_pretrained(tmp_path / "other")
    assert base_difference(told, load(tmp_path / "other")) == (
        "its `model.safetensors` is another file (its sha256 differs)"
    )


def test_tokens_may_be_added():
    model = mixture("mixtral")
    before = recorded(model)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert base_difference(before, model) is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda: tiny_sparse("llama", num_experts=8),
            "the shape .8, .*, and had .4, .* there",
        ),
        (lambda: tiny_sparse("llama", dense_fields={"intermediate_size": 40}), "`gate_up_proj` of .* has the shape"),
        (lambda: tiny_sparse("llama", mlp_layer_types=["sparse", "dense"]), "1 sparse layers, and that base 2"),
        (lambda: tiny_dense("llama"), "0 sparse layers, and that base 2"),
    ],
)
def test_another_shape_is_told(other, said):
    assert re.search(said, base_difference(recorded(tiny_sparse("llama")), other()))


def test_a_folder_s_path_is_not_recorded(tmp_path):
    tiny_sparse("llama").save_pretrained(tmp_path / "mine")
    model = SparseMoeDecoderForCausalLM.from_pretrained(tmp_path / "mine")
    assert identify_base(model)["name_or_path"] == "mine"
    model.config._name_or_path = "user/name"
    assert identify_base(model)["name_or_path"] == "user/name"


def test_a_record_of_version_0_1_is_read(tmp_path):
    """Its samples of weights are not compared any more; shapes and hashes are."""
    told = recorded(mixture("mixtral"))
    for tensors in told["layers"].values():
        for described in tensors.values():
            described["samples"] = "AAAA"
    told |= {"dtype": "float32", "weights": {"model.norm.weight": {"shape": [1, 2, 3], "samples": None}}}
    (tmp_path / "adapter_base.json").write_text(json.dumps(told))
    assert base_difference(read_base(tmp_path), mixture("mixtral")) is None
    told["sha256"] = {"model.safetensors": "0" * 64}
    mixture("mixtral").save_pretrained(tmp_path / "base")
    loaded = type(mixture("mixtral")).from_pretrained(tmp_path / "base")
    assert "is another file" in base_difference(told, loaded)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told["layers"].update(x=3),
        lambda told: told["layers"]["model.layers.0.mlp"].update(down_proj={}),
        lambda told: told["layers"]["model.layers.0.mlp"]["down_proj"].update(shape=[0, 2]),
        lambda told: told["layers"]["model.layers.0.mlp"]["down_proj"].update(shape=["4", 2]),
    ],
)
def test_a_record_of_somebody_else_may_hold_anything(tmp_path, spoil):
    record_base(mixture("mixtral"), tmp_path)
    path = tmp_path / "adapter_base.json"
    told = json.loads(path.read_text())
    assert read_base(tmp_path) == told
    spoil(told)
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="is not what this package writes"):
        read_base(tmp_path)
