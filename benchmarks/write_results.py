"""
Writes docs/results.md and its picture from the files in benchmarks/results: no number there is typed by hand.

    python benchmarks/write_results.py
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

from overfitting import table as overfitting_table
from quality_results import (
    FAMILIES,
    LEVEL,
    Arm,
    Documents,
    domain_table,
    draw,
    family_section,
    load_arms,
    load_documents,
)
from tasks import compared
from write_performance import table


HERE = Path(__file__).parent
RESULTS, PAGE, PICTURE = HERE / "results", HERE.parent / "docs" / "results.md", "results_quality.png"
FURTHER = "further_metrics.csv"
INTRODUCTION = """\
# Results

Is a mixture worth having? Small dense models are trained, then continued as they are and as mixtures, on the same
batches, and tasks are learned by a dense model and by the mixture made of it. Arms, settings and expected signs were
committed before the runs, in `benchmarks/quality.toml`, but for four arms (D, M1 and M2 at twice their rate, M1 with 4
experts), and for the encoder, whose first try with BERT did not learn; every arm that has run is printed. The decoder
stands here twice: on another processor a dense checkpoint has other bits, and arms that came later have a D of their
own. One command an arm resumes what is missing:

```bash
python benchmarks/quality.py --family decoder --seeds 5 --arms D AA M1 M2
python benchmarks/write_results.py
```
"""
READING = f"""\
Loss is nats a token of a held-out document, averaged over the documents of a domain, then over the domains. "minus D"
is the same document's loss minus that of D from the same checkpoint; [{LEVEL} % intervals] are from a bootstrap over
seeds and, in each domain, over documents: with one seed, over documents alone, and AA shows what chance does beside
them. Rates are chosen on a tuning split with seed 0. Seconds are those of the training steps, on a CPU one thread's
own; peak memory is what a training adds to the process, in the run with the least. "D needs" is how many tokens D
trains for until its loss is the arm's.
"""
TASKS = """\
## Tasks

Dense model and mixture (4 experts, 2 a token) learn from the same checkpoint, with the same rows, rates and seeds. The
difference is mixture minus dense, with its 95 % interval by Student's t over the seeds. Runs are short, so that a row
takes minutes on one core: the scores are no records, and where both are near 0 their difference says little.
"""
BRANCHES = """\
## Experts from specialists

`python benchmarks/branches.py`: held-out nats a token, mean over seeds. D is the base, trained on the tokens of all
branches together; "NMI" is the normalised mutual information of expert and domain.
"""
OVERFITTING = """\
## Little data

