"""docs/performance.md says what the results files say, and the benchmarks that write those run."""

import importlib
import re
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parent.parent
BENCHMARKS = ("experts", "generate", "growth", "training_step")
SMALL = {
    "experts": ["--shapes", "128,16,8,8,2", "--modes", "float32", "--rounds", "1"],
    "generate": ["--quick", "--rounds", "1"],
    "growth": ["--quick", "--rounds", "1"],
    "training_step": ["--quick", "--rounds", "1", "--tokens", "256"],
}
LORA_ROW = {"dtype": "float32", "E": 16, "K": 4, "T": 1024, "H": 64, "I": 64, "peak": {"PEFT": 30, "ours": 10}}


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.delitem(sys.modules, "experts", raising=False)  # the tests have a folder of that name
    return importlib.import_module("write_performance")


def test_page_is_that_of_the_results_files(writer):
    page = writer.PAGE.read_text(encoding="utf-8")
    results = writer.load_results()
    assert page == writer.render(results), "Run `python benchmarks/write_performance.py`."
    for result in results:
        for section in writer.SECTIONS.keys() & result.keys():
            assert writer.grid_path(result, section).read_text(encoding="utf-8") == writer.grid(result[section])


@pytest.mark.slow
def test_page_shows_what_the_benchmarks_save(writer, tmp_path, monkeypatch, capsys):
    measuring = importlib.import_module("measuring")
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    for name in BENCHMARKS:
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *SMALL[name], "--write"])
        importlib.import_module(name).main()
    printed = capsys.readouterr().out
    (saved,) = writer.load_results(tmp_path)
    assert [name for name in BENCHMARKS if name in saved] == list(BENCHMARKS)

    page = writer.render([saved])
    assert saved["device"] in page
    assert writer.NO_GPU in page
    for name in writer.SECTIONS.keys() & saved.keys():
        assert " ".join(SMALL[name]) in page  # the command
        assert len(writer.grid(saved[name]).splitlines()) == 1 + len(saved[name]["rows"])
    generated, (fewest, most) = saved["generate"]["rows"], saved["growth"]["rows"]
    ratios = [row["seconds"]["dense"] / row["seconds"]["sparse_moe"] for row in generated]
    ratios.append(fewest["seconds"]["sparse_moe"] / most["seconds"]["sparse_moe"])
    for ratio in ratios:
        assert f"| {ratio:.2f} |" in printed
    for row in saved["training_step"]["rows"]:
        for parts in (row["parts"]["grouped_mm"], row["parts"]["sparse_moe"]):
            assert abs(sum(parts.values()) - 1) < 1e-6
            assert all(parts[part] > 0 for part in ("matrix products", "router", "balance loss", "optimizer"))
            assert f"{parts['router']:.1%}" in printed


@pytest.mark.parametrize(("ours", "met"), [(0.5, "yes"), (2.0, "no")])
def test_goal_and_obstacle(writer, ours, met):
    row = LORA_ROW | {"seconds": {"PEFT": 1.0, "ours": ours}}
    section = {"versions": {}, "environment": {}, "command": "c", "date": "a day", "rank": 16, "block": [row]}
    page = writer.render([{"device": "Some GPU", "lora": section}])
    assert re.search(rf"over PEFT's \| at least 1.50 \| {1 / ours:.2f} \| {met} \| a day \|", page)
    assert ("- **LoRA on experts" in page) == (met == "no")
    assert "| not measured |" in page
    assert writer.NO_GPU not in page
