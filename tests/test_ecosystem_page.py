"""docs/ecosystem.md is what tests/ecosystem/tools.toml says, and each of its yeses has a test."""

import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("write_ecosystem", ROOT / "docs" / "write_ecosystem.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), "python docs/write_ecosystem.py"


def test_each_yes_has_a_test_and_each_no_a_reason(page):
    for name, tool in page.read_tools().items():
        assert ("tests" in tool) != ("result" in tool), name
        assert "tests" in tool or tool["limits"], name
        for test in tool.get("tests", []):
            file, _, function = test.partition("::")
            assert f"def {function or 'test_'}" in (ROOT / file).read_text(encoding="utf-8"), test


def test_a_tool_whose_tests_did_not_all_pass_is_not_written(page):
    outcomes = page.Outcomes()
    outcomes.found = {
        "tests/a.py::test_one": "passed",
        "tests/a.py::test_two[x]": "skipped",
        "tests/b.py::test": "passed",
    }
    assert outcomes.of(["tests/a.py"]) == {"passed", "skipped"}
    assert outcomes.of(["tests/a.py::test_one", "tests/b.py"]) == {"passed"}
    assert outcomes.of(["tests/c.py"]) == set()
