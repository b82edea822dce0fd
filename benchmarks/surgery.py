"""
What does a mixture lose with its experts? Loss by domain against the share of experts left.

    python benchmarks/surgery.py
    python benchmarks/surgery.py --page

The mixture is arm M2 of benchmarks/quality.py, seed 0: a Llama of four layers copied into 8 experts, 2 a token, and
trained on one million tokens of ten domains and Python source. No real mixture that is small enough is among the data,
so that this is the only one. Each cut is a file in `benchmarks/results/surgery/`; what has its file is not run again.

The loss is the mean over the domains of nats a token on the same windows of the test split. Experts are measured on
windows of the tuning split: of all domains, with five seeds that choose the windows, or of one. Healing is 100 steps
of LoRA on the experts (of a dense model on its feed-forwards) on training rows that the mixture has seen. Training on
is 100 steps of all weights on other such rows, on the labels alone or with the loss of training/run_distill.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from hf_sparse_moe import expand, expert_lora_config, measure_experts, merge_experts, prune_experts, to_dense
from hf_sparse_moe.routing import skip_experts
from measuring import RESULTS, interleave
from quality import CACHE, DATA, HERE, Comparison


ARM, SEED, RATE = "M2", 0, 0.004  # the rate that benchmarks/quality.py chose
SEEDS, KEPT, OF = 5, (6, 4, 2), 8
DENSE = ("dense mean", "dense best", "dense merge")
PRUNING, MERGING = ("reap", "ean", "frequency", "naee", "random"), ("hc", "m-smoe", "ream")
CALIBRATION_ROWS, TEST_ROWS = 64, 10  # windows of 128 tokens; the second of each domain
HEALING_STEPS, HEALING_ROWS, HEALING_RATE, RANK = 100, 4, 2e-3, 8
TRAINING_SEEDS, TRAINING_STEPS, TRAINING_ROWS, TRAINING_RATE = 3, 100, 16, 1e-3
TEACHER_WEIGHTS = {"labels": 0.0, "distilled": 0.25}
TRAINED = (("dense mean", 1), ("reap", 4))
BETAS = (0.25, 0.5, 0.75, "median")
GROWN = (("by need", 2), ("by need", 4), ("all alike", 2), ("all alike", 4))  # twice the experts, and how many a token

# What is expected, written before the first run: the sign of the first loss minus the second, at a share of experts
# left, means over the calibration seeds. "-" lower, "+" higher, "0" within two standard deviations of the seeds.
EXPECTED = (
    ("reap", "ean", 0.5, "-", "the router's weight tells what the norm alone does not (arXiv 2510.13999)"),
    ("ean", "frequency", 0.5, "-", "how much an expert adds matters beside how often"),
    ("frequency", "random", 0.5, "-", "an expert that serves few tokens is missed by few"),
    ("reap", "random", 0.25, "-", "as above, and more of it"),
    ("hc", "reap", 0.75, "0", "two experts fewer: merging and pruning are close"),
    ("hc", "reap", 0.25, "+", "few experts of an upcycled copy are averaged away from what they specialised in"),
    ("hc", "reap, healed", 0.5, "+", "100 steps of healing find most of what was lost"),
    ("dense mean", "reap", 0.25, "0", "two experts of eight, always the same two: a dense model of twice the width"),
    ("dense mean, distilled", "dense mean, labels", 0.25, "-", "the mixture's distribution tells more than one token"),
    ("reap, distilled", "reap, labels", 0.5, "-", "as above"),
    ("reap, one domain", "reap", 0.5, "+", "experts of other domains look idle on the text of one"),
)


class Surgery:
    """The mixture, its text, and the result files."""

    def __init__(self, cache: Path, data: Path, output: Path):
        configuration = tomllib.loads((HERE / "quality.toml").read_text())
        self.comparison = Comparison("decoder", configuration, data, cache, cache / "results")
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        test = self.comparison.text.test
        by_domain = rows_by_domain(test)
        self.domains = sorted(by_domain)
        self.test = {name: every_nth(rows, TEST_ROWS) for name, rows in by_domain.items()}
        self.tuning = rows_by_domain(self.comparison.text.tuning)
        self.measured: dict[tuple[int, str], Any] = {}
        self._mixture: PreTrainedModel | None = None

    @property
    def mixture(self) -> PreTrainedModel:
        """The trained mixture; trained where the cache lacks it, in about four minutes."""
        if self._mixture is None:
            folder = self.comparison.cache / f"{ARM}-seed{SEED}-rate{RATE:g}"
            if not folder.is_dir():
                model = self.comparison.start(ARM, SEED)
                self.comparison.train(model, self.comparison.rows(ARM, SEED), RATE, f"{ARM}, to be cut")
                partial = folder.with_name(f"{folder.name}.partial")
                model.save_pretrained(partial)
                partial.rename(folder)
            self._mixture = AutoModelForCausalLM.from_pretrained(folder).eval()
        return self._mixture

    def measure(self, seed: int, domain: str = "all") -> Any:
        """What the experts do on the tuning windows of all domains, or of one."""
        if (seed, domain) not in self.measured:
            rows = torch.cat([self.tuning[name] for name in self.domains]) if domain == "all" else self.tuning[domain]
            chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_ROWS]]
            batches = [self.comparison.text.tuning.batch(part) for part in chosen.split(16)]
            self.measured[seed, domain] = measure_experts(self.mixture, batches)
        return self.measured[seed, domain]

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Nats a token of each domain."""
        found = {}
        for name, rows in self.test.items():
            nats, tokens = self.comparison.row_losses(model, self.comparison.text.test, rows)
            found[name] = (nats.sum() / tokens.sum()).item()
        return found

    def heal(self, model: PreTrainedModel) -> nn.Module:
        """100 steps of LoRA on the experts, or on what took their place."""
        torch.manual_seed(0)
        if hasattr(model, "sparse_blocks"):
            config: Any = expert_lora_config(model, r=RANK, lora_alpha=2 * RANK)
        else:
            names = ["gate_proj", "up_proj", "down_proj"]
            config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
        healed = get_peft_model(model, config).train()
        parameters = [parameter for parameter in healed.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=HEALING_RATE)
        rows = self.comparison.rows(ARM, SEED)[: HEALING_STEPS * HEALING_ROWS]
        for step, part in enumerate(rows.split(HEALING_ROWS)):
            optimizer.param_groups[0]["lr"] = HEALING_RATE * (1 - step / HEALING_STEPS)
            healed(**self.comparison.text.train.batch(part)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return healed.eval()

    def train(self, model: PreTrainedModel, how: str, seed: int) -> nn.Module:
        """100 steps of all weights as training/run_distill.py takes them; `how` is a key of `TEACHER_WEIGHTS`."""
        sys.path.append(str(HERE.parent / "training"))
        from run_distill import DistillationTrainer

        rows = self.comparison.rows(ARM, SEED)
        chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        settings = SimpleNamespace(teacher_weight=TEACHER_WEIGHTS[how], temperature=1.0, hidden_state_weight=0.0)
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=TRAINING_STEPS,
                per_device_train_batch_size=TRAINING_ROWS,
                learning_rate=TRAINING_RATE,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            )
            DistillationTrainer(
                model,
                arguments,
                teacher=AutoModelForCausalLM.from_pretrained(self.mixture.name_or_path),  # it is frozen
                settings=settings,
                train_dataset=chosen.tolist(),
                data_collator=lambda rows: self.comparison.text.train.batch(torch.tensor(rows)),
            ).train()
        return model.eval()

    def cases(self) -> Iterator[tuple[dict[str, Any], Callable[[], nn.Module]]]:
        """All that is run: what a result file says of itself, and what makes the model."""
        mixture = self.mixture

        def cut(method: str, kept: int, seed: int, domain: str = "all") -> nn.Module:
            if method.startswith("dense"):
                return to_dense(mixture, self.measure(seed, domain), method.split()[1])
            if method in MERGING:
                return merge_experts(mixture, self.measure(seed, domain), kept, method)
            measured = None if method == "random" else self.measure(seed, domain)
            return prune_experts(mixture, measured, keep=kept, method=method, seed=seed)

        def case(method: str, kept: int, seed: int, healed: bool | str = False, domain: str = "all") -> Any:
            told = {"method": method, "kept": kept, "of": OF, "seed": seed, "calibration": domain, "healed": healed}

            def make() -> nn.Module:
                model: Any = (
                    cut(method, kept, seed, domain)
                    if kept < OF
                    else AutoModelForCausalLM.from_pretrained(mixture.name_or_path)
                )
                if isinstance(healed, str):
                    return self.train(model, healed, seed)
                return self.heal(model) if healed else model

            return told, make

        yield case("none", OF, 0)
        for seed in range(SEEDS):
            for kept in KEPT:
                yield from (case(method, kept, seed) for method in (*PRUNING, *MERGING))
            yield from (case(method, 1, seed) for method in DENSE)
        yield case("none", OF, 0, healed=True)
        for kept in (4, 2):
            yield from (case(method, kept, 0, healed=True) for method in (*PRUNING, *MERGING))
        yield from (case(method, 1, 0, healed=True) for method in DENSE)
        for seed in range(TRAINING_SEEDS):
            for how in TEACHER_WEIGHTS:
                yield from (case(method, kept, seed, how) for method, kept in TRAINED)
        for domain in self.domains:
            yield from (case(method, 4, 0, domain=domain) for method in ("reap", "hc"))

    def run(self, methods: list[str] | None) -> None:
        """All cases, or those of some methods."""
        for told, make in self.cases():
            if methods is not None and told["method"].split()[0] not in methods:
                continue
            name = "-".join(str(value).replace(" ", "_") for value in told.values())
            path = self.output / f"{name}.json"
            if path.is_file():
                continue
            began = time.process_time()
            model: Any = make()
            losses = self.losses(model)
            result = {
                **told,
                "loss": fmean(losses.values()),
                "by_domain": {domain: round(loss, 5) for domain, loss in losses.items()},
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "cpu_seconds": round(time.process_time() - began, 1),
            }
            write(path, result)
            print(f"{name}: {result['loss']:.4f}", file=sys.stderr, flush=True)
        self.run_growing()
        self.run_skipping()

    def run_growing(self) -> None:
        """Loss with twice the experts, before any training."""
        for copies, top_k in GROWN:
            path = self.output / f"grown-{copies.replace(' ', '_')}-{top_k}.json"
            if not path.is_file():
                by = self.measure(0) if copies == "by need" else None
                losses = self.losses(expand(self.mixture, 2, by=by, num_experts_per_tok=top_k))
                write(path, {"grown": copies, "num_experts_per_tok": top_k, "loss": fmean(losses.values())})

    def run_skipping(self) -> None:
        """Loss and CPU time with experts skipped, beside the same model with all of them, in turns."""
        batches = [self.comparison.text.tuning.batch(self.tuning[name][:8]) for name in self.domains]
        model: Any = self.mixture
        for beta in BETAS:
            path = self.output / f"skip-{beta}.json"
            if path.is_file():
                continue
            with skip_experts(model, beta, batches) as skipped:
                losses = self.losses(model)
            share, betas = skipped.share, skipped.betas

            none = (0.0,) * len(betas)
            contenders = {name: partial(self.pass_skipping, each) for name, each in (("all", none), ("fewer", betas))}
            seconds = interleave(contenders, "cpu", rounds=7, clock=time.process_time)
            write(
                path,
                {
                    "beta": beta,
                    "betas": betas,
                    "skipped": share,
                    "loss": fmean(losses.values()),
                    "cpu_time_of_all": seconds["fewer"] / seconds["all"],
                },
            )

    def pass_skipping(self, betas: tuple[float, ...], _: int) -> None:
        """One pass over 64 windows; thresholds of 0 skip nothing."""
        rows = torch.cat(list(self.test.values()))[:64]
        with skip_experts(self.mixture, betas):
            self.comparison.row_losses(self.mixture, self.comparison.text.test, rows)


