"""
Writes docs/ecosystem.md from tests/ecosystem/tools.toml, after the tests that its rows name have passed:
`python docs/write_ecosystem.py`, or with names of rows to run the tests of those alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[1]
PAGE, TOOLS = ROOT / "docs" / "ecosystem.md", ROOT / "tests" / "ecosystem" / "tools.toml"
HEAD = """# Other tools

What other tools do with a mixture. Where it says yes, tests run the tool itself. Tools know the mixture once
`hf_sparse_moe` is imported, or by `trust_remote_code=True`.

"""
TAIL = """
## Score a mixture

```bash
pip install "hf-sparse-moe[evaluate]"
hf-sparse-moe evaluate ./qwen3-4x --tasks arc_easy,lambada_openai
lm-eval run --model hf --model_args pretrained=./qwen3-4x,trust_remote_code=True --tasks arc_easy
```

The second is lm-eval itself. `evaluate` adds the scores to the folder's training record; `card` and `push` write them
into the card and, for data of the Hub, into `.eval_results/`. Those of other tools get there by
[`record_results`](model_cards.md#from-a-training).

## Export a graph

```python
import torch
from hf_sparse_moe import upcycle

model = upcycle("google-bert/bert-base-uncased", num_experts=4).eval()
inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=64)}
program = torch.export.export(model, (), inputs, dynamic_shapes={"input_ids": sizes})
```

`torch.onnx.export(model, (), "model.onnx", kwargs=inputs, dynamo=True, ...)` takes the same. Decoders need
`use_cache=False`. Experts run as `grouped_mm` in the graph, as `batched_mm` in ONNX.
"""


def read_tools() -> dict[str, dict[str, Any]]:
    return tomllib.loads(TOOLS.read_text(encoding="utf-8"))


def version(tool: dict[str, Any]) -> str:
    """Of its package, as the tests install it."""
    if "package" not in tool:
        return tool.get("version", "-")
    pins = (ROOT / "constraints" / "pinned.txt").read_text(encoding="utf-8")
    return re.search(rf"^{re.escape(tool['package'])}==(.+)$", pins, re.MULTILINE)[1]


def render() -> str:
    """The page, as it is when the tests pass."""
    lines = ["| tool | version | what was run | result | limits |", "| --- | --- | --- | --- | --- |"]
    for name, tool in read_tools().items():
        result = "yes" if "tests" in tool else tool["result"]
        lines.append(f"| {name} | {version(tool)} | {tool['ran']} | {result} | {tool.get('limits', '')} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


class Outcomes:
    """What became of each test, for pytest."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid] = report.outcome

    def of(self, tests: list[str]) -> set[str]:
        """Outcomes of the tests that these ids name."""
        return {outcome for test, outcome in self.found.items() if test.startswith(tuple(tests))}


def main(names: list[str]) -> None:
    tools = {name: tool for name, tool in read_tools().items() if "tests" in tool and (not names or name in names)}
    outcomes = Outcomes()
    pytest.main(["-q", *dict.fromkeys(test for tool in tools.values() for test in tool["tests"])], plugins=[outcomes])
    wrong = {name: seen for name, tool in tools.items() if (seen := outcomes.of(tool["tests"])) != {"passed"}}
    if wrong:
        sys.exit(f"{PAGE.name} is as it was: {wrong}. Install what is missing, or repair what fails.")
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
