"""
Writes docs/performance.md, its pictures and one CSV file a benchmark, from the files in benchmarks/results: no number
there is typed by hand. Prints what was reached of each goal.

    python benchmarks/write_performance.py
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from performance_goals import GOALS, OURS, STOCK


REPOSITORY = Path(__file__).parent.parent
RESULTS, PAGE = REPOSITORY / "benchmarks" / "results", REPOSITORY / "docs" / "performance.md"
EXPERTS_PICTURE, GROWTH_PICTURE = "performance_experts.png", "performance_growth.png"
INTRODUCTION = """\
# Performance

How fast the experts, LoRA on them and `generate` are, and how much memory they keep, next to what transformers and
PEFT offer. Measure your own machine, by what is made for 20 minutes on two quiet cores:

```bash
make bench                 # ARGS=--quick for a look that writes nothing
```

Every figure is a ratio of medians, measured side by side in one process, with fresh tokens or routing in each call;
where the clock is CPU time, with one thread on a machine that others used at the same time. T is tokens, H the hidden
size, I an expert's intermediate size, E experts, K experts per token. **Bare products** are the matrix products alone,
on rows that are sorted already, in memory that is there. **Dense** is a feed-forward, or a model of them, with as
many active parameters. `eager`, `batched_mm` and `grouped_mm` are the backends of transformers; `sparse_moe`, the
default, is this library's.
"""
NO_GPU = "Not measured on a GPU.\n"
SECTIONS = {
    "experts": "the experts of one layer, every backend",
    "lora": "LoRA on experts",
    "generate": "text generation",
    "growth": "8 to 256 experts",
}


def main() -> None:
    results = load_results()
    draw_experts(results, PAGE.with_name(EXPERTS_PICTURE))
    draw_growth(results, PAGE.with_name(GROWTH_PICTURE))
    for result in results:
        for section in SECTIONS.keys() & result.keys():
            path = grid_path(result, section)
            path.parent.mkdir(exist_ok=True)
            path.write_text(grid(result[section]), encoding="utf-8", newline="")
        print(f"## {result['device']}\n\n{goals_table(result)}")
    PAGE.write_text(render(results), encoding="utf-8")
    print("Wrote", PAGE.relative_to(REPOSITORY))


def load_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """What the benchmarks saved, a device each; other benchmarks keep files of their own beside them."""
    loaded = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return [result for result in loaded if "device" in result]


def render(results: list[dict[str, Any]]) -> str:
    parts = [INTRODUCTION]
    if all(result["device"].endswith("threads") for result in results):  # as measuring.py names a CPU
        parts.append(NO_GPU)
    for result in results or [{"device": "No device yet"}]:
        parts += [f"## {result['device']}\n", goals_table(result), obstacles(result), sources(result)]
        if "experts" in result:
            parts.append(f"![Time of the experts against the tokens]({EXPERTS_PICTURE})\n")
        if "growth" in result:
            parts.append(f"![Time of the experts against their number]({GROWTH_PICTURE})\n")
    return "\n".join(part for part in parts if part)


def goals_table(result: dict[str, Any]) -> str:
    rows = []
    for goal in GOALS:
        section = result.get(goal.section, {})
        values = goal.values(section) if section else []
        sign = "at most" if goal.at_most else "at least"
        measured, met = "not measured", ""
        if values:
            lowest, highest = f"{min(values):.2f}", f"{max(values):.2f}"
            measured = lowest if lowest == highest else f"{lowest} to {highest}"
            reached = sum(map(goal.is_met, values))
            met = "yes" if reached == len(values) else "no" if not reached else f"in {reached} of {len(values)}"
        rows.append([goal.what, f"{sign} {goal.bound:.2f}", measured, met, section["date"] if values else ""])
    return table(["what", "goal", "measured", "met", "date"], rows)


def obstacles(result: dict[str, Any]) -> str:
    """A sentence for each goal that is missed."""
    missed = [
        f"- **{goal.what}**: {goal.obstacle}"
        for goal in GOALS
        if goal.section in result and not all(map(goal.is_met, goal.values(result[goal.section])))
    ]
    return "Why the others are missed:\n\n" + "\n".join(missed) + "\n" if missed else ""


def sources(result: dict[str, Any]) -> str:
    """Where the full grids are, and how they came to be."""
    rows, made = [], set()
    for name in SECTIONS.keys() & result.keys():
        section = result[name]
        made.add(", ".join(f"{package} {version}" for package, version in section["versions"].items()))
        command = " ".join([*(f"{key}={value}" for key, value in section["environment"].items()), section["command"]])
        path = grid_path(result, name).relative_to(REPOSITORY)
        rows.append([SECTIONS[name], f"`{path}`", f"`{command}`", section.get("clock", "wall-clock time")])
    if not rows:
        return ""
    heads = ["figures of", "file", "measured by", "clock"]
    return f"All figures ({'; '.join(sorted(made))}):\n\n" + table(heads, sorted(rows))


def grid_path(result: dict[str, Any], section: str) -> Path:
    return RESULTS / result["device"].lower().replace(",", "").replace(" ", "-") / f"{section}.csv"


def grid(section: dict[str, Any]) -> str:
    """All rows of a benchmark as CSV; what is nested gets names such as `seconds.auto`."""
    rows = [{"table": key, **_flat(row)} for key in ("rows", "block", "step") for row in section.get(key, [])]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = f"{value:.4g}" if isinstance(value, float) else value
    return flat


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"


def draw_experts(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a device and shape, in float32: each backend's step, against the tokens."""
    panels = [
        (result["device"], shape, [row for row in rows if shape == tuple(row[name] for name in "HIEK")])
        for result in results
        if "experts" in result
        for rows in [[row for row in result["experts"]["rows"] if row["mode"] == "float32"]]
        for shape in dict.fromkeys(tuple(row[name] for name in "HIEK") for row in rows)
    ]

    def draw(axis: Any, panel: tuple[str, tuple[int, ...], list[dict[str, Any]]]) -> None:
        device, (H, I, E, K), rows = panel  # noqa: E741
        for name in ("ideal", "dense", OURS, *STOCK):
            points = [(row["T"], 1e3 * row["step_s"][name]) for row in rows if name in row["step_s"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=f"{device}\nH {H}, I {I}, E {E}, K {K}", xlabel="tokens", xscale="log", yscale="log")

    _draw_panels(panels, draw, "forward and backward, milliseconds", path)


def draw_growth(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a device: the time of a step, against the number of experts."""

    def draw(axis: Any, result: dict[str, Any]) -> None:
        rows = result["growth"]["rows"]
        for name in rows[0]["seconds"]:
            axis.plot([row["E"] for row in rows], [1e3 * row["seconds"][name] for row in rows], marker="o", label=name)
        title = f"{result['device']}\n{result['growth']['T']} tokens, K {result['growth']['K']}"
        axis.set(title=title, xlabel="experts", xscale="log", ylim=(0, None))
        axis.set_xticks([row["E"] for row in rows], [str(row["E"]) for row in rows])
        axis.minorticks_off()

    measured = [result for result in results if "growth" in result]
    _draw_panels(measured, draw, "forward and backward, milliseconds", path)


def _draw_panels(panels: list[Any], draw: Callable[[Any, Any], None], label: str, path: Path) -> None:
    if not panels:
        return
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        draw(axis, panel)
    axes[0][0].set_ylabel(label)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
