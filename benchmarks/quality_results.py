"""
What the results of benchmarks/quality.py say: arms at their chosen rates, paired differences with intervals, tables.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from write_performance import table


DRAWS, LEVEL = 5000, 95
GOAL_M2 = -0.03  # nats
SIGNS = {"-": "below D", "+": "above D", "0": "as D"}
FAMILIES = {
    "decoder": "Decoder",
    "encoder": "Encoder, masked tokens",
    "encoder-decoder": "Encoder-decoder, translation",
}
Documents = list[tuple[str, str]]  # of the test split: domain and name


@dataclass(frozen=True)
class Arm:
    """The runs of one arm at its chosen learning rate, by seed."""

    name: str
    settings: dict[str, Any]
    rate: float
    runs: dict[int, dict[str, Any]]

    def mean(self, field: str) -> float:
        return fmean(run[field] for run in self.runs.values())

    def differences(self, other: Arm) -> tuple[list[int], np.ndarray]:
        """
        Seeds that both have, and by seed and document (S, D) the loss minus that of `other`.

        Raises:
            ValueError: they did not start from the same dense checkpoint.
        """
        seeds = sorted(self.runs.keys() & other.runs.keys())
        for seed in seeds:
            if self.runs[seed]["dense_sha256"] != other.runs[seed]["dense_sha256"]:
                raise ValueError(
                    f"`{self.name}` and `{other.name}` started from different dense checkpoints with seed {seed}. Run "
                    f"both again with one `--cache`."
                )
        losses = [[arm.runs[seed]["document_losses"] for seed in seeds] for arm in (self, other)]
        return seeds, np.array(losses[0]) - np.array(losses[1])


def load_documents(folder: Path) -> Documents:
    return [(domain, name) for domain, name in json.loads((folder / "documents.json").read_text())["test"]]


def load_arms(folder: Path, settings: dict[str, Any], configuration: dict[str, Any]) -> dict[str, Arm]:
    """The arms of a family whose learning rate is chosen, in the order of the configuration; none without D."""
    runs: dict[str, dict[float, dict[int, Any]]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["arm"], {}).setdefault(run["rate"], {})[run["seed"]] = run
    chosen: dict[str, Arm] = {}
    for name, of_arm in (configuration["arms"] | configuration["ablations"]).items():
        by_rate = runs.get(name, {})
        if other := of_arm.get("rate_of") or of_arm.get("evaluates"):
            rate = chosen[other].rate * of_arm.get("rate_factor", 1) if other in chosen else None
        else:
            rate = best_rate(by_rate, settings)
        if rate is not None and rate in by_rate:
            chosen[name] = Arm(name, of_arm, rate, by_rate[rate])
    return chosen if "D" in chosen else {}


def best_rate(by_rate: dict[float, dict[int, Any]], settings: dict[str, Any]) -> float | None:
    """None where not all rates have been tried."""
    seed = settings["rate_seed"]
    tried = {rate: by_rate[rate][seed]["tuning_loss"] for rate in settings["rates"] if seed in by_rate.get(rate, {})}
    return min(tried, key=lambda rate: tried[rate]) if len(tried) == len(settings["rates"]) else None


def interval(differences: np.ndarray, documents: Documents, draws: int = DRAWS) -> tuple[float, float, float]:
    """
    The mean difference, and the ends of its interval, of `differences` (S, D) over seeds and documents. Each draw
    takes seeds with replacement and, in each domain, documents with replacement, the same ones for all its seeds and
    for all domains that have the same documents (the directions of a translation). A domain weighs as much as another,
    however many documents it has.
    """
    generator = np.random.default_rng(0)
    seeds = len(differences)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, S)
    weights: dict[tuple[str, ...], np.ndarray] = {}
    domains, drawn, mean = sorted({domain for domain, _ in documents}), np.zeros(draws), 0.0
    for domain in domains:
        columns = [place for place, (each, _) in enumerate(documents) if each == domain]
        names, count = tuple(documents[place][1] for place in columns), len(columns)
        if names not in weights:
            weights[names] = generator.multinomial(count, np.full(count, 1 / count), size=draws) / count
        part = differences[:, columns]
        drawn += np.einsum("bs,sd,bd->b", seed_weights, part, weights[names], optimize=True) / len(domains)
        mean += part.mean() / len(domains)
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(mean), float(low), float(high)


def family_section(arms: dict[str, Arm], settings: dict[str, Any], folder: Path, documents: Documents) -> str:
    dense = arms["D"]
    compared = {name: arm for name, arm in arms.items() if "varies" not in arm.settings}
    some = next(iter(dense.runs.values()))
    domains = {domain for domain, _ in documents}
    head = (
        f"A {settings['model_type']} of {some['parameters_total'] / 1e6:.1f} M parameters, trained on "
        f"{settings['dense_tokens']:,} tokens; {some['tokens']:,} more in each arm but D+ and W; "
        f"{len(documents)} test documents in {len(domains)} domains; {some['device']}; "
        f"{', '.join(f'{name} {version}' for name, version in some['versions'].items())}.\n"
    )
    parts = [head, arms_table(compared, documents)]
    if folder.name == "decoder":  # for it the goals were set
        parts.append(goals(compared, documents))
    parts.append(cost_table(compared))
    if len(arms) > 1:
        parts.append(f"By domain: `benchmarks/results/quality/{folder.name}/domains.csv`.\n")
    if len(compared) < len(arms):
        parts.append(ablation_table(arms, documents))
    return "\n".join(part for part in parts if part)


def arms_table(arms: dict[str, Arm], documents: Documents) -> str:
    rows = []
    for name, arm in arms.items():
        row = [f"**{name}** {arm.settings['label']}", SIGNS[arm.settings["expected"]]]
        row += [str(len(arm.runs)), f"{arm.rate:g}", f"{arm.mean('test_loss'):.4f}"]
        if name != "D":
            _, differences = arm.differences(arms["D"])
            row += [shown(interval(differences, documents)), outside(differences, documents)]
        rows.append(row + [""] * (7 - len(row)))
    return table(["arm", "expected", "seeds", "rate", "test loss", "minus D", "seeds below 0, above 0"], rows)


def cost_table(arms: dict[str, Arm]) -> str:
    heads = ["arm", "M parameters", "active", "MFLOPs a token", "seconds", "peak MiB", "D needs"]
    rows = [
        [
            name,
            f"{median(run['parameters_total'] for run in arm.runs.values()) / 1e6:.2f}",
            f"{median(run['parameters_active'] for run in arm.runs.values()) / 1e6:.2f}",
            f"{median(run['flops_per_token'] for run in arm.runs.values()) / 1e6:.2f}",
            f"{median(run.get('cpu_seconds', run.get('seconds')) for run in arm.runs.values()):.0f}",
            f"{min(run['peak_bytes'] for run in arm.runs.values()) / 2**20:.0f}",
            tokens_needed(arm, arms),
        ]
        for name, arm in arms.items()
        if not arm.settings.get("evaluates")
    ]
    return table(heads, rows)


def ablation_table(arms: dict[str, Arm], documents: Documents) -> str:
    """Each beside the arm in which it changes one thing: the difference of the seeds that both have."""
    rows = []
    for arm in arms.values():
        if "varies" in arm.settings:
            other = arms[arm.settings["rate_of"]]
            found = [interval(arm.differences(each)[1], documents) for each in (other, arms["D"])]
            row = [arm.settings["varies"], arm.settings["label"], other.name, shown(found[0])]
            rows.append([*row, SIGNS[arm.settings["expected"]], shown(found[1]), str(len(arm.runs))])
    heads = ["what is varied", "arm", "beside", "minus that, same seeds", "expected", "minus D", "seeds"]
    return table(heads, rows)


def intervals_by_domain(
    arms: dict[str, Arm], documents: Documents
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Of each arm but D, its interval in each domain."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name, arm in arms.items():
        if name != "D":
            _, differences = arm.differences(arms["D"])
            found[name] = {}
            for domain in sorted({domain for domain, _ in documents}):
                places = [place for place, (each, _) in enumerate(documents) if each == domain]
                found[name][domain] = interval(differences[:, places], [documents[place] for place in places])
    return found


def domain_table(arms: dict[str, Arm], documents: Documents) -> str:
    """As CSV: by arm and domain the mean difference to D and the ends of its interval."""
    lines = ["arm,domain,minus_D,low,high"]
    for name, intervals in intervals_by_domain(arms, documents).items():
        for domain, ends in intervals.items():
            lines.append(",".join([name, domain, *(f"{value:+.4f}" for value in ends)]))
    return "\n".join(lines) + "\n"


def shown(found: tuple[float, float, float]) -> str:
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*found)


def outside(differences: np.ndarray, documents: Documents) -> str:
    """In how many seeds the interval over documents lies below 0, and in how many above."""
    alone = [interval(differences[place : place + 1], documents) for place in range(len(differences))]
    return f"{sum(high < 0 for _, _, high in alone)}, {sum(low > 0 for _, low, _ in alone)} of {len(alone)}"


def goals(arms: dict[str, Arm], documents: Documents) -> str:
    """What was hoped for, and what came."""
    sentences = []
    if "M1" in arms:
        by_domain = intervals_by_domain({name: arms[name] for name in ("D", "M1")}, documents)["M1"]
        below = sum(high < 0 for _, _, high in by_domain.values())
        _, differences = arms["M1"].differences(arms["D"])
        seeds = outside(differences, documents).split(",")[0]
        sentences.append(
            f"M1, at D's FLOPs and tokens, is below D with an interval that leaves out 0 in {seeds} of "
            f"{len(differences)} seeds (goal: 4 of 5) and {below} of {len(by_domain)} domains (goal: 8 of 10)."
        )
    if "M2" in arms:
        mean = interval(arms["M2"].differences(arms["D"])[1], documents)[0]
        sentences.append(f"M2 is at {mean:+.4f} nats (goal: {GOAL_M2} or lower).")
    return " ".join(sentences) + "\n" if sentences else ""


def tokens_needed(arm: Arm, arms: dict[str, Arm]) -> str:
    """
    How many tokens D needs until its loss is the arm's last. Within D's budget by straight lines between the points
    of its curve, whose rate was still high there, so that it is a little too many. Beyond it nothing but D+'s end is
    known: the points before belong to a longer schedule.
    """
    if arm.name in ("D", "D+"):
        return ""
    dense, longer = arms["D"], arms.get("D+")
    seeds = sorted(arm.runs.keys() & dense.runs.keys())
    goal = fmean(arm.runs[seed]["curve"][-1][1] for seed in seeds)
    curves = [dense.runs[seed]["curve"] for seed in seeds]
    curve = [(point[0][0], fmean(loss for _, loss in point)) for point in zip(*curves, strict=True)]
    reached = [
        before + (after - before) * (loss_before - goal) / (loss_before - loss_after)
        for (before, loss_before), (after, loss_after) in pairwise(curve)
        if loss_before > goal >= loss_after
    ]
    if reached:
        return f"{round(reached[0], -3):,.0f}"
    known = [run for seed, run in longer.runs.items() if seed in seeds] if longer else []
    if known and fmean(run["curve"][-1][1] for run in known) <= goal:
        return f"{curve[-1][0]:,} to {known[0]['tokens']:,}"
    return f"more than {known[0]['tokens'] if known else curve[-1][0]:,}"


def draw(found: dict[str, tuple[dict[str, Arm], Documents]], path: Path) -> None:
    """
    A panel a family with its arms minus D, and one of ablations minus the arm that they change; with intervals. Light
    dots are single seeds. P, which is far to the right, stays in the table.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    panels = []  # title, what it is compared with, the difference of each arm, its documents
    for title, (arms, documents) in found.items():
        compared = [name for name, arm in arms.items() if not {"varies", "evaluates"} & arm.settings.keys()]
        ablations = [name for name, arm in arms.items() if "varies" in arm.settings]
        for names, heading, unit in ((compared, title, "D"), (ablations, f"{title}: ablations", "its arm")):
            others = {
                name: arms[name].settings.get("rate_of") if unit != "D" else "D" for name in names if name != "D"
            }
            rows = {name: arms[name].differences(arms[other or "D"])[1] for name, other in others.items()}
            if rows:
                panels.append((heading, unit, rows, documents))
    if not panels:
        return
    heights = [1.2 + 0.32 * len(rows) for _, _, rows, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(7, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (title, unit, rows, documents) in zip(axes[:, 0], panels, strict=True):
        for place, differences in enumerate(reversed(rows.values())):
            mean, low, high = interval(differences, documents)
            axis.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="#0072B2", capsize=3)
            alone = [interval(row[None], documents, draws=1)[0] for row in differences]
            axis.plot(alone, [place + 0.2] * len(alone), ".", color="#0072B2", alpha=0.35)
        axis.axvline(0.0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(rows)), list(reversed(rows)))
        axis.set(title=title, xlabel=f"held-out loss minus {unit}, nats a token", ylim=(-0.5, len(rows) - 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
