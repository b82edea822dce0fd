"""The card says what the checkpoint says, and nothing that others wrote can break out of its place."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.hub import render_model_card, write_model_card
from hf_sparse_moe.hub.checkpoint import Checkpoint
from hf_sparse_moe.routing.statistics import routing_statistics
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse


EVIL = "\\| x\n---\nlicense: mit\n# Heading <script>alert(1)</script> `code` | cell {{ 7 * 7 }} [a](b)\u202eback -->"
# Each line of a card is one of these, code blocks apart.
FORMS = (
    r"",
    r"#{1,2} [^#\n].*",
    r"\| .* \|",
    r"- [A-Za-z0-9].*",
    r"<!-- .* -->",
    r"[A-Z`].*[.:]",
    r"!\[.*\]\(expert_load\.png\)",
)


def rows(card: str) -> dict[str, str]:
    """The cells of the card's two-column tables."""
    lines = [line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and line.endswith(" |")]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def outside_code(card: str) -> str:
    return re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)


def headings(card: str) -> list[str]:
    return re.findall(r"^#.*", outside_code(ModelCard(card).text), re.MULTILINE)


RECORD = {
    "training": {"data": ["corpus"], "rows": 3, "steps": 2, "last_log": {"loss": 1.0, "router/entropy": 0.5}},
    "hyperparameters": {"learning_rate": 0.1, "fp16": False},
    "hardware": {"device": "cpu"},
    "versions": {"torch": "1"},
    "evaluation": {
        "results": {"law": {"loss": 1.5, "accuracy": 0.25}, "code": {"loss": 2.5}},
        "metrics": "F1 is the macro average",
    },
}


