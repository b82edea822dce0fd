"""The record of an adapter's base knows that base in any dtype, and tells it from every other."""

import json
import re

import pytest
import torch

from adapted_models import STOCK, adapted, stock_mixture
from hf_sparse_moe import SparseMoeDecoderForCausalLM
from hf_sparse_moe.hub.base_identity import base_difference, identify_base, read_base, record_base
from tiny_models import BACKBONES, tiny_dense, tiny_inputs, tiny_sparse


def mixture(name: str):
    return stock_mixture(name) if name in STOCK else tiny_sparse(name)


def recorded(model) -> dict:
    return json.loads(json.dumps(identify_base(model)))


@pytest.mark.parametrize("name", [*BACKBONES, *STOCK])
def test_a_base_is_known_again(name):
    assert base_difference(recorded(mixture(name)), mixture(name)) is None


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_is_known_in_another_dtype(trained, loaded):
    assert base_difference(recorded(mixture("mixtral").to(trained)), mixture("mixtral").to(loaded)) is None


def test_a_base_is_known_below_its_adapter():
    plain = recorded(mixture("qwen3_moe"))
    for choice in ({}, {"router": True, "attention": True}, {"experts": {0: [1]}, "projections": ("down",)}):
        peft_model = adapted(mixture("qwen3_moe"), **choice)
        assert recorded(peft_model) == plain
        assert base_difference(plain, peft_model) is None


def test_a_quantised_base_is_known_by_its_routers():
    pytest.importorskip("bitsandbytes")
    from hf_sparse_moe.adapters.quantize_experts import quantize_experts

    plain = recorded(mixture("qwen3_moe"))
    quantised = quantize_experts(mixture("qwen3_moe"))
    assert base_difference(plain, quantised) is None
    assert base_difference(recorded(quantised), mixture("qwen3_moe")) is None
    reorder(quantised, [1, 0, 2, 3], experts=False)
    assert "stand in another order" in base_difference(plain, quantised)


@torch.no_grad()
def reorder(model, order: list[int], experts: bool = True) -> None:
    """The same function, with the experts of each layer in another order; or their routers alone."""
    for layer in model.model.layers:
        for weight in (layer.mlp.gate.weight, *(layer.mlp.experts.parameters() if experts else ())):
            weight.copy_(weight[order].clone())


def test_the_same_experts_in_another_order_are_another_base():
    base, other = mixture("mixtral"), mixture("mixtral")
    reorder(other, [0, 2, 1, 3])
    inputs = tiny_inputs(base, labels=False)
    torch.testing.assert_close(other(**inputs).logits, base(**inputs).logits)  # nobody would see it without an adapter
    told = base_difference(recorded(base), other)
    assert told == "the experts of `model.layers.0.mlp` stand in another order: expert 1 there is expert 2 here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_training_makes_another_base(dtype):
    base, other = mixture("mixtral"), mixture("mixtral")
    other(**tiny_inputs(other)).loss.backward()
    torch.optim.AdamW(other.parameters(), lr=1e-3).step()
    assert "holds other numbers" in base_difference(recorded(base), other.to(dtype))


def test_the_router_alone_makes_another_base():
    other = mixture("mixtral")
    other.model.layers[1].mlp.gate.weight.data += 0.1
    assert (
        base_difference(recorded(mixture("mixtral")), other) == "`router` of `model.layers.1.mlp` holds other numbers"
    )


@pytest.mark.parametrize("name", ["mixtral", "t5", "bert"])
def test_attention_alone_makes_another_base(name):
    other = mixture(name)
    changed = next(name for name, weight in other.named_parameters() if "att" in name.lower() and weight.dim() == 2)
    other.get_parameter(changed).data += 0.1
    assert base_difference(recorded(mixture(name)), other) == f"`{changed}` holds other numbers"


def test_tokens_may_be_added():
    model = mixture("mixtral")
    before = recorded(model)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert base_difference(before, model) is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: tiny_sparse("llama", num_experts=8), "has 8 experts, and had 4 there"),
        (lambda: tiny_sparse("llama", dense_fields={"intermediate_size": 40}), "`down_proj` of .* has the shape"),
        (lambda: tiny_sparse("llama", mlp_layer_types=["sparse", "dense"]), "1 sparse layers, and that base 2"),
        (lambda: tiny_dense("llama"), "no sparse layer"),
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


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told: told["layers"].update(x=3),
        lambda told: told["layers"]["model.layers.0.mlp"].update(router={}),
        lambda told: told["layers"]["model.layers.0.mlp"]["router"].update(shape=[0, 2]),
        lambda told: told["layers"]["model.layers.0.mlp"]["router"].update(shape=["4", 2]),
        lambda told: told["layers"]["model.layers.0.mlp"]["router"].update(shape=[3, 32]),
        lambda told: told["layers"]["model.layers.0.mlp"]["router"].update(samples="!"),
        lambda told: told["layers"]["model.layers.0.mlp"]["router"].update(samples=7),
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
