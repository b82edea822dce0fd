"""What is measured of experts is what a count by hand gives; who stays follows from it."""

import itertools
import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_sparse_moe import disable_experts, expand, measure_experts, merge_experts, prune_experts, to_dense
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.routing import find_mixture_layers, observe_routing
from hf_sparse_moe.surgery import ExpertMeasurements
from hub_checkpoints import save_mixture
from models.router_kinds import routed_model
from routing.test_mixture_layers import build, inputs_of
from tiny_models import enlarge_weights, tiny_dense, tiny_inputs, tiny_sparse


GROUPS = ["law", "code", "law", "law"]


def batches(model) -> list[dict]:
    return [tiny_inputs(model, labels=False, pads=2), tiny_inputs(model, labels=False, length=5, seed=1)]


def of_expert(experts, expert: int, token: torch.Tensor) -> torch.Tensor:
    """f_e(x) by the formula, for the experts of Llama and Mixtral."""
    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
    return experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)


@torch.no_grad()
def by_hand(model, inputs: list[dict], groups: list[str]) -> list[dict[str, torch.Tensor]]:
    """Of each layer, token by token: sums by group and expert."""
    layers, names = find_mixture_layers(model), list(dict.fromkeys(groups))
    sums = ("tokens", "weights", "norms", "weighted_norms")
    found = [{name: torch.zeros(len(names), layer.num_experts).double() for name in sums} for layer in layers]
    left = list(groups)
    for batch in inputs:
        states, routed = {}, []
        handles = [
            layer.experts.register_forward_pre_hook(lambda _, args, n=n, states=states: states.update({n: args[0]}))
            for n, layer in enumerate(layers)
        ]
        with observe_routing(layers, lambda layer, routing, routed=routed: routed.append(routing)):
            model(**batch)
        for handle in handles:
            handle.remove()
        mask = batch["attention_mask"]
        rows, left = left[: len(mask)], left[len(mask) :]
        for number, routing in enumerate(routed):
            for token in mask.flatten().nonzero().flatten().tolist():
                group = names.index(rows[token // mask.shape[1]])
                weights = routing.top_k_weights[token] / routing.top_k_weights[token].sum()
                for expert, weight in zip(routing.top_k_index[token].tolist(), weights.tolist(), strict=True):
                    norm = of_expert(layers[number].experts, expert, states[number][token]).norm().item()
                    for name, value in zip(sums, (1, weight, norm, weight * norm), strict=True):
                        found[number][name][group, expert] += value
    return found


@pytest.mark.parametrize("kind", ["softmax", "sigmoid, not normalised", "groups by their best two", "mixtral"])
def test_sums_equal_those_by_hand(kind):
    model = enlarge_weights(build("mixtral")).eval() if kind == "mixtral" else routed_model("llama", kind)
    measured = measure_experts(model, batches(model), GROUPS)
    assert measured.groups == ("law", "code")
    for layer, expected in zip(measured.layers, by_hand(model, batches(model), GROUPS), strict=True):
        for name, values in expected.items():
            torch.testing.assert_close(layer.tensors[name], values, rtol=1e-4, atol=1e-4)
        served = expected["tokens"].sum(dim=0)
        torch.testing.assert_close(
            layer.reap, expected["weighted_norms"].sum(dim=0) / served.clamp(min=1), rtol=1e-4, atol=1e-4
        )
        assert layer.frequency.sum() == pytest.approx(1)


def test_what_experts_have_in_common():
    """On sampled tokens: an expert that is another one's copy is alike, and its mean output is the same."""
    model = tiny_sparse("llama")
    with torch.no_grad():
        for block in model.sparse_blocks:
            for weight in (block.experts.gate_up_proj, block.experts.down_proj):
                weight[2] = weight[0]
    layer = measure_experts(model, batches(model)).layers[0]
    similarity = layer.tensors["similarity"]
    assert similarity[0, 2] == pytest.approx(1, abs=1e-5)
    assert similarity[0, 1] < 0.9
    torch.testing.assert_close(layer.tensors["mean_outputs"][0], layer.tensors["mean_outputs"][2])
    assert not torch.allclose(layer.tensors["mean_outputs"][0], layer.tensors["mean_outputs"][1])


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_losses_are_the_model_s_own(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, pads=2)
    losses = measure_experts(model, [inputs], ["a", "b"]).losses
    with torch.no_grad():
        expected = model(**inputs).loss.item()
    assert losses["all"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert losses["a"]["labels"] + losses["b"]["labels"] == losses["all"]["labels"]
    mean = sum(losses[group]["loss"] * losses[group]["labels"] for group in "ab") / losses["all"]["labels"]
    assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("folder", ["mixtral", "gpt_oss", "dbrx", "switch_transformers", "jetmoe", "llama4"])
def test_saved_and_read(folder, tmp_path):
    model = enlarge_weights(build(folder)).eval()
    measured = measure_experts(model, [inputs_of(model)])
    again = ExpertMeasurements.load(measured.save(tmp_path / "measured.safetensors"))
    assert json.loads(json.dumps(again.to_dict())) == json.loads(json.dumps(measured.to_dict()))
    for before, after in zip(measured.layers, again.layers, strict=True):
        assert before.tensors.keys() == after.tensors.keys()
        assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    with pytest.raises(FileExistsError):
        measured.save(tmp_path / "measured.safetensors")


def test_rare_experts_are_named(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    model = tiny_sparse("llama")
    counts = measure_experts(model, batches(model)).layers[0].tokens
    assert f"0 of `dense.model.layers.0.mlp` ({int(counts[0])})" in caplog.text
    caplog.clear()
    measure_experts(model, batches(model) * 30)
    assert "of `dense" not in caplog.text


# ---- who stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["reap", "ean", "frequency"])
def test_the_lowest_scores_go(method, tmp_path):
    model = routed_model("llama", "softmax", num_experts=8)
    path = measure_experts(model, batches(model)).save(tmp_path / "measured.safetensors")
    model.save_pretrained(tmp_path / "mixture")
    report = prune_experts(tmp_path / "mixture", path, keep=0.5, method=method, output=tmp_path / "pruned")
    scores = [layer.score(method) for layer in ExpertMeasurements.load(path).layers]
    for kept, score in zip(report.receipt["pruned"]["kept"].values(), scores, strict=True):
        assert kept == sorted(score.topk(4).indices.tolist())
    pruned = prune_experts(model, path, keep=4, method=method)
    assert pruned.receipt["pruned"]["kept"] == report.receipt["pruned"]["kept"]


KINDS = ["softmax", "softmax, not normalised", "sigmoid", "sigmoid, not normalised", "groups by their best"]


@pytest.mark.parametrize("kind", KINDS)
def test_naee_takes_the_subset_that_changes_the_layer_least(kind):
    model = routed_model("llama", kind, num_experts=8, n_group=2, topk_group=1) if "groups" in kind else None
    model = model or routed_model("llama", kind)
    inputs, block = batches(model), model.sparse_blocks[0]
    experts = range(block.experts.num_experts)
    choices = itertools.combinations(experts, 1) if len(experts) == 4 else itertools.product(range(4), range(4, 8))
    with torch.no_grad():
        changes = {gone: sum(change(model, block, batch, gone) for batch in inputs) for gone in choices}
    best = min(changes, key=changes.get)
    kept = [expert for expert in experts if expert not in best]
    pruned = prune_experts(model, measure_experts(model, inputs), keep=len(kept), method="naee")
    assert next(iter(pruned.receipt["pruned"]["kept"].values())) == kept


def change(model, block, batch, gone) -> float:
    """How far the layer's output moves, over the tokens that count."""
    outputs, inputs = [], []

    def see(_, args, output):
        inputs.append(args[0])
        outputs.append(output)

    handle = block.register_forward_hook(see)
    model(**batch)
    with disable_experts(model, {0: gone}):
        model(**batch)
    handle.remove()
    assert torch.equal(*inputs)
    return float(((outputs[0] - outputs[1]).square().sum(dim=-1) * batch["attention_mask"]).sum())


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_measurements_of_another_model(tmp_path):
    model = tiny_sparse("llama")
    measured = measure_experts(model, batches(model))
    with pytest.raises(ValueError, match=r"no layer `dense\.transformer"):
        prune_experts(tiny_sparse("gpt2"), measured, keep=3)
    with pytest.raises(ValueError, match="had 4 experts, 2 a token, and has 8"):
        prune_experts(tiny_sparse("llama", num_experts=8), measured, keep=3)
    with torch.no_grad():
        model.sparse_blocks[1].gate.weight[0] += 1
    with pytest.raises(ValueError, match=r"router of `dense\.model\.layers\.1\.mlp` has other weights"):
        prune_experts(model, measured, keep=3)
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ValueError, match="has other weights"):
        prune_experts(tmp_path / "mixture", measured, keep=3, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mixture"]


def test_a_model_in_another_dtype_has_the_same_measurements(tmp_path):
    tiny_sparse("llama").save_pretrained(tmp_path / "mixture")
    model = tiny_sparse("llama").bfloat16()
    measured = measure_experts(model, batches(model))
    prune_experts(tmp_path / "mixture", measured, keep=3, output=tmp_path / "out")


def test_bad_text():
    model = tiny_sparse("llama")
    with pytest.raises(ValueError, match="of another tokenizer"):
        measure_experts(model, [{"input_ids": torch.tensor([[1, 2, 1000]])}])
    with pytest.raises(ValueError, match="no `input_ids`"):
        measure_experts(model, [{"inputs_embeds": torch.zeros(1, 2, 32)}])
    with pytest.raises(ValueError, match="all of `batches` are pads"):
        measure_experts(model, [{name: torch.zeros(1, 4).long() for name in ("input_ids", "attention_mask")}])
    with pytest.raises(ValueError, match="the name of all groups together"):
        measure_experts(model, batches(model), ["all", "law", "law", "law"])
    with pytest.raises(ValueError, match="`batches` is empty"):
        measure_experts(model, [])
    with pytest.raises(ValueError, match="`groups` has 1 entries"):
        measure_experts(model, batches(model), ["a"])
    with pytest.raises(ValueError, match="no sparse layer"):
        measure_experts(tiny_dense("llama"), batches(model))
    block = model.sparse_blocks[1]
    handle = block.register_forward_pre_hook(lambda _, args: (args[0] * torch.nan, *args[1:]))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp` computed NaN or infinity"):
        measure_experts(model, batches(model))
    with pytest.raises(ValueError, match="The loss on this text is NaN"):
        prune_experts(model, drop=[0], evaluation=(batches(model), None))
    handle.remove()
    with torch.no_grad():
        block.experts.down_proj[:] = torch.nan
    with pytest.raises(ValueError, match="computed NaN or infinity"):
        measure_experts(model, batches(model))


def test_text_of_another_tokenizer(tmp_path, caplog, monkeypatch):
    """Known where the tokenizer is given, by its vocabulary; else guessed from the loss."""
    save_mixture(tmp_path / "mixture", "llama")
    save_mixture(tmp_path / "other", "llama")
    own, words = AutoTokenizer.from_pretrained(tmp_path / "mixture"), {"[UNK]": 0, "[PAD]": 1, "other": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    other.save_pretrained(tmp_path / "other")
    model = load_whole(tmp_path / "mixture")
    with pytest.raises(ValueError, match="of another tokenizer"):
        measure_experts(model, batches(model), tokenizer=other)
    measured = measure_experts(model, batches(model), tokenizer=own)
    again = ExpertMeasurements.load(measured.save(tmp_path / "measured"))
    assert again.vocabulary_sha256 == measured.vocabulary_sha256
    calls = {
        "prune": lambda folder: prune_experts(folder, again, keep=3, output=tmp_path / "out"),
        "merge": lambda folder: merge_experts(folder, again, into=3, output=tmp_path / "out"),
        "expand": lambda folder: expand(folder, 2, by=again, output=tmp_path / "out"),
        "to_dense": lambda folder: to_dense(folder, again, output=tmp_path / "out"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="of another tokenizer"):
            call(tmp_path / "other")
        assert not (tmp_path / "out").exists(), name
    calls["prune"](tmp_path / "mixture")
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    head = model.get_output_embeddings().weight
    for scale, is_told in ((1000.0, True), (0.0, False)):  # a loss far above guessing, then that of guessing
        with torch.no_grad():
            head.mul_(scale)
        caplog.clear()
        measure_experts(model, batches(model))
        assert ("above the 4.6 of guessing" in caplog.text) == is_told


def test_a_file_of_something_else(tmp_path):
    tiny_sparse("llama").save_pretrained(tmp_path / "mixture")
    (tmp_path / "text").write_text("no tensors")
    for path in (tmp_path / "mixture" / "model.safetensors", tmp_path / "text", tmp_path / "mixture"):
        with pytest.raises(ValueError, match="does not hold what `measure_experts` measured"):
            prune_experts(tmp_path / "mixture", path, keep=3, output=tmp_path / "out")


def test_what_a_method_cannot_choose_by():
    jetmoe = build("jetmoe").eval()
    measured = measure_experts(jetmoe, [inputs_of(jetmoe)])
    with pytest.raises(ValueError, match="cannot be called one by one"):
        prune_experts(jetmoe, measured, keep=6)
    for merging in ("hc", "m-smoe", "ream"):
        with pytest.raises(ValueError, match="cannot be called one by one"):
            merge_experts(jetmoe, measured, into=6, method=merging)
    prune_experts(jetmoe, measured, keep=6, method="frequency")
    model = routed_model("llama", "softmax", num_experts=32)
    measured = measure_experts(model, batches(model))
    with pytest.raises(ValueError, match=r"would try 601,080,390 subsets of the 32 experts"):
        prune_experts(model, measured, keep=16, method="naee")
