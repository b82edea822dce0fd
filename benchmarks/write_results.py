"""
Writes docs/results.md and its picture from the files in benchmarks/results/quality and benchmarks/results/tasks: no
number there is typed by hand.

    python benchmarks/write_results.py
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from write_performance import table


HERE = Path(__file__).parent
RESULTS, PAGE, PICTURE = HERE / "results", HERE.parent / "docs" / "results.md", "results_quality.png"
DRAWS, LEVEL = 5000, 95
GOAL_M2 = -0.03  # nats
SIGNS = {"-": "below D", "+": "above D", "0": "as D"}
INTRODUCTION = """\
# Results

Is a mixture worth having? Small dense models are trained, then continued as they are and as mixtures, on the same
batches, and tasks are learned by a dense model and by the mixture made of it. Arms, settings and expected signs were
committed before the runs, in `benchmarks/quality.toml`; every arm that has run is printed. One command an arm resumes
what is missing:

```bash
python benchmarks/quality.py --family decoder --seeds 5 --arms D AA M1 M2
python benchmarks/write_results.py
```
"""
READING = f"""\
Loss is nats a token of a held-out document, averaged over the documents of a domain, then over the domains. "minus D"
is the same document's loss minus that of D from the same checkpoint; [{LEVEL} % intervals] are from a bootstrap over
seeds and, in each domain, over documents: with one seed, over documents alone, and AA shows what chance does beside
them. Rates are chosen on a tuning split with seed 0, three for each arm. CPU seconds are one thread's, of the training
steps alone; peak memory is what a training adds to the process, in the run with the least (memory that the system
takes back between two runs looks added). "D needs" is how many tokens D trains for,
or D+ where it has run, until its loss is the arm's.
"""
FAMILIES = {
    "decoder": "Decoder",
    "encoder": "Encoder, masked tokens",
    "encoder-decoder": "Encoder-decoder, translation",
}


@dataclass(frozen=True)
class Arm:
    """The runs of one arm at its chosen learning rate, by seed."""

    name: str
    settings: dict[str, Any]
    rate: float
    runs: dict[int, dict[str, Any]]

    def mean(self, field: str) -> float:
        return fmean(run[field] for run in self.runs.values())

    def differences(self, dense: Arm) -> tuple[list[int], np.ndarray]:
        """Seeds that both have, and by seed and document (S, D) the loss minus that of `dense`."""
        seeds = sorted(self.runs.keys() & dense.runs.keys())
        losses = [[arm.runs[seed]["document_losses"] for seed in seeds] for arm in (self, dense)]
        return seeds, np.array(losses[0]) - np.array(losses[1])


def main() -> None:
    configuration = tomllib.loads((HERE / "quality.toml").read_text())
    found = {family: load_arms(RESULTS / "quality" / family, family, configuration) for family in FAMILIES}
    draw(found, PAGE.with_name(PICTURE))
    for family, arms in found.items():
        if "D" in arms:
            documents = json.loads((RESULTS / "quality" / family / "documents.json").read_text())
            domain_file(family).write_text(domain_table(arms, documents))
    PAGE.write_text(render(configuration), encoding="utf-8")
    print("Wrote", PAGE.relative_to(HERE.parent))


def render(configuration: dict[str, Any], results: Path = RESULTS) -> str:
    parts = [INTRODUCTION]
    measured, compared = False, False
    for family, title in FAMILIES.items():
        folder = results / "quality" / family
        arms = load_arms(folder, family, configuration)
        if "D" in arms:
            measured, compared = True, compared or len(arms) > 1
            documents = json.loads((folder / "documents.json").read_text())
            parts += [f"## {title}\n", family_section(arms, configuration, family, documents)]
    if measured:
        parts.append(READING)
    if compared:
        parts.append(f"![Arm minus D, with its interval]({PICTURE})\n")
    return "\n".join(parts + tasks_section(results / "tasks"))


def load_arms(folder: Path, family: str, configuration: dict[str, Any]) -> dict[str, Arm]:
    """The arms whose learning rate is chosen, in the order of the configuration."""
    runs: dict[str, dict[float, dict[int, Any]]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["arm"], {}).setdefault(run["rate"], {})[run["seed"]] = run
    chosen: dict[str, Arm] = {}
    for name, settings in (configuration["arms"] | configuration["ablations"]).items():
        by_rate = runs.get(name, {})
        if other := settings.get("rate_of") or settings.get("evaluates"):
            rate = chosen[other].rate * settings.get("rate_factor", 1) if other in chosen else None
        else:
            rate = best_rate(by_rate, configuration[family])
        if rate is not None and rate in by_rate:
            chosen[name] = Arm(name, settings, rate, by_rate[rate])
    return chosen


def best_rate(by_rate: dict[float, dict[int, Any]], settings: dict[str, Any]) -> float | None:
    """None where not all rates have been tried."""
    seed = settings["rate_seed"]
    tried = {rate: by_rate[rate][seed]["tuning_loss"] for rate in settings["rates"] if seed in by_rate.get(rate, {})}
    return min(tried, key=lambda rate: tried[rate]) if len(tried) == len(settings["rates"]) else None


def interval(differences: np.ndarray, domains: list[str], draws: int = DRAWS) -> tuple[float, float, float]:
    """
    The mean difference, and the ends of its interval, of `differences` (S, D) over seeds and documents. Each draw
    takes seeds with replacement and, in each domain, documents with replacement, the same ones for all its seeds. A
    domain weighs as much as another, however many documents it has.
    """
    generator = np.random.default_rng(0)
    seeds = len(differences)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, S)
    names, drawn, mean = sorted(set(domains)), np.zeros(draws), 0.0
    for name in names:
        columns = [number for number, domain in enumerate(domains) if domain == name]
        documents = len(columns)
        document_weights = generator.multinomial(documents, np.full(documents, 1 / documents), size=draws) / documents
        part = differences[:, columns]
        drawn += np.einsum("bs,sd,bd->b", seed_weights, part, document_weights, optimize=True) / len(names)
        mean += part.mean() / len(names)
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(mean), float(low), float(high)


def family_section(arms: dict[str, Arm], configuration: dict[str, Any], family: str, documents: dict[str, Any]) -> str:
    dense, domains = arms["D"], [domain for domain, _ in documents["test"]]
    ablations = {name: arm for name, arm in arms.items() if "varies" in arm.settings}
    arms = {name: arm for name, arm in arms.items() if name not in ablations}
    settings = configuration[family]
    some = next(iter(dense.runs.values()))
    head = (
        f"A {settings['model_type']} of {some['parameters_total'] / 1e6:.1f} M parameters, trained on "
        f"{settings['dense_tokens']:,} tokens; {some['tokens']:,} more in each arm but D+ and W; {len(domains)} test "
        f"documents in {len(set(domains))} domains; {some['device']}; "
        f"{', '.join(f'{name} {version}' for name, version in some['versions'].items())}.\n"
    )
    rows, by_domain, compared = [], intervals_by_domain(arms, domains), len(arms) > 1
    for name, arm in arms.items():
        row = [f"**{name}** {arm.settings['label']}", SIGNS[arm.settings["expected"]]]
        row += [str(len(arm.runs)), f"{arm.rate:g}", f"{arm.mean('test_loss'):.4f}"]
        if name == "D":
            rows.append([*row, "", ""])
            continue
        _, differences = arm.differences(dense)
        rows.append([*row, shown(interval(differences, domains)), outside(differences, domains)])
    heads = ["arm", "expected", "seeds", "rate", "test loss", "minus D", "seeds below 0, above 0"]
    costs = [
        [
            name,
            f"{median(run['parameters_total'] for run in arm.runs.values()) / 1e6:.2f}",
            f"{median(run['parameters_active'] for run in arm.runs.values()) / 1e6:.2f}",
            f"{median(run['flops_per_token'] for run in arm.runs.values()) / 1e6:.2f}",
            f"{median(run['cpu_seconds'] for run in arm.runs.values()):.0f}",
            f"{min(run['peak_bytes'] for run in arm.runs.values()) / 2**20:.0f}",
            tokens_needed(arm, arms),
        ]
        for name, arm in arms.items()
        if not arm.settings.get("evaluates")
    ]
    cost_heads = ["arm", "M parameters", "active", "MFLOPs a token", "CPU seconds", "peak MiB", "D needs"]
    parts = [head, table(heads, rows), goals(arms, by_domain, domains), table(cost_heads, costs)]
    if compared:
        parts.append(f"By domain: `{domain_file(family).relative_to(HERE.parent)}`.\n")
    if ablations:
        rows = [
            [
                arm.settings["varies"],
                arm.settings["label"],
                SIGNS[arm.settings["expected"]],
                str(len(arm.runs)),
                shown(interval(arm.differences(dense)[1], domains)),
            ]
            for arm in ablations.values()
        ]
        parts.append(table(["what is varied", "arm", "expected", "seeds", "minus D"], rows))
    return "\n".join(part for part in parts if part)


def intervals_by_domain(arms: dict[str, Arm], domains: list[str]) -> dict[str, list[tuple[float, float, float]]]:
    """Of each arm but D, its interval in each domain, in their order."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, arm in arms.items():
        if name != "D":
            _, differences = arm.differences(arms["D"])
            columns = [
                [place for place, each in enumerate(domains) if each == domain] for domain in sorted(set(domains))
            ]
            found[name] = [interval(differences[:, part], ["one"] * len(part)) for part in columns]
    return found


