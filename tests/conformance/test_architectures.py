"""Every text architecture of the installed transformers becomes a mixture that computes the same, or is refused."""

import csv

import pytest

from conformance.measuring import EXACT, HEADS, PAIRS, UNSUPPORTED, measure
from conformance.overrides import NOT_BUILT, NOTES, OVERRIDES, REFUSED
from conformance.table import DOCUMENT, TABLE, documented, each_row, markdown
from conformance.tiny_configs import tiny_config
from hf_sparse_moe.models.feed_forward import explain_layouts


@each_row()
def test_architecture(model_type, head, record_property):
    result = measure(model_type, head)
    digits = "" if result.difference is None else f"{result.difference:.0e}"
    record_property("architecture", [head, model_type, result.status, f"{digits} {result.detail}".strip()])
    assert documented().get((model_type, head)) == result.status, (
        "stale: run `python tests/conformance/write_table.py`"
    )


def test_the_page_lists_exactly_what_transformers_has():
    assert set(documented()) == set(PAIRS), "stale: run `python tests/conformance/write_table.py`"


def test_the_page_is_that_of_the_table():
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [tuple(row) for row in list(csv.reader(file))[1:]]
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(rows), "stale: run `make architectures`"


def test_enough_is_exact():
    assert sum(status == EXACT for status in documented().values()) >= 130


def test_the_tables_name_types_that_exist():
    known = {model_type for names, _ in HEADS.values() for model_type in names}
    assert {*OVERRIDES, *REFUSED, *NOT_BUILT, *NOTES} <= known


def test_explain_names_layouts_and_places():
    report = explain_layouts(tiny_config("llama"))
    assert report.supported
    assert list(report.matches) == ["gate_up_down"]
    assert "layout gate_up_down: 2 feed-forwards, model.layers.0.mlp to model.layers.1.mlp" in str(report)


@pytest.mark.parametrize("model_type", [name for name, (status, _) in REFUSED.items() if status == UNSUPPORTED])
def test_explain_says_what_is_in_the_way(model_type):
    report = explain_layouts(tiny_config(model_type))
    assert not report.supported
    assert report.obstacle or report.nearest, str(report)
