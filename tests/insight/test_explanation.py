"""What `explain_routing` says is what a count by hand, a switch and a loss say; bad input ends in a sentence."""

import hashlib
import html
import json
import re

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe import disable_experts, explain_routing, routing_statistics, write_model_card
from hf_sparse_moe.insight.definitions import layer_facts
from hf_sparse_moe.insight.texts import read_texts
from insight.conftest import GROUPS, TEXTS, VOCAB_SIZE
from models.router_kinds import ROUTERS
from routing.test_balance_fix import STOCK, stock
from tiny_models import tiny_dense


def shown_text(page):
    return html.unescape(re.sub(r"<style>.*?</style>|<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL))


def assert_counts_are_those_of_the_statistics(model, tokenizer, explained):
    batches = [batch.inputs for batch in read_texts(model, tokenizer, TEXTS, GROUPS, None, 512, 4).batches]
    expected = routing_statistics(model, batches, GROUPS)
    found = {layer.side: [] for layer in expected.layers}
    for layer in explained.statistics.layers:
        found[layer.side].append(layer.counts.tolist())
    for layer in expected.layers:
        assert found[layer.side][layer.position] == layer.counts.tolist()


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_counts_of_ours(name, mixture, tokenizer):
    model = mixture(name)
    explained = explain_routing(model, tokenizer, TEXTS, GROUPS)
    assert_counts_are_those_of_the_statistics(model, tokenizer, explained)
    sides = {"t5": {"encoder", "decoder"}, "bart": {"encoder", "decoder"}, "bert": {"encoder"}, "llama": {"decoder"}}
    assert set(explained.measurement.tokens) == sides[name]


@pytest.mark.parametrize("name", STOCK)
def test_counts_of_stock(name, tokenizer):
    model = stock(name, top_k=1 if name == "Switch" else 2, vocab_size=VOCAB_SIZE).eval()
    explained = explain_routing(model, tokenizer, TEXTS, GROUPS)
    assert_counts_are_those_of_the_statistics(model, tokenizer, explained)
    said = [line for line in explained.measurement.left_out if "outputs" in line]
    assert bool(said) == (name == "Switch")  # which calls its experts with masks
    assert "<!DOCTYPE html>" in explained.to_html()


@pytest.mark.parametrize("kind", ["hash", "expert choice", "expert choice, capacity", "capacity", "sigmoid", "cosine"])
def test_every_router(kind, mixture, tokenizer):
    explained = explain_routing(mixture("bert", **ROUTERS[kind]), tokenizer, TEXTS, GROUPS)
    for layer in explained.measurement.layers:
        known = layer.index >= 0
        assert (np.diff(layer.weights, axis=1) <= 1e-6).all()
        assert known.any()
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in layer.index)
    json.dumps(explained.to_dict(), allow_nan=False)
    explained.to_html()


@pytest.mark.parametrize("name", ["llama", "t5", *STOCK])
def test_the_loss_without_an_expert(name, mixture, tokenizer):
    top_k = 1 if name == "Switch" else 2
    model = stock(name, top_k, vocab_size=VOCAB_SIZE).eval() if name in STOCK else mixture(name)
    found = explain_routing(model, tokenizer, TEXTS, GROUPS, ablate=True, batch_size=6)
    batch = read_texts(model, tokenizer, TEXTS, GROUPS, None, 512, 6).batches[0]

    def loss():
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()

    whole = loss()
    for place, layer in enumerate(found.to_dict()["layers"]):
        for expert, added in enumerate(layer["added_loss"]["all groups"]):
            with disable_experts(model, {place: [expert]}):
                assert added == pytest.approx(loss() - whole, abs=1e-5)


def test_an_encoders_loss_is_of_masked_tokens(mixture, tokenizer):
    found = explain_routing(mixture("bert"), tokenizer, TEXTS * 3, GROUPS * 3, ablate=True)
    masked, read = found.measurement.ablation.tokens.sum(), len(found.measurement.tokens["encoder"].ids)
    assert 0.05 * read < masked < 0.3 * read
    assert np.isfinite(found.facts[0].added[0]).all()
    assert (found.facts[0].added[0] != 0).any()


def test_a_model_that_did_not_change_is_saturated(mixture, tokenizer, tmp_path):
    model = mixture("llama")
    for step, seed in ((10, 1), (20, None)):
        if seed is not None:
            earlier = mixture("llama")
            with torch.no_grad():
                for block in earlier.sparse_blocks:
                    nn.init.normal_(block.gate.weight, generator=torch.Generator().manual_seed(seed))
            earlier.save_pretrained(tmp_path / f"checkpoint-{step}")
        else:
            model.save_pretrained(tmp_path / f"checkpoint-{step}")
    log = [{"step": s, "router/entropy": 0.9, "task_loss": 3.0 - s / 100} for s in (10, 20)]
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    paths = [tmp_path / "checkpoint-10", tmp_path / "checkpoint-20"]
    found = explain_routing(model, tokenizer, TEXTS, GROUPS, checkpoints=paths)
    first, last = found.to_dict()["history"]
    assert all(share < 1 for share in first["saturation"])
    assert last["saturation"] == [1.0, 1.0]
    assert "task_loss, from the monitor" in found.to_html()


def test_groups_of_words(mixture, tokenizer):
    words = [["The", "court", "rules"], ["A", "fine", "law"]] * 3
    tags = [["DET", "NOUN", "VERB"], ["DET", "ADJ", "NOUN"]] * 3
    found = explain_routing(mixture("llama"), tokenizer, words, tags)
    tokens = found.measurement.tokens["decoder"]
    named = [(found.measurement.groups[g], found.measurement.texts[t][a:b].strip()) for g, t, (a, b) in
             zip(tokens.group, tokens.text, tokens.span, strict=True)]  # fmt: skip
    spelled = {}
    for group, piece in named:
        spelled[group] = spelled.get(group, "") + piece
    assert spelled == {"DET": "TheA" * 3, "NOUN": "courtlaw" * 3, "VERB": "rules" * 3, "ADJ": "fine" * 3}


def test_foreign_text_is_text(mixture, tokenizer):
    found = explain_routing(
        mixture("llama"), tokenizer, TEXTS, ["<img src=x>", "b"] * 3, about={"Model": "</td><script>"}
    )
    page = found.to_html()
    assert page.count("<script") == 1 + len(found.measurement.tokens)  # ours, and the packed arrays
    assert "<img" not in page
    assert "alert(1)" in shown_text(page)
    assert not re.search(r"(src|href)=.(https?:)?//", page)


def test_page_and_dict_agree(mixture, tokenizer):
    found = explain_routing(mixture("llama"), tokenizer, TEXTS, GROUPS)
    text = " ".join(shown_text(found.to_html()).split())
    for layer in found.to_dict()["layers"]:
        for expert, load in enumerate(layer["load"]):
            assert f"{layer['label']}, expert {expert} load {load * 4:.1f}×" in text
    for sentence in found.to_dict()["verdict"]:
        assert sentence in text


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "Mixtral"])
def test_it_takes_one_forward_pass_of_the_data(name, mixture, tokenizer):
    """And with `ablate` one more for each expert, and one with all, as the command says beforehand."""
    model = stock(name, vocab_size=VOCAB_SIZE) if name in STOCK else mixture(name)
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    explain_routing(model, tokenizer, TEXTS, GROUPS, batch_size=4).to_html()
    assert calls == [4, 2]
    calls.clear()
    explained = explain_routing(model, tokenizer, TEXTS, GROUPS, batch_size=6, ablate=True)
    experts = sum(layer.num_experts for layer in explained.measurement.layers)
    assert calls == [6] * (1 + 1 + experts)