def rows_by_domain(split: Any) -> dict[str, torch.Tensor]:
    """The numbers of a split's rows."""
    names = [split.documents[number][0] for number in split.document.tolist()]
    found = {name: [row for row, other in enumerate(names) if other == name] for name in sorted(set(names))}
    return {name: torch.tensor(rows) for name, rows in found.items()}


def every_nth(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` rows, spread over all."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def write(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.rename(path)


# ---- the page -------------------------------------------------------------------------------------------------------


class Results:
    """The result files, by what was run."""

    def __init__(self, folder: Path):
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        self.cuts = [each for each in found if "method" in each]
        self.grown = {(each["grown"], each["num_experts_per_tok"]): each["loss"] for each in found if "grown" in each}
        self.skipping = sorted((each for each in found if "skipped" in each), key=lambda each: each["skipped"])

    def losses(self, name: str, kept: int) -> list[float]:
        """Of all seeds; `name` may end in `", healed"`, `", labels"`, `", distilled"` or `", one domain"`."""
        method, _, how = name.partition(", ")
        healed: bool | str = how if how in TEACHER_WEIGHTS else how == "healed"
        kept = 1 if method.startswith("dense") else kept
        return [
            each["loss"]
            for each in self.cuts
            if (each["method"], each["kept"], each["healed"]) == (method, kept, healed)
            and (each["calibration"] != "all") == (how == "one domain")
        ]

    @property
    def whole(self) -> dict[str, Any]:
        return next(each for each in self.cuts if each["method"] == "none" and not each["healed"])


def told(losses: list[float]) -> str:
    spread = f"±{stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{fmean(losses):.3f}{spread}" if losses else "-"


def verdict(results: Results, first: str, second: str, share: float, sign: str) -> str:
    one, other = (results.losses(name, round(share * OF)) for name in (first, second))
    if not one or not other:
        return "not run"
    difference = fmean(one) - fmean(other)
    noise = 2 * max((stdev(each) for each in (one, other) if len(each) > 1), default=0.0)
    found = "0" if abs(difference) <= noise else "+" if difference > 0 else "-"
    return f"{difference:+.3f} ({'as expected' if found == sign else f'found {found}'})"


def tables(results: Results) -> str:
    """What stands in docs/surgery.md between its two marks."""
    if not results.cuts:
        return ""
    healed = f", healed {told(found)}" if (found := results.losses("none, healed", OF)) else ""
    lines = ["![Loss against the share of experts left](surgery.png)", ""]
    lines += [f"With all experts the loss is {results.whole['loss']:.3f}{healed}.", ""]
    lines += ["| left | 75 % | 50 % | 25 % | 50 %, healed | 25 %, healed |", "| --- | --- | --- | --- | --- | --- |"]
    for method in (*PRUNING, *MERGING):
        cells = [told(results.losses(method, kept)) for kept in KEPT]
        cells += [told(results.losses(f"{method}, healed", kept)) for kept in (4, 2)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    dense = ((name, results.losses(name, 1), results.losses(f"{name}, healed", 1)) for name in DENSE)
    sentences = (f"{name.split()[1]} {told(cut)}, healed {told(later)}" for name, cut, later in dense)
    lines += ["", f"Dense: {'; '.join(sentences)}."]
    after = []
    for method, kept in TRAINED:
        labels, distilled = (told(results.losses(f"{method}, {how}", kept)) for how in TEACHER_WEIGHTS)
        what = method if kept == 1 else f"`{method}` at {kept / OF:.0%}"
        after.append(f"{what} on the labels {labels}, distilled {distilled}")
    lines += ["", f"After {TRAINING_STEPS} steps of all weights, {TRAINING_SEEDS} seeds: {'; '.join(after)}."]
    lines += ["", "The sign expected before the run, and what came out:", ""]
    for first, second, share, sign, _ in EXPECTED:
        found = verdict(results, first, second, share, sign)
        lines.append(f"- `{first}` minus `{second}`, {share:.0%} `{sign}`: {found}")
    if results.grown:
        cells = (f"{copies}, {top_k} a token {loss:.3f}" for (copies, top_k), loss in sorted(results.grown.items()))
        lines += ["", f"[Twice the experts](upcycling.md#growing-a-mixture), before training: {'; '.join(cells)}."]
    if results.skipping:
        lines += ["", "Skipping, by beta:"]
        for each in results.skipping:
            cost = f"loss {each['loss']:.3f}, CPU time {each['cpu_time_of_all']:.2f}"
            lines[-1] += f" {each['beta']}: {each['skipped']:.0%} skipped, {cost};"
        lines[-1] = lines[-1].rstrip(";") + "."
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Loss against the share of experts left, and by domain at a half."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    whole = results.whole
    for method in (*PRUNING, *MERGING):
        points = [fmean(found) for kept in KEPT if (found := results.losses(method, kept))]
        style = "--" if method in MERGING else "-"
        left.plot(
            [100, *(100 * kept / OF for kept in KEPT)][: 1 + len(points)],
            [whole["loss"], *points],
            style,
            label=method,
        )
    for method, marker in zip(DENSE, "os^", strict=True):
        if found := results.losses(method, 1):
            left.plot([100 / OF], [fmean(found)], marker, color="black", label=method)
    left.set(xlabel="experts left, %", ylabel="nats a token, mean over domains", title="five calibration seeds")
    left.invert_xaxis()
    left.legend(fontsize=8)
    names = sorted(whole["by_domain"])
    for number, (method, kept) in enumerate((("reap", 4), ("hc", 4), ("random", 4), ("dense mean", 1))):
        found = [
            each["by_domain"]
            for each in results.cuts
            if each["method"] == method
            and each["kept"] == kept
            and not each["healed"]
            and each["calibration"] == "all"
        ]
        if found:
            more = [fmean(each[name] for each in found) - whole["by_domain"][name] for name in names]
            right.barh([place + 0.2 * number for place in range(len(names))], more, height=0.2, label=method)
    right.set_yticks([place + 0.3 for place in range(len(names))], names, fontsize=8)
    right.set(xlabel="nats more than with all experts", title="by domain, half of the experts, or dense")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=RESULTS / "surgery")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--page", action="store_true", help="write the tables and the picture of docs/surgery.md")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if not options.page:
        Surgery(options.cache, options.data, options.output).run(options.methods)
        return
    page, results = HERE.parent / "docs" / "surgery.md", Results(options.output)
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- results -->\n")
    _, end, after = rest.partition("<!-- end of results -->")
    page.write_text(f"{before}{begin}\n{tables(results)}\n\n{end}{after}", encoding="utf-8")
    draw(results, page.with_name("surgery.png"))


if __name__ == "__main__":
    main()
