"""A pruned mixture computes what the mixture computes without those experts, in memory and on disk."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.test_on_device import BACKENDS
from hf_sparse_moe import disable_experts, explain_export, quantize_experts
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME
from hf_sparse_moe.models.quantized_weight import QuantizedWeight
from hf_sparse_moe.models.size import count_parameters
from hf_sparse_moe.routing import find_mixture_layers
from hf_sparse_moe.surgery import measure_experts, merge_experts, prune_experts
from models.router_kinds import one_each, pairs_with, routed_model
from routing.test_mixture_layers import MIXTURES, UNSUPPORTED, build, inputs_of
from tiny_models import enlarge_weights, tiny_config, tiny_dense, tiny_inputs, tiny_sparse


STOCK_WORKER = Path(__file__).parents[1] / "stock" / "stock_worker.py"
DROPPED = [1, 4]  # of the 8 experts of the stock mixtures
STOCK = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "dbrx"]


def pairs() -> list:
    return [pair for pair in pairs_with("bert", "llama", "t5") if "hash" not in pair[1]]


def mixture_of(name: str, kind: str, **fields):
    """A mixture, and experts to leave out: the same number of each group."""
    if "group" in kind:
        return routed_model(name, kind, num_experts=16, **fields), [0, 5, 10, 15]
    return routed_model(name, kind, **fields), [1]


@torch.no_grad()
def outputs(model, inputs) -> torch.Tensor:
    return model(**inputs)[0]


def assert_cut(model, pruned, dropped, inputs) -> None:
    """Equal but for rounding, and not because nothing depends on these experts."""
    whole = outputs(model, inputs)
    with disable_experts(model, dropped):
        expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(pruned, inputs), expected, rtol=1e-4, atol=2e-5)
    assert (whole - expected).abs().max() > 1e-3


def stock(name: str):
    model = enlarge_weights(build(name)).eval()
    return model, inputs_of(model)


@pytest.mark.parametrize(("name", "kind"), one_each(pairs()))
def test_every_router(name, kind):
    model, dropped = mixture_of(name, kind)
    assert_cut(model, prune_experts(model, drop=dropped), dropped, tiny_inputs(model, labels=False, pads=2))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(backend, name):
    model = tiny_sparse(name)
    model.set_experts_implementation(backend)
    pruned = prune_experts(model, drop=[2])
    assert pruned.config._experts_implementation == backend
    assert_cut(model, pruned, [2], tiny_inputs(model, labels=False))


def test_the_source_stays_as_it_is():
    model = tiny_sparse("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune_experts(model, drop=[0])
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.config.num_experts, pruned.config.num_experts) == (4, 3)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_codes_are_cut(bits):
    model = quantize_experts(tiny_sparse("llama"), bits=bits)
    pruned = prune_experts(model, drop=[0])
    for before, after in zip(model.sparse_blocks, pruned.sparse_blocks, strict=True):
        assert isinstance(after.experts.down_proj, QuantizedWeight)
        assert torch.equal(after.experts.down_proj.codes, before.experts.down_proj.codes[1:])
    assert_cut(model, pruned, [0], tiny_inputs(model, labels=False))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_from_disk_to_disk(name, tmp_path):
    """Tensor by tensor, bit for bit what is cut in memory."""
    model = tiny_sparse(name)
    model.save_pretrained(tmp_path / "mixture")
    drop = {place: [place % 4] for place in range(len(model.sparse_blocks))}
    report = prune_experts(tmp_path / "mixture", drop=drop, output=tmp_path / "pruned", max_shard_size="20KB")
    assert report.architecture == type(model).__name__
    expected = prune_experts(model, drop=drop).state_dict()
    loaded = type(model).from_pretrained(tmp_path / "pruned")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    receipt = json.loads((tmp_path / "pruned" / RECEIPT_NAME).read_text())["pruned"]
    assert list(receipt["kept"].values())[:2] == [[1, 2, 3], [0, 2, 3]]
    assert receipt["parameters"]["after"] == loaded.num_parameters() < receipt["parameters"]["before"]
    assert loaded.receipt == report.receipt


@pytest.mark.parametrize("name", STOCK)
def test_stock_mixtures(name):
    model, inputs = stock(name)
    assert_cut(model, prune_experts(model, drop=DROPPED), DROPPED, inputs)


REFUSED = {
    "inkling": "its router also chooses among other things than experts",
    "longcat_flash": "has no field that this package knows for the number of its experts",
    "nllb_moe": "only 0 and 1 are called",
    "zaya": "has no field that this package knows for the number of its experts",
}


@pytest.mark.conformance
@pytest.mark.parametrize("name", sorted({*MIXTURES} - {*STOCK} - UNSUPPORTED.keys()))
def test_every_mixture_of_transformers(name, tmp_path):
    model, inputs = stock(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            prune_experts(model, drop=DROPPED)
        return
    dropped = DROPPED if find_mixture_layers(model)[0].num_experts == 8 else [1]
    assert_cut(model, prune_experts(model, drop=dropped), dropped, inputs)
    model.save_pretrained(tmp_path / "stock")
    prune_experts(tmp_path / "stock", drop=dropped, output=tmp_path / "pruned")
    assert_cut(model, load_whole(tmp_path / "pruned").eval(), dropped, inputs)


@pytest.mark.slow
def test_stock_checkpoints_load_without_this_package(tmp_path):
    """As transformers stores them, expert by expert in most, and as it has them in memory."""
    jobs, expected = {}, {}
    for number, name in enumerate(STOCK):
        model, inputs = stock(name)
        model.save_pretrained(tmp_path / name, save_original_format=number % 4 < 3, max_shard_size="30KB")
        prune_experts(tmp_path / name, drop=DROPPED, output=tmp_path / f"{name}-6")
        folder = str(tmp_path / f"{name}-6")
        jobs[folder] = {key: value.tolist() for key, value in inputs.items()}
        expected[folder] = outputs(prune_experts(model, drop=DROPPED), inputs)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = [sys.executable, STOCK_WORKER, tmp_path / "jobs.json", tmp_path / "results"]
    subprocess.run(worker, check=True, timeout=300)
    results = torch.load(tmp_path / "results")
    for folder, logits in expected.items():
        assert results[folder]["problems"] == {}
        torch.testing.assert_close(results[folder]["logits"], logits, rtol=1e-4, atol=1e-5)


BAD = {
    "no measurements": ({"keep": 3}, "`method='reap'` needs `measured`"),
    "both": ({"keep": 3, "drop": [0]}, "either `keep`"),
    "neither": ({}, "either `keep`"),
    "method": ({"keep": 3, "method": "best"}, "`method='best'` is not allowed"),
    "too many experts a token": ({"keep": 1, "method": "random"}, "1 experts, but 2 serve each token"),
    "an emptied layer": ({"drop": {0: [0, 1, 2, 3]}}, "0 experts, but 2 serve each token"),
    "no expert": ({"keep": 0, "method": "random"}, "layer 0 has 4 experts"),
    "a share above 1": ({"keep": 1.5, "method": "random"}, "`keep=1.5` is not allowed"),
    "an unknown layer": ({"drop": {7: [0]}}, "`drop` names layer 7; the sparse layers are 0 to 1"),
    "an unknown expert": ({"drop": [9]}, "`drop` names expert 9 of layer 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(case, tmp_path):
    arguments, message = BAD[case]
    tiny_sparse("llama").save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match=message):
        prune_experts(tmp_path / "mixture", output=tmp_path / "out", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["mixture"]


@pytest.mark.parametrize("name", ["mixtral", "groups"])
def test_what_a_config_cannot_hold_is_named_and_nothing_written(name, tmp_path):
    model = stock(name)[0] if name == "mixtral" else routed_model("llama", "groups by their best")
    inputs = inputs_of(model) if name == "mixtral" else tiny_inputs(model, labels=False)
    model.save_pretrained(tmp_path / "mixture")
    measured, output = measure_experts(model, [inputs]), tmp_path / "out"
    if name == "mixtral":
        message = r"`model_type='mixtral'` has one number of experts for all layers, not \[6, 8\]"
        with pytest.raises(ValueError, match=message):
            merge_experts(tmp_path / "mixture", measured, into={0: 6}, output=output)
    else:
        message = "which its router's 4 groups cannot share evenly"
    with pytest.raises(ValueError, match=message):
        prune_experts(tmp_path / "mixture", measured, keep={0: 6}, output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["mixture"]


@pytest.mark.parametrize("keep", [np.int64(3), np.float32(0.75), {place: np.int32(3) for place in range(2)}])
def test_numbers_of_numpy(keep):
    assert prune_experts(tiny_sparse("llama"), keep=keep, method="random").config.num_experts == 3


def test_any_iterable_of_experts():
    model = tiny_sparse("llama")
    assert prune_experts(model, drop=(expert for expert in [1])).config.num_experts == 3
    assert prune_experts(model, drop={0: {1}, 1: iter([0])}).config.num_experts == 3


def test_layers_that_transformers_does_not_read_are_left_out(tmp_path, monkeypatch):
    """DeepSeek-V3's files hold a layer that predicts a second token, with experts that the config does not count."""
    model, inputs = stock("deepseek_v3")
    model.save_pretrained(tmp_path / "stock")
    tensors = load_file(tmp_path / "stock" / "model.safetensors")
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in last.items()}
    save_file(tensors | more, tmp_path / "stock" / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2.*"])
    prune_experts(tmp_path / "stock", drop=DROPPED, output=tmp_path / "pruned")
    assert not any("layers.2." in name for name in load_file(tmp_path / "pruned" / "model.safetensors"))
    assert_cut(model, load_whole(tmp_path / "pruned").eval(), DROPPED, inputs)


def test_some_layers_keep_some():
    model = tiny_sparse("llama")
    measured = measure_experts(model, [tiny_inputs(model, labels=False, batch=8)])
    for made in (prune_experts(model, measured, keep={1: 0.75}), merge_experts(model, measured, into={1: 3})):
        assert made.config.num_experts_per_layer == [4, 3]


def test_an_output_that_exists(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        prune_experts(tiny_sparse("llama"), drop=[0], output=tmp_path / "out")


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match="the token's id decides"):
        prune_experts(routed_model("llama", "hash"), drop=[0])
    with pytest.raises(ValueError, match="no sparse layer was found"):
        prune_experts(tiny_dense("llama"), drop=[0])
    with pytest.raises(ValueError, match=r"groups of layer 0 would have \[1, 2, 2, 2\] experts"):
        prune_experts(routed_model("llama", "groups by their best"), drop=[0])
    with pytest.raises(ValueError, match="would have 1 expert"):
        prune_experts(routed_model("llama", "groups by their best"), drop=[0, 2, 4, 6])
    with pytest.raises(ValueError, match=r"one number of experts for all layers, not \[7, 8\]"):
        prune_experts(build("mixtral"), drop={0: [0]})


# ---- layers with other numbers of experts ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_layers_may_keep_other_numbers(name, tmp_path):
    """In memory and on disk; the config says it, and what was cut loads, trains and is cut again."""
    model = tiny_sparse(name)
    drop = {0: [1], 1: [0, 2]}
    pruned, inputs = prune_experts(model, drop=drop), tiny_inputs(model, labels=False, pads=2)
    counts = [3, 2, *[4] * (len(model.sparse_blocks) - 2)]
    assert pruned.config.num_experts_per_layer == counts
    assert pruned.config.num_experts == max(counts)
    assert_cut(model, pruned, drop, inputs)
    model.save_pretrained(tmp_path / "mixture")
    prune_experts(tmp_path / "mixture", drop=drop, output=tmp_path / "pruned")
    loaded = type(model).from_pretrained(tmp_path / "pruned")
    assert torch.equal(outputs(loaded, inputs), outputs(pruned, inputs))
    assert count_parameters(loaded) == sum(parameter.numel() for parameter in loaded.parameters())
    assert prune_experts(loaded, keep=2, method="random").config.num_experts_per_layer is None


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_uneven_layers_train(scope):
    fields = {"balance_scope": scope, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}
    model = prune_experts(tiny_sparse("llama", **fields), drop={0: [1]}).train()
    loss = model(**tiny_inputs(model, pads=2)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in model.sparse_blocks)


@pytest.mark.slow
def test_uneven_layers_by_remote_code(tmp_path):
    model = prune_experts(tiny_sparse("llama"), drop={0: [1]})
    model.save_pretrained(tmp_path / "uneven")
    inputs = tiny_inputs(model, labels=False)
    (tmp_path / "inputs.json").write_text(json.dumps({name: value.tolist() for name, value in inputs.items()}))
    code = f"""
import json, sys, torch
sys.modules["hf_sparse_moe"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "uneven")!r}, trust_remote_code=True).eval()
inputs = json.load(open({str(tmp_path / "inputs.json")!r}))
with torch.no_grad():
    torch.save(model(**{{name: torch.tensor(value) for name, value in inputs.items()}}).logits, sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "logits"], check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), outputs(model, inputs))


def test_uneven_layers_where_they_cannot_be():
    model = prune_experts(tiny_sparse("llama"), drop={0: [1]})
    assert not explain_export(model).possible
    with pytest.raises(ValueError, match="needs as many experts in each layer"):
        prune_experts(routed_model("bert", "expert choice"), drop={0: [1]})
    with pytest.raises(ValueError, match=r"`num_experts_per_layer=.* is not allowed"):
        tiny_config("llama", num_experts_per_layer=[4, 9])
    with pytest.raises(ValueError, match="has 3 entries for 2 sparse layers"):
        tiny_config("llama", num_experts_per_layer=[4, 3, 4])
