"""
Writes docs/performance.md, and its pictures, from the files in benchmarks/results: no number there is typed by hand.
Prints what was reached of each goal.

    python benchmarks/write_performance.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from experts import Shape
from performance_goals import GOALS, OBSTACLES
from training_step import profile_lines


REPOSITORY = Path(__file__).parent.parent
RESULTS, PAGE = REPOSITORY / "benchmarks" / "results", REPOSITORY / "docs" / "performance.md"
EXPERTS_PICTURE, GROWTH_PICTURE = "performance_experts.png", "performance_growth.png"
INTRODUCTION = """\
# Performance

How fast the experts, LoRA on them, `generate` and a training step are, and what they keep in memory, side by side with
what transformers and PEFT bring. `python benchmarks/write_performance.py` writes this page from the files in
`benchmarks/results`, one a device; measure your own with

```bash
python benchmarks/experts.py --write         # the experts of one layer, all backends
python benchmarks/lora.py --write            # LoRA on experts, over PEFT's
python benchmarks/generate.py --write        # tokens a second, over a dense model's
python benchmarks/growth.py --write          # 8 to 256 experts
python benchmarks/training_step.py --write   # where the time of a Trainer's step goes
python benchmarks/write_performance.py
```

`make bench` runs them all, in about an hour on two cores. Each takes `--quick` for a look at how it works. Contenders
run in turns and times are medians; every call draws tokens or routing anew, since a backend that has seen a row count
before may be faster with it. The first call of a turn is not timed: it meets the memory as the contender before left
it, which can make it several times as long, and which no training loop meets. T tokens, H hidden
size, I intermediate size of an expert, E experts, K experts a token. **Bare products**, or **ideal**, are the matrix
products alone, on rows that are already sorted, into memory that is already there. **dense** is a gated feed-forward,
or a model of them, with as many active parameters, so the same number of multiplications without any routing.
`eager`, `batched_mm` and `grouped_mm` are transformers' own backends; `segment_mm` is ours for the CPU,
`segment_mm_recompute` the same with nothing kept for backward but the arguments, and `auto`, the default, chooses
call by call.
"""
NO_GPU = "Nothing on this page was measured on a GPU.\n"


def main() -> None:
    results = load_results()
    draw_experts(results, PAGE.with_name(EXPERTS_PICTURE))
    draw_growth(results, PAGE.with_name(GROWTH_PICTURE))
    PAGE.write_text(render(results), encoding="utf-8")
    for result in results:
        print(f"## {result['device']}\n\n{goals_table(result)}")
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
        parts += [f"## {result['device']}\n", goals_table(result), obstacles(result)]
        parts += [write(result[section]) for section, write in SECTIONS.items() if section in result]
    return "\n".join(part for part in parts if part)


def goals_table(result: dict[str, Any]) -> str:
    rows = []
    for goal in GOALS:
        values = goal.values(result[goal.section]) if goal.section in result else []
        sign = "at most" if goal.at_most else "at least"
        measured, met = "not measured", ""
        if values:
            lowest, highest = goal.shown(min(values)), goal.shown(max(values))
            measured = lowest if lowest == highest else f"{lowest} to {highest}"
            reached = sum(map(goal.is_met, values))
            met = "yes" if reached == len(values) else "no" if not reached else f"in {reached} of {len(values)}"
        rows.append([goal.what, f"{sign} {goal.shown(goal.bound)}", measured, met, f"`benchmarks/{goal.section}.py`"])
    return table(["measured", "goal", "here", "met", "by"], rows)


def obstacles(result: dict[str, Any]) -> str:
    """A paragraph for each kind of goal that is missed."""
    missed = [
        goal.obstacle
        for goal in GOALS
        if goal.section in result and not all(map(goal.is_met, goal.values(result[goal.section])))
    ]
    if not missed:
        return ""
    return "### What stands in the way\n\n" + "\n\n".join(OBSTACLES[key] for key in dict.fromkeys(missed)) + "\n"


def heading(title: str, section: dict[str, Any]) -> str:
    """The title of a section, and how its numbers came to be."""
    versions = ", ".join(f"{name} {version}" for name, version in section["versions"].items())
    command = " ".join([*(f"{name}={value}" for name, value in section["environment"].items()), section["command"]])
    clock = section.get("clock", "wall-clock time")
    return f"### {title}\n\n`{command}`, {section['date']}; {versions}; {clock}.\n"


def experts_tables(section: dict[str, Any]) -> str:
    rows = section["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["step_s"] if name != "ideal"))
    picture = f"![Experts, forward and backward, over the bare products]({EXPERTS_PICTURE})\n"
    lines = [heading("Experts of one layer", section), picture]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        chosen = [row for row in rows if row["mode"] == mode]
        for title, field in (("forward and backward", "step_s"), ("forward", "forward_s")):
            lines += [f"#### {mode}, {title}, over ideal\n", _shapes(chosen, names, "ideal ms", _ratios(field))]
        lines += [f"#### {mode}, kept for backward, MB\n", _shapes(chosen, names, None, _megabytes("saved_bytes"))]
        lines += [f"#### {mode}, peak of a step, MB\n", _shapes(chosen, names, None, _megabytes("peak_bytes"))]
    return "\n".join(lines)


def lora_tables(section: dict[str, Any]) -> str:
    lines = [heading(f"LoRA on experts, rank {section['rank']}", section)]
    for key, title in (("block", "The experts of one layer"), ("step", "A training step of 4 layers")):
        rows = section.get(key, [])
        names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
        heads = ["dtype, E, K, T, H, I", *(f"{name}, ms" for name in names), "PEFT / ours", "peak memory, PEFT / ours"]
        cells = [
            [
                ", ".join(str(row[name]) for name in ("dtype", "E", "K", "T", "H", "I")),
                *(f"{1e3 * row['seconds'][name]:.1f}" for name in names),
                f"{row['seconds']['PEFT'] / row['seconds']['ours']:.2f}",
                f"{row['peak']['PEFT'] / row['peak']['ours']:.1f}",
            ]
            for row in rows
        ]
        lines += [f"#### {title}\n", table(heads, cells)]
    return "\n".join(lines)


def generate_table(section: dict[str, Any]) -> str:
    rows, new_tokens = section["rows"], section["new_tokens"]
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"] if name != "dense"))
    cells = [
        [
            ", ".join(str(row[name]) for name in ("dtype", "E", "K", "batch_size")),
            f"{row['batch_size'] * new_tokens / row['seconds']['dense']:.0f}",
            *(_over_dense(row["seconds"], name) for name in names),
        ]
        for row in rows
    ]
    text = (
        f"Llama-like decoders of {section['layers']} layers, H {section['hidden']}, I {section['intermediate']}; "
        f"{new_tokens} tokens, greedily, after a prompt of {section['prompt']}. Tokens a second over the dense "
        "model's; the experts of each token are drawn.\n"
    )
    heads = ["dtype, E, K, sequences", "dense, tokens/s", *names]
    return "\n".join([heading("Generate", section), text, table(heads, cells)])


def growth_table(section: dict[str, Any]) -> str:
    rows = section["rows"]
    names = list(rows[0]["seconds"])
    cells = [
        [
            str(row["E"]),
            str(section["T"] * section["K"] // row["E"]),
            *(f"{rows[0]['seconds'][name] / row['seconds'][name]:.2f}" for name in names),
        ]
        for row in rows
    ]
    text = (
        f"Forward and backward, T {section['T']}, H {section['hidden']}, I {section['intermediate']}, "
        f"K {section['K']}. Tokens a second over those at E {rows[0]['E']}.\n"
    )
    picture = f"![Tokens a second against the number of experts]({GROWTH_PICTURE})\n"
    return "\n".join([heading("More experts", section), text, picture, table(["E", "rows an expert", *names], cells)])


def training_step_tables(section: dict[str, Any]) -> str:
    rows = section["rows"]
    heads, _, *shares = profile_lines(rows)
    names = [name for name in rows[0]["seconds"] if name != "dense"]
    steps = [
        [
            row["family"],
            f"{1e3 * row['seconds']['dense']:.0f}",
            *(f"{row['seconds'][name] / row['seconds']['dense']:.2f}" for name in names),
        ]
        for row in rows
    ]
    text = (
        f"{section['layers']} layers a side, H {section['hidden']}, I {section['intermediate']}, "
        f"E {section['experts']}, K {section['K']}, {section['tokens']} tokens, float32, AdamW; forward, backward and "
        "optimizer step. The first table shares out the step's time under the profiler: before, with transformers' "
        "`grouped_mm` for the experts, and now, with `auto`. The second has whole steps over the dense model's.\n"
    )
    return "\n".join(
        [
            heading("Trainer's step", section),
            text,
            table(heads, shares),
            table(["family", "dense, ms", *names], steps),
        ]
    )


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "experts": experts_tables,
    "lora": lora_tables,
    "generate": generate_table,
    "growth": growth_table,
    "training_step": training_step_tables,
}


def table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(lines) + "\n"


def draw_experts(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a device and mode: each backend's step over ideal, against the rows that an expert gets."""
    panels = [
        (result["device"], mode, [row for row in result["experts"]["rows"] if row["mode"] == mode])
        for result in results
        if "experts" in result
        for mode in dict.fromkeys(row["mode"] for row in result["experts"]["rows"])
    ]

    def draw(axis: Any, panel: tuple[str, str, list[dict[str, Any]]]) -> None:
        device, mode, rows = panel
        for name in dict.fromkeys(name for row in rows for name in row["step_s"]):
            if name in ("ideal", "batched_mm"):
                continue
            points: dict[float, list[float]] = {}
            for row in rows:
                if name in row["step_s"]:
                    per_expert = row["T"] * row["K"] / row["E"]
                    points.setdefault(per_expert, []).append(row["step_s"][name] / row["step_s"]["ideal"])
            ordered = sorted((x, median(values)) for x, values in points.items())
            axis.plot(*zip(*ordered, strict=True), marker="o", label=name)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=f"{device}\n{mode}", xlabel="rows an expert", xscale="log", yscale="log")

    _draw_panels(panels, draw, "forward and backward, over ideal", path)


