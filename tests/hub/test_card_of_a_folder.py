"""A card is rendered from a checkpoint's files without its weights, has one form, and its code runs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.hub import render_model_card, write_model_card
from hf_sparse_moe.hub.card_sections import TEMPLATE
from hf_sparse_moe.routing.statistics import routing_statistics
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse


EVIL = "\\| x\n---\nlicense: mit\n# Heading <script>alert(1)</script> `code` | cell {{ 7 * 7 }} [a](b)\u202eback"
# Each line of a card is one of these, code blocks apart.
FORMS = (
    r"",
    r"#{1,3} [^#\n].*",
    r"\| .* \|",
    r"- [A-Za-z].*",
    r"<!-- .* -->",
    r"[A-Z`].*[.:]",
    r"!\[.*\]\(expert_load\.png\)",
)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A model of each family in a folder, sharded, with all that may lie beside its weights."""
    model = tiny_sparse(request.param)
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model.receipt = {"source": {"name_or_path": "a/b", "revision": "86b5e09", "sha256": {}}, "arguments": {"seed": 7}}
    model.save_pretrained(folder, max_shard_size="20KB")
    statistics = routing_statistics(model, [tiny_inputs(model, batch=4)], ["law", "law", "code", "code"])
    (folder / "routing_statistics.json").write_text(json.dumps(statistics.to_dict()))
    results = {"law": {"loss": 1.5, "accuracy": 0.25}, "code": {"loss": 2.5}}
    record = {
        "training": {"data": ["corpus"], "rows": 3, "steps": 2, "last_log": {"loss": 1.0, "router/entropy": 0.5}},
        "hyperparameters": {"learning_rate": 0.1},
        "hardware": {"device": "cpu"},
        "versions": {"torch": "1"},
        "evaluation": {"results": results, "log": [{"step": n, "part": "law", "loss": 1.0} for n in range(20)]},
    }
    (folder / "training_record.json").write_text(json.dumps(record))
    (folder / "expert_load.png").write_bytes(b"")
    return model, folder, record, statistics


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def outside_code(card: str) -> str:
    return re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)


def test_a_folder_and_its_model_have_the_same_facts(saved):
    model, folder, _, _ = saved
    in_folder, in_memory = (render_model_card(of, "tester/tiny") for of in (folder, model))
    for name in ("Parameters", "FLOPs", "Precision", "Router", "Sparse layers", "Dense"):
        rows = [
            [line for line in card.splitlines() if line.startswith(f"| {name}")] for card in (in_folder, in_memory)
        ]
        assert rows[0] == rows[1] != []


def test_results_routers_and_pictures_are_shown(saved):
    _, folder, _, statistics = saved
    card = render_model_card(folder, "tester/tiny")
    assert "| part of the evaluation data | loss | accuracy |" in card
    assert "| law | 1.5 | 0.25 |\n| code | 2.5 | – |" in card
    assert "the last 12 of 20 evaluations" in card
    for layer in statistics.layers:
        assert f"| {layer.side} {layer.position} | {layer.entropy:.3f} | {layer.max_violation:.3f} |" in card
    assert "![" in card
    assert "`router/entropy`" not in card  # of the training; what was counted on text is better


def test_every_line_has_a_known_form(saved):
    _, folder, _, _ = saved
    card = render_model_card(folder, "tester/tiny")
    assert yaml.safe_load(card.split("---\n")[1])["tags"][:2] == ["moe", "sparse-moe"]
    body = outside_code(card.split("---\n", 2)[2])
    for line in body.splitlines():
        assert any(re.fullmatch(form, line) for form in FORMS), line
    assert "\n\n\n\n" not in card
    headings = re.findall(r"^## .*", body, re.MULTILINE)
    assert headings == re.findall(r"^## .*", TEMPLATE.read_text(), re.MULTILINE)


