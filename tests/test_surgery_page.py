"""docs/surgery.md says what the result files say."""

import importlib
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parent.parent
CUT = {"kept": 4, "of": 8, "calibration": "all", "healed": False}


@pytest.fixture
def surgery(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("surgery")


def test_page_is_that_of_the_result_files(surgery):
    page = (REPOSITORY / "docs" / "surgery.md").read_text(encoding="utf-8")
    tables = surgery.tables(surgery.Results(REPOSITORY / "benchmarks" / "results" / "surgery"))
    written = page.partition("<!-- results -->")[2].partition("<!-- end of results -->")[0]
    assert written.strip() == tables, "Run `python benchmarks/surgery.py --page`."


def test_verdicts_know_the_noise_of_the_seeds(surgery):
    results = surgery.Results(Path("nowhere"))
    results.cuts = [
        {**CUT, "method": method, "seed": seed, "loss": loss + 0.01 * seed}
        for method, loss in (("reap", 4.0), ("ean", 4.01), ("random", 5.0))
        for seed in range(5)
    ]
    assert surgery.verdict(results, "reap", "random", 0.5, "-") == "-1.000 (as expected)"
    assert surgery.verdict(results, "reap", "ean", 0.5, "-") == "-0.010 (found 0)"
    assert surgery.verdict(results, "random", "ean", 0.5, "+") == "+0.990 (as expected)"
    assert surgery.verdict(results, "hc", "ean", 0.5, "+") == "not run"
