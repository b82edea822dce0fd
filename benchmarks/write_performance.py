"""
Writes docs/performance.md, and its picture, from the files in benchmarks/results: no number there is typed by hand.

    python benchmarks/write_performance.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from experts import Shape


REPOSITORY = Path(__file__).parent.parent
RESULTS, PAGE = REPOSITORY / "benchmarks" / "results", REPOSITORY / "docs" / "performance.md"
PICTURE = "performance_experts.svg"
INTRODUCTION = """\
# Performance

How fast the experts of a layer are, and what they keep in memory, measured side by side with what transformers brings.
This page is written by `python benchmarks/write_performance.py` from the files in `benchmarks/results`, one a device;
measure your own with

```bash
python benchmarks/experts.py --quick   # a minute, two shapes, prints only
python benchmarks/experts.py           # the tables below, into benchmarks/results
```

Every time is a median over calls that each draw their routing anew, divided by the time of **ideal**: the bare matrix
products on rows that are already sorted, into memory that is already there. A backend also gathers, activates, adds up
and asks the system for the memory of the gradients; where it still stays below 1 (bfloat16), it is because oneDNN
compiles a product for every row count that it has not seen, and `segment_mm` fills segments up to few row counts.
**dense** is a gated feed-forward with as many active parameters, so the same number of multiplications without any
routing. Shapes are T tokens, H hidden size, I intermediate size of an expert, E experts, K experts a token.

What the names mean: `eager`, `batched_mm` and `grouped_mm` are transformers' own backends; `segment_mm` is ours for
the CPU, `segment_mm_recompute` the same with nothing kept for backward but the arguments; "bf16 autocast" has float32
weights under `torch.autocast`, as `Trainer(bf16=True)` does: there `grouped_mm` computes in float32.
"""


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    if not results:
        raise SystemExit(f"There is no file in {RESULTS}. Run python benchmarks/experts.py first.")
    pages = [INTRODUCTION]
    measured = [result for result in results if "experts" in result]
    if measured:
        draw(measured, PAGE.with_name(PICTURE))
        pages.append(f"![Experts, forward and backward, over the bare products]({PICTURE})\n")
    pages += [device_page(result) for result in measured]
    PAGE.write_text("\n".join(pages))
    print("Wrote", PAGE.relative_to(REPOSITORY))


def device_page(result: dict[str, Any]) -> str:
    """The tables of one device."""
    section = result["experts"]
    versions = ", ".join(f"{name} {version}" for name, version in section["versions"].items())
    command = " ".join([*(f"{name}={value}" for name, value in section["environment"].items()), section["command"]])
    lines = [f"## {result['device']}", "", f"{section['date']}, {versions}; {section['clock']}; `{command}`.", ""]
    rows = section["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["step_s"] if name != "ideal"))
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        for title, field in (("forward and backward", "step_s"), ("forward", "forward_s")):
            lines += [f"### {mode}, {title}, over ideal", "", *_table(chosen, names, "ideal ms", _ratios(field))]
        lines += [f"### {mode}, kept for backward, MB", "", *_table(chosen, names, None, _megabytes("saved_bytes"))]
        lines += [f"### {mode}, peak of a step, MB", "", *_table(chosen, names, None, _megabytes("peak_bytes"))]
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a device and mode: each backend's step over ideal, against the rows that an expert gets."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    panels = [
        (result["device"], mode, [row for row in result["experts"]["rows"] if row["mode"] == mode])
        for result in results
        for mode in dict.fromkeys(row["mode"] for row in result["experts"]["rows"])
    ]
    plt.rcParams["svg.hashsalt"] = "performance"  # the same file from the same numbers
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (device, mode, rows) in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(
            name for row in rows for name in row["step_s"] if name not in ("ideal", "batched_mm")
        ):
            points: dict[float, list[float]] = {}
            for row in rows:
                if name in row["step_s"]:
                    per_expert = row["T"] * row["K"] / row["E"]
                    points.setdefault(per_expert, []).append(row["step_s"][name] / row["step_s"]["ideal"])
            ordered = sorted((x, median(values)) for x, values in points.items())
            axis.plot(*zip(*ordered, strict=True), marker="o", label=name)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=f"{device}\n{mode}", xlabel="rows an expert", xscale="log", yscale="log")
    axes[0][0].set_ylabel("forward and backward, over ideal")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _table(rows: list[dict[str, Any]], names: list[str], extra: str | None, cells) -> list[str]:
    heads = [", ".join(Shape._fields), *([extra] if extra else []), *names]
    lines = ["| " + " | ".join(heads) + " |", "| " + "--- | " * len(heads)]
    for row in rows:
        shape = ", ".join(str(row[size]) for size in Shape._fields)
        lines.append("| " + " | ".join([shape, *cells(row, names)]) + " |")
    return [*lines, ""]


def _ratios(field: str):
    def cells(row: dict[str, Any], names: list[str]) -> list[str]:
        ideal = row[field]["ideal"]
        return [
            f"{ideal * 1e3:.1f}",
            *(f"{row[field][name] / ideal:.2f}" if name in row[field] else "" for name in names),
        ]

    return cells


def _megabytes(field: str):
    def cells(row: dict[str, Any], names: list[str]) -> list[str]:
        return [f"{row[field][name] / 1e6:.1f}" if name in row[field] else "" for name in names]

    return cells


if __name__ == "__main__":
    main()
