"""The card of an adapter says which base, which experts and how much was trained, and no more than its files do."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cli_client import run_cli
from hf_sparse_moe.hub import render_model_card, write_model_card
from hub_adapters import save_adapter, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def outside_code(card: str) -> str:
    return re.sub(r"^```.*?^```$", "", card, flags=re.DOTALL | re.MULTILINE)


def test_it_says_what_the_files_say(base, tmp_path):
    save_adapter(
        tmp_path, base, experts={1: [0, 3]}, projections=("gate", "down"), r=3, lora_alpha=6, lora_dropout=0.1
    )
    card = render_model_card(tmp_path, "me/x")
    layer = "dense.model.layers.1.mlp.experts"
    for row in (
        f"| Parameters that it adapts | {layer}.down_proj, {layer}.gate_up_proj |",
        f"| Experts that it adapts | {layer}: [0, 3] |",
        "| Projections that it adapts | down, gate |",
        "| Rank | 3 |",
        "| Alpha | 6 |",
        "| Dropout in training | 0.1 |",
    ):
        assert row in card.replace("\\", "")


def test_an_adapter_without_a_record_of_its_base_says_so(base, tmp_path):
    save_adapter(tmp_path, base)
    (tmp_path / "adapter_base.json").unlink()
    assert "another base goes unnoticed" in render_model_card(tmp_path, "me/x")


def test_its_metadata_is_what_the_hub_reads(base, tmp_path):
    save_adapter(tmp_path, base)
    told = json.loads((tmp_path / "adapter_base.json").read_text())
    told |= {"name_or_path": "me/base", "revision": "0123abc"}
    (tmp_path / "adapter_base.json").write_text(json.dumps(told))
    card = write_model_card(tmp_path, "me/x", license="mit", language="en").read_text()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["base_model"] == "me/base"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert data["tags"][:4] == ["moe", "sparse-moe", "lora", "decoder"]
    assert 'from_pretrained("me/base", revision="0123abc")' in card
    assert "not known to be on the Hub" not in card


def test_no_folder_of_the_publisher_s_is_told(base, tmp_path):
    save_adapter(tmp_path, base)  # PEFT's own card, which names it, lies there
    assert str(base) in (tmp_path / "README.md").read_text()
    card = write_model_card(tmp_path, "me/x").read_text()
    assert str(base.parent) not in card
    assert "[More Information Needed]" not in card
    assert f"a folder named `{base.name}`" in card.replace("\\", "")


def test_what_a_person_wrote_stays(base, tmp_path):
    save_adapter(tmp_path, base)
    assert run_cli("card", tmp_path, "--repo", "me/x").code == 0
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## Mine\n\nWords.\n")
    assert run_cli("card", tmp_path, "--language", "en", "--base-model", "me/base").code == 0
    card = path.read_text()
    assert card.endswith("\n## Mine\n\nWords.\n")
    assert "# me/x\n" in card
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["language"], data["base_model"], data["base_model_relation"]) == (["en"], "me/base", "adapter")


def test_an_edited_card_of_peft_is_kept(base, tmp_path):
    save_adapter(tmp_path, base)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nTrained on my diary.\n")
    assert "Trained on my diary." in write_model_card(tmp_path, "me/x").read_text()


def test_its_python_compiles_and_its_training_is_told(base, tmp_path):
    save_adapter(tmp_path, base)
    record = {
        "training": {"steps": 7, "data": ["hf://datasets/me/law"]},
        "evaluation": {"results": {"": {"loss": 1.5}}},
    }
    (tmp_path / "training_record.json").write_text(json.dumps(record))
    card = render_model_card(tmp_path, "me/x")
    assert "| Optimizer steps | 7 |" in card
    assert "| all | 1.5 |" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")


EVIL = "x | y\n---\nlicense: mit\n# <script>alert(1)</script> {{ 7 * 7 }}"


def test_what_others_wrote_is_escaped(base, tmp_path):
    save_adapter(tmp_path, base)
    for name, fields in (
        ("adapter_config.json", {"base_model_name_or_path": EVIL, "lora_alpha": EVIL, "peft_version": EVIL}),
        ("adapter_base.json", {"name_or_path": EVIL, "architecture": EVIL, "sha256": {EVIL: EVIL}, "revision": EVIL}),
    ):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    card = render_model_card(tmp_path, "me/x")
    assert "<script>" not in card
    assert "\n# <" not in card
    assert "49" not in outside_code(card).split("## Citation")[1]
    assert card.count("-->") == 3  # those of the card itself
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        assert "alert" not in block