def test_the_picture(mixture, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    path = explain_routing(mixture("llama"), tokenizer, TEXTS, GROUPS).plot(tmp_path / "load.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


class TestBadInput:
    def test_no_sparse_layer(self, tokenizer):
        with pytest.raises(ValueError, match="no sparse layer was found"):
            explain_routing(tiny_dense("llama"), tokenizer, TEXTS)

    def test_no_tokenizer(self, mixture):
        with pytest.raises(ValueError, match=r"Pass `AutoTokenizer"):
            explain_routing(mixture("llama"), None, TEXTS)

    @pytest.mark.parametrize("texts", [[], [""], ["", " \n"]])
    def test_no_text(self, texts, mixture, tokenizer):
        with pytest.raises(ValueError, match="none of which has a token"):
            explain_routing(mixture("llama"), tokenizer, texts)

    def test_an_empty_text_among_others(self, mixture, tokenizer):
        found = explain_routing(mixture("llama"), tokenizer, ["", *TEXTS])
        assert "1 of 7 texts are empty." in found.to_html()

    def test_one_token(self, mixture, tokenizer):
        found = explain_routing(mixture("llama"), tokenizer, ["A"], ablate=True)
        assert len(found.measurement.tokens["decoder"].ids) == 1
        json.dumps(found.to_dict(), allow_nan=False)
        assert "dead expert" in found.to_html()

    def test_a_hash(self, mixture, tokenizer):
        model = mixture("llama", router_type="hash")
        with pytest.raises(ValueError, match="`ablate=True` is not allowed"):
            explain_routing(model, tokenizer, TEXTS, ablate=True)
        assert "Routers, SHA-256" not in explain_routing(model, tokenizer, TEXTS).to_html()

    @pytest.mark.parametrize("name", ["llama", "bert", "roberta", "gpt2"])
    def test_a_text_longer_than_the_model(self, name, mixture, tokenizer):
        found = explain_routing(mixture(name), tokenizer, ["law " * 500, "law"])
        assert "1 of 2 texts are longer than" in found.to_html()
        assert len(found.measurement.tokens[found.measurement.layers[0].side].ids) <= 66

    def test_other_numbers_of_groups(self, mixture, tokenizer):
        with pytest.raises(ValueError, match="`groups` has 1 entries, `texts` has 6"):
            explain_routing(mixture("llama"), tokenizer, TEXTS, ["one"])

    def test_a_router_that_cannot_be_observed(self, mixture, tokenizer):
        """A layer whose rows are not the tokens, as where some are dropped ahead of it."""
        model = mixture("llama")
        block = model.sparse_blocks[0]
        whole = block.forward
        block.forward = lambda hidden_states: nn.functional.pad(whole(hidden_states[:, 1:]), (0, 0, 1, 0))
        found = explain_routing(model, tokenizer, TEXTS)
        assert [layer.label for layer in found.measurement.layers] == ["layer_1"]
        assert "layer_0 (`dense.model.layers.0.mlp`): what its router chooses for a token cannot be observed" in (
            html.unescape(found.to_html())
        )
        block = model.sparse_blocks[1]
        other = block.forward
        block.forward = lambda hidden_states: nn.functional.pad(other(hidden_states[:, 1:]), (0, 0, 1, 0))
        with pytest.raises(ValueError, match="cannot be observed token by token"):
            explain_routing(model, tokenizer, TEXTS)

    def test_a_thousand_experts(self, mixture, tokenizer):
        model = mixture("llama", num_experts=1000, moe_intermediate_size=4)
        page = explain_routing(model, tokenizer, TEXTS, GROUPS).to_html()
        assert len(page) < 5e6
        assert "The cards show 512 of 2000 experts" in page

    def test_tokens_that_are_bytes(self, mixture, tokenizer):
        text = "法律 عدالة"
        found = explain_routing(mixture("llama"), tokenizer, [text] * 5)
        assert "E6" in found.labels.values()  # the first byte of 法
        page = found.to_html()
        assert text in re.sub(r"<[^>]+>|·", "", page)  # readable, a dot for each further byte
        assert '<p dir="auto">' in page

    def test_no_expert_to_spare(self, mixture, tokenizer):
        found = explain_routing(mixture("llama", num_experts_per_tok=4), tokenizer, TEXTS, ablate=True)
        assert "no layer can do without one of its experts" in found.to_html()
        assert found.to_dict()["layers"][0]["added_loss"]["all groups"] == [None] * 4


def test_the_command(mixture, tokenizer, tmp_path):
    mixture("llama").save_pretrained(tmp_path / "mixture")
    tokenizer.save_pretrained(tmp_path / "mixture")
    rows = [{"text": text, "kind": group} for text, group in zip(TEXTS, GROUPS, strict=True)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prose.txt").write_text("One paragraph.\n\nAnother.")
    page = tmp_path / "routing.html"
    arguments = ("look", tmp_path / "mixture", "--data", tmp_path / "data.jsonl", "-o", page)
    finished = run_cli(*arguments, "--group-by", "kind", "--ablate", "--json")
    assert finished.code == 0, finished.err
    assert "9 more passes over 6 texts" in finished.err
    assert json.loads(finished.out)["groups"] == ["law", "code"]
    assert "hf-sparse-moe look mixture --data data.jsonl" in page.read_text().replace(str(tmp_path), "")
    assert str(tmp_path) not in page.read_text()
    assert not (tmp_path / "mixture" / "routing_statistics.json").exists()
    finished = run_cli(*arguments, "--data", tmp_path / "prose.txt", "-o", tmp_path / "mixture" / "routing.html")
    assert finished.code == 0, finished.err
    assert "The page is" in finished.out
    assert "## Routing" in write_model_card(tmp_path / "mixture", "user/name").read_text()
    assert_one_sentence(run_cli(*arguments, "--group-by", "language"), "no column `language`")
    assert_one_sentence(run_cli("look", tmp_path / "mixture", "--data", tmp_path / "none.csv"), "names no file")


def footer(page):
    rows = re.findall(r'<tr><th scope="row">([^<]+)</th><td>([^<]*)</td></tr>', page[page.index("<footer") :])
    return {name: html.unescape(value) for name, value in rows}


def test_the_command_on_a_stock_folder(tokenizer, tmp_path):
    """Its cost is said before the first pass; the footer names what anyone needs to repeat the page."""
    folder, data, path = tmp_path / "stock", tmp_path / "law.txt", tmp_path / "routing.html"
    stock("Qwen3-MoE", vocab_size=VOCAB_SIZE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text("\n\n".join(TEXTS[::2]))
    finished = run_cli("look", folder, "--data", data, "--ablate", "-o", path, "--json", bars=True)
    assert finished.code == 0, finished.err
    found = json.loads(finished.out)
    passes = 1 + sum(layer["num_experts"] for layer in found["layers"])
    said = finished.err.index(f"--ablate: {passes} more passes over 3 texts")
    assert said < finished.err.index("route:") < finished.err.index("disable experts:")
    assert f"{passes - 1}/{passes - 1}" in finished.err
    assert "checkpoints:" not in finished.err  # there are none
    assert all(np.isfinite(layer["added_loss"]["all groups"]).all() for layer in found["layers"])
    tokens = sum(len(tokenizer(text).input_ids) for text in TEXTS[::2])
    assert found["tokens"] == {"decoder": tokens}
    assert found["about"] == footer(path.read_text())
    assert {name: found["about"][name] for name in ("Model", "Weights, SHA-256", "Data", "Files", "Command")} == {
        "Model": "stock (Qwen3MoeForCausalLM)",
        "Weights, SHA-256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "Data": f"3 texts, 1 group, {tokens} decoder tokens",
        "Files": "law.txt",
        "Command": "hf-sparse-moe look stock --data law.txt --ablate -o routing.html --json",
    }
    for package in (transformers, torch, np):
        assert f"{package.__name__} {package.__version__}" in found["about"]["Versions"]


def test_data_and_routers_are_named_by_their_hash(mixture, tokenizer):
    about = explain_routing(mixture("llama"), tokenizer, TEXTS, about={"Data": "laws"}).about
    assert about["Data"] == "laws"
    model = mixture("llama")
    assert explain_routing(model, tokenizer, TEXTS).about["Routers, SHA-256"] == about["Routers, SHA-256"]
    with torch.no_grad():
        model.sparse_blocks[0].gate.weight += 1
    other = explain_routing(model, tokenizer, [*TEXTS, "More."]).about
    assert all(other[name] != about[name] for name in ("Routers, SHA-256", "Data, SHA-256"))


def test_facts_do_not_depend_on_the_batches(mixture, tokenizer):
    model = mixture("llama")
    one, six = (explain_routing(model, tokenizer, TEXTS, GROUPS, batch_size=size).measurement for size in (1, 6))
    for place in range(2):
        for name in ("counts", "lift", "lift_low"):
            np.testing.assert_allclose(getattr(layer_facts(one, place), name), getattr(layer_facts(six, place), name))