NAMES = [
    *(
        "training",
        "evaluation",
        "results",
        "data",
        "log",
        "layers",
        "load",
        "dead_experts",
        "group_load",
        "card",
        "side",
    ),
    *("source", "name_or_path", "revision", "sha256", "versions", "equality", "max_abs_difference", "arguments"),
    *("hardware", "hyperparameters", "last_log", "seconds", "tags", "language", "license", "base_model", "datasets"),
    *("model-index", "eval_results", "library_name", "loss", "date", "metrics", "entropy"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A model of each family in a folder, sharded, with all that may lie beside its weights."""
    return save(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same for one family."""
    return save("bert", tmp_path_factory)


def save(name, tmp_path_factory):
    model = tiny_sparse(name)
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model.receipt = {"source": {"name_or_path": "a/b", "revision": "86b5e09", "sha256": {}}, "arguments": {"seed": 7}}
    model.save_pretrained(folder, max_shard_size="20KB")
    statistics = routing_statistics(model, [tiny_inputs(model, batch=4)], ["law", "law", "code", "code"])
    (folder / "routing_statistics.json").write_text(json.dumps(statistics.to_dict()))
    (folder / "training_record.json").write_text(json.dumps(RECORD))
    (folder / "expert_load.png").write_bytes(b"")
    return model, folder, statistics


@pytest.fixture
def folder(one, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(one[1], tmp_path / "copy"))


@pytest.fixture(scope="module")
def plain():
    return render_model_card(tiny_sparse("bert"), "tester/card")


def test_numbers_are_those_of_the_model():
    model = tiny_sparse("bert", num_experts=8, num_experts_per_tok=3, mlp_layer_types=["sparse", "dense"])
    facts = rows(render_model_card(model, "tester/card"))
    idle = sum(p.numel() * 5 // 8 for block in model.sparse_blocks for p in block.experts.parameters(recurse=False))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert facts["Parameters, total"] == f"{total:,}"
    assert facts["Parameters, active per token"].startswith(f"{total - idle:,} (")
    assert facts["FLOPs per token"].startswith(f"{model.config.flops_per_token():,} (")
    assert facts["Experts per sparse layer"] == "8 routed"
    assert facts["Routed experts per token (top-k)"] == "3"
    assert facts["Sparse layers (encoder)"] == "1 of 2: 0 (counted from 0)"
    assert facts["Precision of the weights"] == "float32"
    assert rows(render_model_card(model.bfloat16(), "tester/card"))["Precision of the weights"] == "bfloat16"


def test_what_is_unknown_is_left_out_and_how_to_use_it_comes_first(plain):
    assert headings(plain) == [
        "# tester/card",
        "## How to use",
        "## Details",
        "## Limits",
        "## Citation",
    ]
    assert "not recorded" not in plain.lower()
    assert "- No evaluation is recorded." in plain
    data = front_matter(plain)
    assert not {"license", "base_model", "base_model_relation"} & set(data)
    assert data["tags"] == ["moe", "sparse-moe", "encoder"]


def test_the_receipt_is_shown_and_its_equality_is_that_of_the_upcycling():
    model = tiny_sparse("bert")
    source = {"name_or_path": "google-bert/bert-base", "revision": "86b5e09"}
    arguments = {"method": "copy", "seed": 7, "layers": [1, 2]}
    model.receipt = {"source": source, "arguments": arguments, "equality": {"max_abs_difference": 1.25e-7}}
    card = render_model_card(model, "tester/card", license="apache-2.0", tags=["demo", "moe"])
    facts = rows(card)
    assert facts["Dense source"] == "`google-bert/bert-base`"
    assert facts["Revision of the source"] == "`86b5e09`"
    assert (facts["`method`"], facts["`seed`"], facts["`layers`"]) == ("copy", "7", "1, 2")
    assert facts["Largest difference to the dense outputs, before any training"] == "1.25e-07"
    assert "- Inherits the biases of its dense source, `google-bert/bert-base`." in card
    assert front_matter(card) == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "base_model": "google-bert/bert-base",
        "base_model_relation": "finetune",
        "pipeline_tag": "fill-mask",
        "tags": ["moe", "sparse-moe", "encoder", "upcycled", "demo"],
    }


@pytest.mark.parametrize("source", ["/home/someone/secret/bert", "some folder", "../bert"])
def test_a_local_source_is_no_base_model_and_its_folder_stays_private(source):
    model = tiny_sparse("bert")
    model.receipt = {"source": {"name_or_path": source, "revision": "86b5e09"}, "arguments": {"from": source}}
    card = render_model_card(model, "tester/card")
    assert "base_model" not in front_matter(card)
    assert "someone" not in card


def test_evaluation_of_a_dict_or_of_a_trainer_state():
    model = tiny_sparse("bert")
    assert rows(render_model_card(model, "tester/card", evaluation={"accuracy": 0.8125}))["accuracy"] == "0.8125"
    logs = [{"eval_loss": 3.0, "step": 5}, {"loss": 2.0, "step": 6}]
    logs.append({"eval_loss": 1.25, "eval_runtime": 9.0, "eval_samples_per_second": 4.0, "epoch": 2.0, "step": 10})
    facts = rows(render_model_card(model, "tester/card", evaluation=TrainerState(log_history=logs)))
    assert (facts["eval\\_loss"], facts["step"]) == ("1.25", "10")
    assert not any("runtime" in name or "second" in name for name in facts)


def test_the_model_and_the_names_are_checked():
    with pytest.raises(ValueError, match="Repo id"):
        render_model_card(tiny_sparse("bert"), 'x"); import os; ("')
    with pytest.raises(ValueError, match="Repo id"):
        render_model_card(tiny_sparse("bert"), "tester/card", base_model="a--> b")
    with pytest.raises(ValueError, match="`model` is a Linear"):
        render_model_card(torch.nn.Linear(1, 1), "tester/card")


def test_a_folder_and_its_model_have_the_same_facts(saved):
    model, folder, _ = saved
    in_folder, in_memory = (rows(render_model_card(of, "tester/tiny")) for of in (folder, model))
    own = [
        name for name in in_memory if name.startswith(("Class", "Sparse", "Experts", "Router", "Parameters", "FLOPs"))
    ]
    assert len(own) >= 7
    assert {name: in_folder[name] for name in own} == {name: in_memory[name] for name in own}
    assert len([name for name in own if name.startswith("Sparse")]) == (2 if model.config.is_encoder_decoder else 1)


def test_every_line_has_a_known_form_and_every_table_is_whole(saved):
    _, folder, statistics = saved
    card = render_model_card(folder, "tester/tiny")
    body = ModelCard(card).text.strip()
    for line in outside_code(body).splitlines():
        assert any(re.fullmatch(form, line) for form in FORMS), line
    assert "\n\n\n" not in body
    wanted = ["Details", "Limits", "Evaluation", "Training", "Upcycling", "Routing", "Citation"]
    assert headings(card) == ["# tester/tiny", *(f"## {name}" for name in ["How to use", *wanted])]
    for table in re.findall(r"(?:^\|.*\|\n)+", card, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
        assert re.fullmatch(r"\|( --- \|)+", table.splitlines()[1])
    assert "| part of the evaluation data | loss | accuracy |" in card
    assert "| law | 1.5 | 0.25 |\n| code | 2.5 | – |" in card
    assert "| Metrics | F1 is the macro average |" in card
    assert "`fp16`" not in card
    for layer in statistics.layers:
        assert f"| {layer.side} {layer.position} | {layer.entropy:.3f} | {layer.max_violation:.3f} |" in card
    assert "![" in card
    assert "`router/entropy`" not in card  # of the training; what was counted on text is better


def test_its_code_runs(saved, tmp_path, monkeypatch):
    model, folder, _ = saved
    (tmp_path / "tester").mkdir()
    (tmp_path / "tester" / "tiny").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    card = render_model_card(folder, "tester/tiny")
    blocks = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        namespace: dict = {}
        exec(block, namespace)
        assert namespace["model"].config.num_experts == model.config.num_experts
    for line in re.findall(r"^```bash\n(hf-sparse-moe .*)\n```", card, re.MULTILINE):
        assert run_cli(*line.split()[1:]).code == 0


def evil_record(place: str) -> dict:
    record = json.loads(json.dumps(RECORD))
    evaluation = record["evaluation"]
    {
        "data": lambda: record["training"].update(data=[EVIL]),
        "hyperparameter": lambda: record["hyperparameters"].update({EVIL: EVIL}),
        "result": lambda: evaluation["results"].update({EVIL: {"loss": EVIL, EVIL: 1.0}}),
        "evaluation": lambda: evaluation.update(data={"law": {"data": [EVIL]}}, date=EVIL, metrics=EVIL),
        "version": lambda: record["versions"].update({EVIL: EVIL}),
        "card": lambda: record.update(card={"license": EVIL, "language": [EVIL], "tags": [EVIL]}),
    }.get(place, lambda: None)()
    return record


PLACES = ["data", "hyperparameter", "result", "evaluation", "version", "card"]


@pytest.mark.parametrize("place", [*PLACES, "routing", "receipt", "source", "label", "given", "metadata"])
def test_text_of_others_stays_in_its_place(one, folder, place):
    routing, given, previous = one[2].to_dict(), {}, []
    if place == "routing":
        routing["layers"][0] |= {"group_load": {EVIL: [1.0]}, "side": EVIL}
    elif place == "receipt":
        (folder / "receipt.json").write_text(
            json.dumps({"arguments": {EVIL: EVIL, "method": EVIL}, "versions": {EVIL: EVIL}})
        )
    elif place == "source":
        source = {"name_or_path": EVIL, "revision": EVIL, "sha256": {"model.safetensors": EVIL, EVIL: EVIL}}
        (folder / "receipt.json").write_text(json.dumps({"source": source}))
    elif place == "label":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": EVIL, "1": "b"}}))
    elif place == "given":
        given = {"evaluation": {EVIL: EVIL}, "license": EVIL, "tags": [EVIL]}
    elif place == "metadata":
        previous = [f"---\nlicense: {json.dumps(EVIL)}\nbase_model: {json.dumps(EVIL)}\nx: {json.dumps(EVIL)}\n---\n"]
    (folder / "training_record.json").write_text(json.dumps(evil_record(place)))
    (folder / "routing_statistics.json").write_text(json.dumps(routing))
    card = render_model_card(folder, "tester/tiny", previous=previous, **given)
    body = ModelCard(card).text.strip()
    assert "<script>" not in body
    assert "\u202e" not in body
    assert "49" not in body.split("## Citation")[1]
    assert body.count("-->") == 3  # those of the card itself
    wanted = headings(render_model_card(one[1], "tester/tiny"))
    assert [line for line in headings(card) if line not in wanted] == []
    for line in outside_code(body).splitlines():
        assert any(re.fullmatch(form, line) for form in FORMS), line
    parsed = ModelCard(card).data
    assert parsed.license == (EVIL if place in ("card", "given", "metadata") else None)
    assert EVIL not in str(parsed.base_model)


ODD = {
    "training_record.json": '{"evaluation": {"results": {"": 5}}}',
    "routing_statistics.json": '{"layers": [3, {}]}',
}


@pytest.mark.parametrize("name", ODD)
def test_values_of_another_shape_are_refused_and_missing_ones_left_out(folder, name):
    (folder / name).write_text(ODD[name])
    assert_one_sentence(run_cli("card", folder), "is not what this package writes")
    (folder / name).write_text("{}")
    assert "# tester/tiny" in render_model_card(folder, "tester/tiny")


def test_the_command_renders_refreshes_and_remembers(folder):
    options = ["--license", "mit", "--language", "en", "--tag", "mine", "--base-model", "me/dense"]
    done = run_cli("card", folder, "--repo", "tester/tiny", *options)
    assert (done.code, done.out) == (0, f"{folder / 'README.md'}\n")
    first = (folder / "README.md").read_bytes()
    told = front_matter(first.decode())
    assert (told["license"], told["language"], told["base_model"]) == ("mit", ["en"], "me/dense")
    edited = first + b"\r\nMine.\n"
    (folder / "README.md").write_bytes(edited)
    assert run_cli("card", folder).code == 0
    assert (folder / "README.md").read_bytes() == edited
    assert b'from_pretrained("tester/tiny")' in edited


def test_a_card_is_neither_read_nor_written_through_a_link(folder, tmp_path):
    outside = tmp_path / "secret"
    outside.write_text("A key.\n")
    (folder / "README.md").symlink_to(outside)
    assert_one_sentence(run_cli("card", folder), "link")
    assert outside.read_text() == "A key.\n"


@pytest.mark.parametrize("name", ["receipt.json", "training_record.json", "routing_statistics.json"])
def test_a_file_that_cannot_be_read_is_named(folder, name):
    (folder / name).write_text("{")
    assert_one_sentence(run_cli("card", folder), f"{name}` is not JSON")
    assert not (folder / "README.md").exists()


def test_writing_keeps_the_scores_beside_the_card(folder):
    record = json.loads(json.dumps(RECORD))
    record["evaluation"]["data"] = {"law": {"data": ["hf://datasets/a/exam"]}}
    (folder / "training_record.json").write_text(json.dumps(record))
    write_model_card(folder)
    entries = yaml.safe_load((folder / ".eval_results" / "hf-sparse-moe.yaml").read_text())
    assert {entry["dataset"]["id"] for entry in entries} == {"a/exam"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner),
    max_leaves=12,
)


MODEL = tiny_sparse("bert")


files = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, json_values))


@pytest.mark.slow
@given(files, files | json_values)
@settings(max_examples=30, deadline=None)
def test_whatever_the_files_and_the_present_card_say_is_rendered_or_refused(values, metadata):
    checkpoint = Checkpoint(MODEL, "float32", values, values, values, False)
    try:
        card = render_model_card(checkpoint, "tester/card", previous=[f"---\n{json.dumps(metadata)}\n---\nWords."])
    except ValueError:
        return
    assert "Words." in card
    assert "## How to use" in card


@pytest.mark.parametrize("router_type", ["top_k", "hash"])
def test_a_hash_has_no_scores_and_no_balance_loss(router_type, tmp_path):
    tiny_sparse("llama", router_type=router_type).save_pretrained(tmp_path)
    card = render_model_card(tmp_path, "me/mixture")
    learns = router_type == "top_k"
    assert ("softmax" in rows(card)["Router"]) is learns
    assert ("Load-balancing loss" in rows(card)) is learns
    assert ("the balance loss is part of" in card) is learns
