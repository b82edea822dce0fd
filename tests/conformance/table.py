"""docs/architectures.md and the table beside it: written from results, and read back."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import transformers

from conformance.measuring import EXACT, NOT_APPLICABLE, TOLERANCE, UNSUPPORTED, Result
from conformance.overrides import NOTES


DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
TABLE = DOCUMENT.with_suffix(".csv")
COLUMNS = ("model type", "head", "status", "layouts, or the reason", "largest difference")

_INTRODUCTION = """\
# Architectures

Every model type of transformers {version} with a causal-LM, masked-LM or sequence-to-sequence head, upcycled by `copy`
on a tiny random model and compared with the dense model in float32.

- **Exact**: no logit moves by more than {tolerance:.0e} of the largest one, the experts matter (without them the
  logits differ), and one training step gives a finite loss and a gradient to every parameter of each expert that got a
  token.
- **Not applicable**: mixtures already, architectures without feed-forwards, other modalities.
- **Unsupported**: could become a mixture and does not, for the reason below; `upcycle` refuses it.

`explain_layouts(model)` says which layout matched where, for a model of your own. The whole table, with the largest
difference of each pair, is [architectures.csv](architectures.csv). `make architectures` measures it again and writes
this page.
"""


def write(results: Iterable[Result]) -> None:
    """Write the page and the table beside it."""
    rows = sorted(_row(result) for result in results)
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    DOCUMENT.write_text(markdown(rows), encoding="utf-8")


def _row(result: Result) -> tuple[str, ...]:
    digits = "" if result.difference is None else f"{result.difference:.0e}"
    note = f"; {NOTES[result.model_type]}" if result.status == EXACT and result.model_type in NOTES else ""
    return result.model_type, result.head, result.status, f"{result.detail}{note}", digits


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The page of the table's rows."""
    counts = Counter((head, status) for _, head, status, *_ in rows)
    statuses = (EXACT, NOT_APPLICABLE, UNSUPPORTED)
    text = [_INTRODUCTION.format(version=transformers.__version__, tolerance=TOLERANCE)]
    text += ["| head | exact | not applicable | unsupported | all |", "| --- | --- | --- | --- | --- |"]
    for head in sorted({row[1] for row in rows}):
        numbers = [counts[head, status] for status in statuses]
        text.append(f"| {head} | {' | '.join(map(str, numbers))} | {sum(numbers)} |")
    totals = [sum(counts[key] for key in counts if key[1] == status) for status in statuses]
    text.append(f"| **all** | {' | '.join(f'**{total}**' for total in totals)} | **{sum(totals)}** |")
    text += ["", "## Exact", "", "| head | model types |", "| --- | --- |"]
    for head in sorted({row[1] for row in rows}):
        names = [f"`{name}`" for name, of, status, *_ in rows if (of, status) == (head, EXACT)]
        text.append(f"| {head} | {', '.join(names)} |")
    text += ["", "## Unsupported", "", "| model type | head | reason |", "| --- | --- | --- |"]
    text += [f"| `{name}` | {head} | {reason} |" for name, head, status, reason, _ in rows if status == UNSUPPORTED]
    return "\n".join(text) + "\n"


def documented() -> dict[tuple[str, str], str]:
    """(model type, head) to status, as the table beside the page has it."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {(row[0], row[1]): row[2] for row in list(csv.reader(file))[1:]}


def each_row(*statuses: str) -> pytest.MarkDecorator:
    """
    Parametrise a test with `model_type` and `head` by the rows of these statuses (all by default).

    The first row of each set of layouts, and of each other status and head, always runs; the others are marked
    `conformance`.
    """
    with TABLE.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))[1:]
    seen, cases = set(), []
    for model_type, head, status, detail, _ in table:
        if statuses and status not in statuses:
            continue
        kind = (status, *re.findall(r"\d+ (\w+)", detail)) if status == EXACT else (status, head)
        marks = [pytest.mark.conformance] if kind in seen else []
        seen.add(kind)
        cases.append(pytest.param(model_type, head, marks=marks, id=f"{head}-{model_type}"))
    return pytest.mark.parametrize(("model_type", "head"), cases)