`python benchmarks/overfitting.py`: 400 sentences of SST-2, the lowest two layers of MiniLM, up to 8 epochs; mean (and
ends) over the seeds. Unbalanced: 40 of the 400 training sentences are negative, and 193 of the 400 validation
sentences; a loss with class weights compares with no other.
"""


def main() -> None:
    configuration = tomllib.loads((HERE / "quality.toml").read_text())
    families = load_families(configuration)
    draw({title: (arms, documents) for _, title, _, arms, documents in families}, PAGE.with_name(PICTURE))
    for folder, _, _, arms, documents in families:
        (folder / "domains.csv").write_text(domain_table(arms, documents))
    (RESULTS / "tasks" / FURTHER).write_text(further_metrics(RESULTS / "tasks"))
    PAGE.write_text(render(configuration), encoding="utf-8")
    print("Wrote", PAGE.relative_to(HERE.parent))


def load_families(
    configuration: dict[str, Any], results: Path = RESULTS
) -> list[tuple[Path, str, dict[str, Any], dict[str, Arm], Documents]]:
    """
    Folder, title, settings, arms and test documents of each family that has results. A folder is named by its family
    and, of runs at another scale, by that and the device: `decoder`, `decoder--gpu--nvidia-h200`.
    """
    found = []
    for family, title in FAMILIES.items():
        for folder in sorted((results / "quality").glob("*")):
            name, _, scale = folder.name.partition("--")
            if name == family:
                scale, _, device = scale.partition("--")
                settings = (configuration[scale] if scale else configuration)[family]
                if arms := load_arms(folder, settings, configuration):
                    heading = f"{title}, on {device}" if device else title
                    found.append((folder, heading, settings, arms, load_documents(folder)))
    return found


def render(configuration: dict[str, Any], results: Path = RESULTS) -> str:
    parts = [INTRODUCTION]
    families = load_families(configuration, results)
    for folder, title, settings, arms, documents in families:
        parts += [f"## {title}\n", family_section(arms, settings, folder, documents)]
    if families:
        parts.append(READING)
    if any(len(arms) > 1 for *_, arms, _ in families):
        parts.append(f"![Arm minus D, with its interval]({PICTURE})\n")
    parts += tasks_section(results / "tasks")
    for name, section in (("branches", branches_section), ("overfitting", overfitting_section)):
        if (path := results / f"{name}.json").is_file():
            parts += section(json.loads(path.read_text()))
    return "\n".join(parts)


def tasks_section(folder: Path) -> list[str]:
    """Of each file of benchmarks/tasks.py: a task, learned by a dense model and by its mixture."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not rows:
        return []
    arms = list(dict.fromkeys(name for row in rows for name in row["arms"]))
    cells = [
        [
            row["task"],
            row["metric"] + ("" if row["higher_is_better"] else " (less is better)"),
            *(scores(row["arms"].get(name, [])) for name in arms),
            with_ends(row["difference"], row["interval"]),
            str(len(row["seeds"])),
            of_arms(row["minutes"], 1),
            of_arms(row["parameters_total"], 1e6),
            of_arms(row["parameters_active"], 1e6),
            f"`--row {path_name(row)}`",
        ]
        for row in rows
    ]
    heads = ["task", "metric", *arms, "difference", "seeds", "minutes", "M parameters", "active", "command"]
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    note = (
        f"Commands: `python benchmarks/tasks.py --row NAME`. Machine: {machines}. Further metrics, such as F1 and the"
    )
    return [TASKS, table(heads, cells), f"{note}\nperplexity of each domain: `benchmarks/results/tasks/{FURTHER}`.\n"]


def further_metrics(folder: Path) -> str:
    """The metrics of the tasks beside those of the table, means over the seeds, as CSV."""
    lines = ["task,metric,arm,mean"]
    for path in sorted(folder.glob("*.json")):
        for metric, values in json.loads(path.read_text()).get("further", {}).items():
            lines += [f"{path.stem},{metric},{arm},{fmean(of_seeds):.4f}" for arm, of_seeds in values.items()]
    return "\n".join([*lines, ""])


def path_name(row: dict[str, Any]) -> str:
    """The row's name in benchmarks/tasks.toml."""
    return row["command"].partition("--row ")[2].split()[0]


def branches_section(found: dict[str, Any]) -> list[str]:
    """Every model of benchmarks/branches.py, and what each mixture gained on the dense model with as much training."""
    runs, domains = list(found["seeds"].values()), found["setting"]["domains"]
    more = f", {found['setting']['mixture_steps']} steps more"

    def mean_loss(run: dict[str, Any], name: str) -> float:
        return fmean(run[name]["loss"][domain] for domain in domains)

    rows = []
    for name in runs[0]:
        numbers = [fmean(run[name]["loss"][domain] for run in runs) for domain in domains]
        shared = [run[name]["mutual_information"] for run in runs]
        rows.append([name, *(f"{number:.3f}" for number in (*numbers, fmean(numbers)))])
        rows[-1].append("" if shared[0] is None else f"{fmean(shared):.2f}")
        beside = "" if name == f"D{more}" or not name.endswith(more) else f"D{more}"
        pair = [[mean_loss(run, each) for run in runs] for each in (beside, name)] if beside else []
        rows[-1].append(with_ends(*compared(*pair)) if pair else "")
    heads = ["model", *domains, "mean", "NMI", f"minus D{more}"]
    return [BRANCHES, table(heads, rows), f"Seeds: {', '.join(found['seeds'])}. {found['machine']}.\n"]


def overfitting_section(found: dict[str, Any]) -> list[str]:
    seeds = sorted({name.rpartition(", seed ")[2] for name in found["runs"]})
    return [
        OVERFITTING,
        f"{overfitting_table(found['runs'])}\n",
        f"Seeds: {', '.join(seeds)}. [Curves](training.md).\n",
    ]


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


if __name__ == "__main__":
    main()
