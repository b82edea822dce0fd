"""docs/architectures.md: written from results, and read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import transformers

from conformance.measuring import EXACT, HEADS, NOT_APPLICABLE, TOLERANCE, UNSUPPORTED, Result
from conformance.overrides import NOTES


DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"

_INTRODUCTION = """\
# Architectures

Every model type of transformers {version} that has a causal-LM, masked-LM or sequence-to-sequence head is built tiny,
upcycled by copy, and compared with the dense model in float32: **exact** means that no logit moves by more than
{tolerance:.0e} of the largest one, that the experts matter (without them the logits are others), and that one training
step gives a finite loss and a gradient to every parameter of every expert that got a token. **Not applicable** is what
cannot become a sparse text model: mixtures already, architectures without feed-forwards, other modalities.
**Unsupported** is what could and does not, with the reason: `upcycle` refuses it, and `hf_sparse_moe.explain(model)`
says why.

This page is written by `python tests/conformance/write_table.py`; `pytest tests/conformance` fails when it is stale.
"""


def markdown(results: Iterable[Result]) -> str:
    """The page of `results`."""
    results = sorted(results, key=lambda result: (result.head, result.model_type))
    counts = Counter((result.head, result.status) for result in results)
    statuses = (EXACT, NOT_APPLICABLE, UNSUPPORTED)
    text = [_INTRODUCTION.format(version=transformers.__version__, tolerance=TOLERANCE)]
    text += ["| head | exact | not applicable | unsupported | all |", "| --- | --- | --- | --- | --- |"]
    for head in sorted({result.head for result in results}):
        row = [counts[head, status] for status in statuses]
        text.append(f"| {head} | {' | '.join(map(str, row))} | {sum(row)} |")
    totals = [sum(counts[key] for key in counts if key[1] == status) for status in statuses]
    text.append(f"| **all** | {' | '.join(f'**{total}**' for total in totals)} | **{sum(totals)}** |")
    text += ["", "| model type | head | status | layouts (with their number), or the reason | largest difference |"]
    text.append("| --- | --- | --- | --- | --- |")
    for result in results:
        digits = "" if result.difference is None else f"{result.difference:.0e}"
        note = f"; {NOTES[result.model_type]}" if result.status == EXACT and result.model_type in NOTES else ""
        text.append(f"| {result.model_type} | {result.head} | {result.status} | {result.detail}{note} | {digits} |")
    return "\n".join(text) + "\n"


def documented() -> dict[tuple[str, str], str]:
    """(model type, head) to status, as the page has it."""
    rows = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text(encoding="utf-8").splitlines()]
    return {(row[0], row[1]): row[2] for row in rows if len(row) > 2 and row[1] in HEADS}