def test_tables_are_whole(saved):
    _, folder, _, _ = saved
    for table in re.findall(r"(?:^\|.*\|\n)+", render_model_card(folder, "tester/tiny"), re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
        assert re.fullmatch(r"\|( --- \|)+", table.splitlines()[1])


def test_its_code_runs(saved, tmp_path, monkeypatch):
    model, folder, _, _ = saved
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


@pytest.mark.parametrize("place", ["data", "hyperparameter", "result", "metric", "version", "log", "group", "card"])
def test_text_of_others_stays_in_its_place(saved, tmp_path, place):
    _, folder, record, statistics = saved
    folder = copy_of(folder, tmp_path)
    plain = render_model_card(folder, "tester/tiny")
    record, routing = json.loads(json.dumps(record)), statistics.to_dict()
    if place == "group":
        routing["layers"][0]["group_load"] = {EVIL: [1.0]}
        routing["layers"][0]["side"] = EVIL
    else:
        change = {
            "data": lambda: record["training"].update(data=[EVIL]),
            "hyperparameter": lambda: record["hyperparameters"].update({EVIL: EVIL}),
            "result": lambda: record["evaluation"]["results"].update({EVIL: {"loss": EVIL}}),
            "metric": lambda: record["evaluation"]["results"]["law"].update({EVIL: 1.0}),
            "version": lambda: record["versions"].update({EVIL: EVIL}),
            "log": lambda: record["evaluation"]["log"].append({EVIL: EVIL, "step": EVIL, "part": EVIL}),
            "card": lambda: record.update(card={"license": EVIL, "language": [EVIL]}),
        }
        change[place]()
    (folder / "training_record.json").write_text(json.dumps(record))
    (folder / "routing_statistics.json").write_text(json.dumps(routing))
    body = render_model_card(folder, "tester/tiny").split("---\n\n# ", 1)[1]
    assert "<script>" not in body
    assert "\u202e" not in body
    assert "{{ 7" in body
    headings = re.findall(r"^#.*", outside_code(body), re.MULTILINE)
    assert headings == re.findall(r"^#.*", outside_code(plain.split("---\n\n# ", 1)[1]), re.MULTILINE)
    for line in outside_code(body).splitlines():
        assert any(re.fullmatch(form, line) for form in (*FORMS, "tester/tiny", "- .*")), line


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"training": [], "evaluation": 5, "card": "x"}', '{"layers": [3, {}]}']
)
@pytest.mark.parametrize("name", ["training_record.json", "routing_statistics.json", "receipt.json"])
def test_files_of_another_shape_do_no_harm(saved, tmp_path, name, content):
    folder = copy_of(saved[1], tmp_path)
    (folder / name).write_text(content)
    assert "# tester/tiny" in render_model_card(folder, "tester/tiny")


def test_the_command_renders_and_refreshes(saved, tmp_path):
    folder = copy_of(saved[1], tmp_path)
    done = run_cli("card", folder, "--repo", "tester/tiny", "--license", "mit", "--language", "en", "--tag", "mine")
    assert (done.code, done.out) == (0, f"{folder / 'README.md'}\n")
    first = (folder / "README.md").read_bytes()
    edited = first.replace(b"<!-- free: notes -->\n", b"<!-- free: notes -->\r\nMine.\n")
    (folder / "README.md").write_bytes(edited)
    assert run_cli("card", folder, "--repo", "tester/tiny").code == 0
    assert (folder / "README.md").read_bytes() == edited


def test_a_card_is_not_written_through_a_link(saved, tmp_path):
    folder = copy_of(saved[1], tmp_path)
    outside = tmp_path / "outside.md"
    outside.write_text("# Mine\n")
    (folder / "README.md").symlink_to(outside)
    write_model_card(folder)
    assert outside.read_text() == "# Mine\n"
    assert not (folder / "README.md").is_symlink()


def broken(folder: Path, how: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    if how == "another shape":
        tensors[name] = torch.zeros(3)
    elif how == "one more":
        tensors["more"] = torch.zeros(3)
    elif how == "one fewer":
        del tensors[name]
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:40])
    elif how == "no weights":
        for path in folder.glob("*.safetensors"):
            path.unlink()
    elif how == "no JSON":
        (folder / "receipt.json").write_text("{")
    else:
        save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("another shape", "does not fit together"),
        ("one more", "does not fit together"),
        ("one fewer", "weights lack"),
        ("truncated", "no safetensors file"),
        ("no weights", "has no \\*\\.safetensors"),
        ("no JSON", "is no JSON"),
    ],
)
def test_a_broken_checkpoint_gets_no_card(saved, tmp_path, how, words):
    folder = copy_of(saved[1], tmp_path)
    broken(folder, how)
    done = run_cli("card", folder)
    assert_one_sentence(done)
    assert re.search(words, done.err)
    assert not (folder / "README.md").exists()
