"""Each card of model_cards/ says what the record of its run beside it says."""

import json
import sys
from pathlib import Path

import pytest

from hf_sparse_moe.hub import render_model_card
from hf_sparse_moe.hub.checkpoint import read_checkpoint


FOLDER = Path(__file__).parents[2] / "model_cards"
VARIANTS = ("encoder", "decoder", "encoder-decoder")


@pytest.fixture(scope="module")
def make():
    sys.path.insert(0, str(FOLDER))
    try:
        import make
    finally:
        sys.path.remove(str(FOLDER))
    return make


def test_there_is_a_card_for_every_variant(make):
    assert set(VARIANTS) == {path.parent.name for path in FOLDER.glob("*/README.md")} == set(make.RUNS)
    for name in VARIANTS:
        assert read_checkpoint(FOLDER / name).model.config.model_type.endswith(name.replace("-", "_"))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_card_is_what_its_record_renders_to(make, name):
    """Where this fails, template or record has changed: `make cards ARGS=--no-training` renders the cards again."""
    card = (FOLDER / name / "README.md").read_bytes().decode()
    assert make.renderer(name)(previous=[card]) == card


@pytest.mark.parametrize("name", VARIANTS)
def test_a_changed_record_is_noticed(make, name):
    card = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    checkpoint = read_checkpoint(FOLDER / name)
    record = json.loads((FOLDER / name / "training_record.json").read_text())
    part = next(iter(record["evaluation"]["results"]))
    assert f"{record['evaluation']['results'][part]['loss']:.6g}" in card
    record["evaluation"]["results"][part]["loss"] = 0.0625
    changed = type(checkpoint)(
        checkpoint.model, checkpoint.dtype, checkpoint.receipt, record, checkpoint.routing, checkpoint.has_picture
    )
    run = make.RUNS[name]
    assert render_model_card(changed, run.repo_id, license=run.license, language=run.language, previous=[card]) != card


@pytest.mark.parametrize("name", VARIANTS)
def test_the_record_is_that_of_a_real_run(make, name):
    record = json.loads((FOLDER / name / "training_record.json").read_text())
    assert record["training"]["steps"] > 0
    assert record["training"]["last_log"]["loss"] > 0
    results = record["evaluation"]["results"]
    assert len(results) >= 2
    assert all(0 < values["loss"] < 12 for values in results.values())
    text = "".join(path.read_text(encoding="utf-8") for path in (FOLDER / name).iterdir())
    assert "/tmp" not in text
    assert "/home" not in text
    assert "/work" not in text