def domain_file(family: str, results: Path = RESULTS) -> Path:
    return results / "quality" / family / "domains.csv"


def domain_table(arms: dict[str, Arm], documents: dict[str, Any]) -> str:
    """As CSV: by arm and domain the mean difference to D and the ends of its interval."""
    domains = [domain for domain, _ in documents["test"]]
    lines = ["arm,domain,minus_D,low,high"]
    for name, intervals in intervals_by_domain(arms, domains).items():
        for domain, ends in zip(sorted(set(domains)), intervals, strict=True):
            lines.append(",".join([name, domain, *(f"{value:+.4f}" for value in ends)]))
    return "\n".join(lines) + "\n"


def shown(found: tuple[float, float, float]) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*found)


def outside(differences: np.ndarray, domains: list[str]) -> str:
    """In how many seeds the interval over documents lies below 0, and in how many above."""
    alone = [interval(differences[place : place + 1], domains) for place in range(len(differences))]
    return f"{sum(high < 0 for _, _, high in alone)}, {sum(low > 0 for _, low, _ in alone)} of {len(alone)}"


def goals(arms: dict[str, Arm], by_domain: dict[str, list[Any]], domains: list[str]) -> str:
    """What was hoped for, and what came."""
    sentences = []
    if "M1" in by_domain:
        below = sum(high < 0 for _, _, high in by_domain["M1"])
        seeds = outside(arms["M1"].differences(arms["D"])[1], domains).split(",")[0]
        sentences.append(
            f"M1, at D's FLOPs and tokens, is below D with an interval that leaves out 0 in {seeds} of "
            f"{len(arms['M1'].differences(arms['D'])[0])} seeds (goal: 4 of 5) and {below} of {len(by_domain['M1'])} "
            "domains (goal: 8 of 10)."
        )
    if "M2" in by_domain:
        mean = interval(arms["M2"].differences(arms["D"])[1], domains)[0]
        sentences.append(f"M2 is at {mean:+.4f} nats (goal: {GOAL_M2} or lower).")
    return " ".join(sentences) + "\n" if sentences else ""


