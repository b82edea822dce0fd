"""A mixture that was not trained becomes the dense model that it was made of."""

import json
import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_sparse_moe import export, upcycle
from hf_sparse_moe.routing import find_mixture_layers, record_routing
from hf_sparse_moe.surgery import measure_experts, to_dense
from routing.test_mixture_layers import build, inputs_of
from tiny_models import ARCHITECTURES, enlarge_weights, tiny_dense, tiny_inputs, tiny_sparse


def fields(config):
    """Without what saving fills in."""
    if not isinstance(config, dict):
        return config
    return {name: fields(value) for name, value in config.items() if name not in ("architectures", "dtype")}


def assert_same(dense, source, exactly=True):
    assert type(dense) is type(source)
    before, after = source.state_dict(), dense.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if exactly:
            assert torch.equal(after[key], tensor), key
        else:
            torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=1e-7)
    assert dense.all_tied_weights_keys == source.all_tied_weights_keys
    assert fields(dense.config.to_dict()) == fields(source.config.to_dict())
    if source.dtype == torch.float32 and exactly:  # `to(bfloat16)` rounds buffers that loading keeps
        inputs = tiny_inputs(source)
        assert torch.equal(dense(**inputs).logits, source(**inputs).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_untrained_copy_becomes_its_source(name):
    source = tiny_dense(name)
    assert_same(to_dense(upcycle(source, num_experts=3)), source)


CASES = {
    "slices": {"method": "split", "granularity": 2, "num_experts": 4},
    "slices in half": {"method": "split", "granularity": 2, "num_experts": 4, "dtype": torch.bfloat16},
    "graft": {"method": "graft", "num_experts": 4, "rank": 16},
    "parts": {"method": "partition", "partition": "contiguous", "num_experts": 4, "num_experts_per_tok": 4},
    "scaled": {"num_experts": 4, "routed_scaling_factor": 2.0},
    "some layers": {"num_experts": 4, "layers": [1]},
    "one a token": {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True},
    "hash": {"num_experts": 4, "router_type": "hash"},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@pytest.mark.parametrize("case", CASES)
def test_every_way_of_making_experts_has_a_way_back(name, case):
    source, options = tiny_dense(name), dict(CASES[case])
    if name == "bart" and "layers" in options:
        options["layers"] = {"encoder": [1], "decoder": "none"}
    if "dtype" in options:
        source = source.to(options["dtype"])
    assert_same(to_dense(upcycle(source, **options)), source)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unnormalised_weights_come_back_up_to_rounding(name):
    source = tiny_dense(name)
    options = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False}
    assert_same(to_dense(upcycle(source, **options)), source, exactly=False)


def test_parts_with_shared_units_compute_what_the_source_computes():
    source = tiny_dense("gpt2")
    options = {"method": "partition", "shared_units": 16, "num_experts": 2, "num_experts_per_tok": 2}
    inputs = tiny_inputs(source)
    dense = to_dense(upcycle(source, **options))
    torch.testing.assert_close(dense(**inputs).logits, source(**inputs).logits)


def test_other_heads_keep_theirs():
    source = tiny_dense("bert", AutoModelForSequenceClassification)
    assert_same(to_dense(upcycle(source, num_experts=2)), source)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_on_disk_as_in_memory(name, tmp_path):
    mixture = tiny_sparse(name)
    mixture.save_pretrained(tmp_path / "mixture", max_shard_size="20KB")
    report = to_dense(tmp_path / "mixture", method="merge", output=tmp_path / "dense")
    loaded = type(to_dense(mixture)).from_pretrained(tmp_path / "dense")
    here = to_dense(mixture, method="merge")
    assert report.architecture == type(here).__name__
    for key, tensor in here.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert report.receipt["to_dense"]["source"]["sha256"]
    assert {path.name for path in (tmp_path / "dense").iterdir()} >= {"receipt.json", "README.md", "config.json"}


def test_a_stock_mixture_becomes_its_dense_sibling(tmp_path):
    source = tiny_dense("mistral")
    export(upcycle(source, num_experts=4), tmp_path / "stock", "mixtral")
    dense = to_dense(tmp_path / "stock")
    inputs = tiny_inputs(source)
    torch.testing.assert_close(dense(**inputs).logits, source(**inputs).logits)
    again = to_dense(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"))
    torch.testing.assert_close(again(**inputs).logits, source(**inputs).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "dots1"])  # the last one has shared experts
def test_a_stock_mixture_is_streamed_as_it_is_loaded(name, tmp_path, monkeypatch):
    model: Any = build(name)
    if name == "dots1":  # which becomes dense where all its layers are sparse
        model.config.update({"first_k_dense_replace": 0, "sliding_window": None})
        model.config.layer_types = ["full_attention"] * 2
        model = AutoModelForCausalLM.from_config(model.config)
    model = enlarge_weights(model).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    assert (name == "dots1") == any("shared_experts" in key for key in model.state_dict())
    measured = measure_experts(model, [inputs_of(model)])
    whole = to_dense(AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), measured, "merge")
    whole.save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # which would load it
    report = to_dense(tmp_path / "stock", measured, "merge", tmp_path / "dense", max_shard_size="20KB")
    assert report.receipt["to_dense"]["source"]["model_type"] == name
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "dense" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert_same(to_dense(tmp_path / "stock", measured, "merge"), whole)
    monkeypatch.undo()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in whole.state_dict().items())