def draw_growth(results: list[dict[str, Any]], path: Path) -> None:
    """A panel a device: tokens a second over those at the fewest experts, against their number."""

    def draw(axis: Any, result: dict[str, Any]) -> None:
        rows = result["growth"]["rows"]
        for name in rows[0]["seconds"]:
            shares = [rows[0]["seconds"][name] / row["seconds"][name] for row in rows]
            axis.plot([row["E"] for row in rows], shares, marker="o", label=name)
        axis.axhline(0.85, color="grey", linewidth=0.8)
        axis.set(title=result["device"], xlabel="experts", xscale="log", ylim=(0, None))
        axis.set_xticks([row["E"] for row in rows], [str(row["E"]) for row in rows])
        axis.minorticks_off()

    measured = [result for result in results if "growth" in result]
    _draw_panels(measured, draw, "tokens a second, over the fewest experts", path)


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


def _over_dense(seconds: dict[str, float], name: str) -> str:
    return f"{seconds['dense'] / seconds[name]:.2f}" if name in seconds else ""


def _shapes(rows: list[dict[str, Any]], names: list[str], extra: str | None, cells: Callable) -> str:
    heads = [", ".join(Shape._fields), *([extra] if extra else []), *names]
    return table(heads, ([", ".join(str(row[size]) for size in Shape._fields), *cells(row, names)] for row in rows))


def _ratios(field: str) -> Callable:
    def cells(row: dict[str, Any], names: list[str]) -> list[str]:
        ideal, seconds = row[field]["ideal"], row[field]
        return [f"{ideal * 1e3:.1f}", *(f"{seconds[name] / ideal:.2f}" if name in seconds else "" for name in names)]

    return cells


def _megabytes(field: str) -> Callable:
    def cells(row: dict[str, Any], names: list[str]) -> list[str]:
        return [f"{row[field][name] / 1e6:.1f}" if name in row[field] else "" for name in names]

    return cells


if __name__ == "__main__":
    main()