def tokens_needed(arm: Arm, arms: dict[str, Arm]) -> str:
    """How many tokens the dense model needs until its loss is the arm's last, by straight lines between points."""
    if arm.name in ("D", "D+"):
        return ""
    dense = arms["D+" if "D+" in arms else "D"]
    needed = []
    for seed in arm.runs.keys() & dense.runs.keys():
        curve, goal = dense.runs[seed]["curve"], arm.runs[seed]["curve"][-1][1]
        reached = [
            before + (after - before) * (loss_before - goal) / (loss_before - loss_after)
            for (before, loss_before), (after, loss_after) in pairwise(curve)
            if loss_before > goal >= loss_after
        ]
        if not reached:
            most = max(run["tokens"] for run in dense.runs.values())
            return f"more than {most:,}"
        needed.append(reached[0])
    return f"{round(fmean(needed), -3):,.0f}" if needed else ""


def tasks_section(folder: Path) -> list[str]:
    """One row for each file of benchmarks/tasks.py: a task, learned by a dense model and by its mixture."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not rows:
        return []
    arms = list(dict.fromkeys(name for row in rows for name in row["arms"]))
    cells = [
        [
            row["task"],
            row["metric"],
            *(scores(row["arms"].get(name, [])) for name in arms),
            with_ends(row["difference"], row["interval"]),
            of_arms(row["minutes"], 1),
            of_arms(row["parameters_total"], 1e6),
            of_arms(row["parameters_active"], 1e6),
            f"`{row['command']}`",
        ]
        for row in rows
    ]
    heads = ["task", "metric", *arms, "difference", "minutes", "M parameters", "active", "command"]
    return ["## Tasks\n", table(heads, cells)]


def scores(values: list[float]) -> str:
    """Their mean and, of several seeds, the lowest and the highest."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def with_ends(difference: float, ends: list[float] | None) -> str:
    return f"{difference:+.3f}" + ("" if ends is None else " [{:+.3f}, {:+.3f}]".format(*ends))


def of_arms(value: float | dict[str, float], unit: float) -> str:
    """One number, or one for each arm in their order."""
    values = value.values() if isinstance(value, dict) else [value]
    return ", ".join(f"{each / unit:.1f}" for each in values)


def draw(found: dict[str, dict[str, Arm]], path: Path) -> None:
    """A panel a family: each arm minus D, with its interval; light dots are single seeds."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    measured = {family: arms for family, arms in found.items() if len(arms) > 1 and "D" in arms}
    if not measured:
        return
    figure, axes = plt.subplots(1, len(measured), figsize=(6 * len(measured), 3.6), squeeze=False)
    for axis, (family, arms) in zip(axes[0], measured.items(), strict=True):
        documents = json.loads((RESULTS / "quality" / family / "documents.json").read_text())
        domains = [domain for domain, _ in documents["test"]]
        names = [name for name, arm in arms.items() if name != "D" and not arm.settings.get("evaluates")]
        for place, name in enumerate(reversed(names)):
            _, differences = arms[name].differences(arms["D"])
            mean, low, high = interval(differences, domains)
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="#0072B2", capsize=3)
            alone = [interval(row[None], domains, draws=1)[0] for row in differences]
            axis.plot(alone, [place + 0.2] * len(alone), ".", color="#0072B2", alpha=0.35)
        axis.axvline(0.0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(names)), list(reversed(names)))
        axis.set(title=FAMILIES[family], xlabel="held-out loss minus D, nats a token", ylim=(-0.5, len(names) - 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