def test_a_stock_mixture_that_cannot_be_streamed_is_loaded(tmp_path, caplog, monkeypatch):
    model = enlarge_weights(build("mixtral")).eval()
    model.save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    config = json.loads((tmp_path / "stock" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "stock" / "config.json").write_text(json.dumps(config))  # but the two are not the same
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    dense = to_dense(tmp_path / "stock")
    assert "in memory, not streamed: `" in caplog.text
    assert torch.equal(dense.lm_head.weight, tensors["lm_head.weight"])


def test_an_incomplete_stock_mixture_is_refused(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    expert = next(name for name in tensors if ".experts.1." in name)
    norm = "model.norm.weight"
    for name, message in (
        (norm, f"lacks weights that .*`{norm}`"),
        (expert, "does not describe a model that transformers can build"),
    ):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(left, tmp_path / "stock" / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            to_dense(tmp_path / "stock", output=tmp_path / "dense")


def test_salience_chooses_and_weighs():
    mixture = tiny_sparse("gpt2")
    measured = measure_experts(mixture, [tiny_inputs(mixture, batch=8, length=16)])
    best, average = (to_dense(mixture, measured, method) for method in ("best", "mean"))
    for layer, block, one, other in zip(
        measured.layers, mixture.sparse_blocks, best.transformer.h, average.transformer.h, strict=True
    ):
        downs = block.experts.down_proj.transpose(1, 2)
        assert torch.equal(one.mlp.c_proj.weight, downs[layer.reap.argmax()])
        weights = (layer.reap / layer.reap.sum()).float()
        torch.testing.assert_close(other.mlp.c_proj.weight, (weights[:, None, None] * downs).sum(dim=0))
    with torch.no_grad():
        mixture.sparse_blocks[1].gate.weight.add_(1)
    for other in (mixture, tiny_sparse("gpt2", num_experts=3), tiny_sparse("llama")):
        with pytest.raises(ValueError, match="another model"):
            to_dense(other, measured)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_stock_mixture_is_weighed_by_its_own_measurements(name, tmp_path):
    model = enlarge_weights(build(name)).eval()
    model.save_pretrained(tmp_path / "stock")
    measured = measure_experts(model, [inputs_of(model)])
    dense = to_dense(tmp_path / "stock", measured, "best")
    down = find_mixture_layers(model)[1].experts.down_proj[measured.layers[1].reap.argmax()]
    found = dense.model.layers[1].mlp.down_proj.weight  # smaller where the router's weights sum to less than 1
    assert torch.cosine_similarity(found.flatten(), down.flatten(), dim=0) > 1 - 1e-6


@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_unnormalised_weights_are_scaled_by_what_they_sum_to(name, caplog, monkeypatch):
    """Of a trained router, which is far from even: equal experts become one times the mean sum of the weights."""
    model = tiny_sparse(name, norm_topk_prob=False) if name == "llama" else build(name).eval()
    layers = find_mixture_layers(enlarge_weights(model))
    with torch.no_grad():
        for layer in layers:
            layer.router.weight.mul_(5)
            for parameter in layer.experts.parameters():
                parameter[:] = parameter[:1].clone()
    inputs = inputs_of(model)
    with record_routing(model) as recorded, torch.no_grad():
        model(**inputs)
    dense = to_dense(model, measure_experts(model, [inputs]))
    for layer, routing, made in zip(layers, recorded[0].values(), dense.model.layers, strict=True):
        mean = routing.top_k_weights.sum(dim=-1).mean()
        assert mean > 1.5 * layer.top_k / layer.num_experts
        up, down = layer.experts.gate_up_proj[0].chunk(2)[1], layer.experts.down_proj[0]
        ratio = made.mlp.up_proj.weight.norm() / up.norm() * made.mlp.down_proj.weight.norm() / down.norm()
        torch.testing.assert_close(ratio, mean, rtol=1e-4, atol=0)
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    for mixture, is_told in ((model, True), (upcycle(tiny_dense("gpt2"), 4, norm_topk_prob=False), False)):
        caplog.clear()
        to_dense(mixture)
        assert ("as if the routers were even" in caplog.text) == is_told


def test_bad_input(tmp_path):
    mixture = tiny_sparse("llama")
    with pytest.raises(ValueError, match="`method='sum'` is not allowed"):
        to_dense(mixture, method="sum")
    with pytest.raises(ValueError, match="needs `measured`"):
        to_dense(mixture, method="best")
    with pytest.raises(ValueError, match="`llama` cannot be read"):
        to_dense(tiny_dense("llama"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        to_dense(mixture, output=tmp_path)
    uneven = tiny_sparse("llama", moe_intermediate_size=20, mlp_layer_types=["dense", "sparse"])
    with pytest.raises(ValueError, match="no dense architecture has both"):
        to_dense(uneven)


@pytest.mark.parametrize("router_type", ["top_k", "hash"])
def test_measurements_of_another_model_are_refused(router_type, tmp_path):
    mixture, other = (tiny_sparse("llama", router_type=router_type) for _ in range(2))
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batches = [tiny_inputs(mixture, labels=False)]
    with pytest.raises(ValueError, match="`measured` is of another model"):
        to_dense(mixture, measure_experts(other, batches), method="best")
    mixture.save_pretrained(tmp_path / "mixture")
    measured = measure_experts(mixture, batches)
    to_dense(tmp_path / "mixture", measured, method="best", output=tmp_path / "dense")
    in_memory = to_dense(mixture, measured, method="best").state_dict()
    for key, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict().items():
        assert torch.equal(tensor, in_memory[key]), key
