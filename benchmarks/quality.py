"""
Is a mixture worth having? Every arm continues one dense checkpoint on the same batches; what differs is the model.

    python benchmarks/quality.py --family decoder --seeds 5 --arms D AA M1 M2
    python benchmarks/write_results.py

The arms, their settings and what is expected of them are in `benchmarks/quality.toml`. A run (arm, seed, rate) is a
file in `benchmarks/results/quality/<family>/`; what has its file is not run again, so that the same command resumes
after a kill. At another `--scale` the folder is `<family>--<scale>--<device>`. The dense checkpoints and the tokenised
text are kept in `--cache`.

One seed tries every learning rate of an arm; the one with the lowest loss on the tuning split serves all seeds. The
measured loss is that of the test split, which nothing is chosen by. Both are means over domains of the mean over their
documents of a document's nats a token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_sparse_moe import SparseMoePreTrainedModel, upcycle
from hf_sparse_moe.checkpoints.hashes import sha256_of
from hf_sparse_moe.routing import SelectionBiasCallback, routing_statistics
from measuring import RESULTS, device_name, file_name, peak_bytes, synchronize
from quality_text import IGNORED, SPLITS, Rows, Text, load_text


HERE = Path(__file__).parent
DATA = Path(os.environ.get("SPARSE_MOE_DATA", HERE.parent.parent / "shared" / "data"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_sparse_moe" / "quality"
AUTO_CLASSES = {
    "decoder": AutoModelForCausalLM,
    "encoder": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
}
WARM_UP, WEIGHT_DECAY, LOWEST = 0.03, 0.1, 0.1  # shares of the steps, of a step, of the rate
CURVE_POINTS, CURVE_ROWS, EVALUATION_ROWS = 10, 320, 32


class Comparison:
    """The runs of one family, with what they share: text, dense checkpoints, results."""

    def __init__(
        self, family: str, configuration: dict[str, Any], data: Path, cache: Path, output: Path, device: str = "cpu"
    ):
        self.family, self.data, self.output, self.device = family, data, output, device
        self.settings, self.arms = configuration[family], configuration["arms"] | configuration.get("ablations", {})
        self.cache = cache / f"{family}-{self.digest()}"
        self._text: Text | None = None
        self.output.mkdir(parents=True, exist_ok=True)

    def digest(self, arm: str | None = None) -> str:
        """Of the settings that a result depends on."""
        parts: Any = self.settings
        if arm is not None:
            needed = {arm, *(self.arms[arm].get(key) for key in ("flops_of", "evaluates"))} - {None}
            parts = [self.settings, {name: self.arms[name] for name in sorted(needed)}]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def text(self) -> Text:
        if self._text is None:
            path = self.cache / "text.pt"
            if not path.is_file():
                text = load_text(self.family, self.data, self.settings)
                self.cache.mkdir(parents=True, exist_ok=True)
                torch.save(vars(text) | {name: vars(getattr(text, name)) for name in SPLITS}, path)
            saved = torch.load(path, weights_only=True)
            self._text = Text(**saved | {name: Rows(**saved[name]) for name in SPLITS})
        return self._text

    def order(self, seed: int) -> torch.Tensor:
        """The training rows of a seed: first those of the dense model, then those of the arms, then the rest."""
        return torch.randperm(len(self.text.train), generator=torch.Generator().manual_seed(seed))

    def steps(self, tokens: float) -> int:
        return max(1, round(tokens / (self.settings["batch_size"] * self.settings["length"])))

    def new_dense_model(self, seed: int, **fields: Any) -> PreTrainedModel:
        set_seed(seed)
        fields = {"vocab_size": self.text.vocab_size} | self.settings["model"] | fields
        config = AutoConfig.for_model(self.settings["model_type"], **fields)
        return AUTO_CLASSES[self.family].from_config(config)

    def dense_checkpoint(self, seed: int) -> Path:
        folder = self.cache / f"dense-{seed}"
        if not (folder / "model.safetensors").is_file():
            model, steps = self.new_dense_model(seed), self.steps(self.settings["dense_tokens"])
            rows = self.order(seed)[: steps * self.settings["batch_size"]]
            self.train(model, rows, self.settings["dense_rate"], f"dense, seed {seed}")
            partial = folder.with_name(f"{folder.name}.partial")
            model.save_pretrained(partial)
            partial.rename(folder)
        return folder

    def start(self, arm: str, seed: int) -> PreTrainedModel:
        """The model of an arm, before its training."""
        settings = self.arms[arm]
        if settings.get("from_scratch"):
            return self.new_dense_model(seed, **self.settings["wide"])
        dense = AUTO_CLASSES[self.family].from_pretrained(self.dense_checkpoint(seed))
        if "upcycle" not in settings:
            return dense
        options = dict(settings["upcycle"])
        if "graft_share" in settings:
            units = dense.config.d_ff if hasattr(dense.config, "d_ff") else dense.config.intermediate_size
            options["moe_intermediate_size"] = units // settings["graft_share"]
        if settings.get("hash_routing"):
            options["router_type"] = "hash"
        return upcycle(dense, seed=seed, **options)

    def rows(self, arm: str, seed: int) -> torch.Tensor:
        """The training rows of an arm, in their order."""
        settings, batch_size = self.arms[arm], self.settings["batch_size"]
        order, first = self.order(seed), self.steps(self.settings["dense_tokens"]) * batch_size
        count = self.steps(self.settings["sparse_tokens"]) * batch_size
        if settings.get("from_scratch"):
            return order[: first + count]
        if "flops_of" in settings:
            more = flops_per_token(self.start(settings["flops_of"], seed)) / flops_per_token(self.start("D", seed))
            count = round(count * more / batch_size) * batch_size
        rows = order[first : first + count]
        if len(rows) < count:
            raise ValueError(f"`{arm}` needs {first + count} rows of text, and there are {len(order)}. Add text.")
        if settings.get("other_order"):
            rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(1000 + seed))]
        return rows

    def train(
        self, model: PreTrainedModel, rows: torch.Tensor, rate: float, name: str, constant: bool = False
    ) -> dict[str, Any]:
        """One pass over `rows`: fresh AdamW, warm-up, then cosine or constant. Seconds are those of the steps."""
        batch_size, text = self.settings["batch_size"], self.text
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        model.to(self.device)
        steps = len(rows) // batch_size
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=rate, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, warm_up_then_cosine(steps, 1.0 if constant else LOWEST)
        )
        move_bias = selection_bias_of(model)
        points = {round(steps * part / CURVE_POINTS) for part in range(1, CURVE_POINTS + 1)}
        spread = torch.linspace(0, len(text.tuning) - 1, min(CURVE_ROWS, len(text.tuning))).long()
        curve, seconds = [[0, self.mean_loss(model, text.tuning, spread)]], 0.0
        model.config.use_cache = False
        model.train()
        for step in range(steps):
            began = clock()
            loss = model(**self.batch(text.train, rows[step * batch_size : (step + 1) * batch_size])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            move_bias()
            schedule.step()
            optimizer.zero_grad()
            synchronize(self.device)
            seconds += clock() - began
            if step + 1 in points:
                tokens = (step + 1) * batch_size * self.settings["length"]
                curve.append([tokens, self.mean_loss(model, text.tuning, spread)])
                print(f"{name}: {tokens:,} tokens, {curve[-1][1]:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)
                model.train()
        return {
            "tokens": steps * batch_size * self.settings["length"],
            "cpu_seconds" if self.device == "cpu" else "seconds": seconds,
            "curve": curve,
        }

    def batch(self, split: Rows, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.device) for name, tensor in split.batch(rows).items()}

    def mean_loss(self, model: PreTrainedModel, split: Rows, rows: torch.Tensor) -> float:
        nats, tokens = self.row_losses(model, split, rows)
        return (nats.sum() / tokens.sum()).item()

    @torch.no_grad()
    def row_losses(self, model: PreTrainedModel, split: Rows, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the sum of its tokens' nats, and how many tokens that is."""
        model.to(self.device).eval()
        nats, tokens = [], []
        for part in rows.split(EVALUATION_ROWS):
            batch = self.batch(split, part)
            logits, labels = model(**batch).logits, batch["labels"]
            if self.family == "decoder":
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
            nats.append(losses.sum(1).cpu())
            tokens.append((labels != IGNORED).sum(1).cpu())
        return torch.cat(nats), torch.cat(tokens)

    def document_losses(self, model: PreTrainedModel, split: Rows) -> list[float]:
        """Nats a token of each of the split's documents."""
        nats, tokens = self.row_losses(model, split, torch.arange(len(split)))
        sums = [
            torch.zeros(len(split.documents)).index_add(0, split.document, part.float()) for part in (nats, tokens)
        ]
        return (sums[0] / sums[1]).tolist()

    def path(self, arm: str, seed: int, rate: float) -> Path:
        return self.output / f"{arm}-seed{seed}-rate{rate:g}.json"

    def result(self, arm: str, seed: int, rate: float) -> dict[str, Any] | None:
        path = self.path(arm, seed, rate)
        if not path.is_file():
            return None
        found = json.loads(path.read_text())
        if found["settings"] != self.digest(arm):
            raise ValueError(f"`{path}` was made with other settings. Delete it, or choose another `--output`.")
        return found

    def run(self, arm: str, seed: int, rate: float) -> dict[str, Any]:
        """The result of a run, from its file or by running it."""
        if (found := self.result(arm, seed, rate)) is not None:
            return found
        if evaluated := self.arms[arm].get("evaluates"):
            return self.run_permuted(arm, evaluated, seed, rate)
        return self.run_training(arm, seed, rate)

    def run_training(self, arm: str, seed: int, rate: float) -> dict[str, Any]:
        kept: dict[str, Any] = {}

        def train() -> None:
            model = self.start(arm, seed)
            kept["model"], kept["start"] = model, self.tuning_loss(model)
            rows, name = self.rows(arm, seed), f"{arm}, seed {seed}, rate {rate:g}"
            kept.update(self.train(model, rows, rate, name, constant=self.arms[arm].get("constant", False)))

        self.dense_checkpoint(seed)
        peak = peak_bytes(train, self.device)
        model = kept.pop("model")
        return self.save(arm, seed, rate, model, kept | {"peak_bytes": peak})

    def run_permuted(self, arm: str, evaluated: str, seed: int, rate: float) -> dict[str, Any]:
        """An arm that trains nothing: the trained model of another, its experts exchanged under their router."""
        model = self.trained(evaluated, seed, rate)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for block in model.sparse_blocks:
                order = torch.randperm(block.experts.num_experts, generator=generator)
                for parameter in block.experts.parameters(recurse=False):
                    parameter.copy_(parameter[order])
        return self.save(arm, seed, rate, model, {"tokens": 0, "cpu_seconds": 0.0, "curve": [], "peak_bytes": 0})

    def trained(self, arm: str, seed: int, rate: float) -> PreTrainedModel:
        folder = self.cache / f"{arm}-seed{seed}-rate{rate:g}-{self.digest(arm)}"
        if not folder.is_dir():
            self.run_training(arm, seed, rate)
        return AUTO_CLASSES[self.family].from_pretrained(folder)

    def tuning_loss(self, model: PreTrainedModel) -> float:
        return mean_over_domains(self.document_losses(model, self.text.tuning), self.text.tuning.documents)

    def save(self, arm: str, seed: int, rate: float, model: PreTrainedModel, facts: dict[str, Any]) -> dict[str, Any]:
        test = self.document_losses(model, self.text.test)
        result = {
            "family": self.family,
            "arm": arm,
            "seed": seed,
            "rate": rate,
            "settings": self.digest(arm),
            "dense_sha256": sha256_of(self.dense_checkpoint(seed) / "model.safetensors"),
            "device": device_name(self.device),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "parameters_total": model.num_parameters(),
            "parameters_active": active_parameters(model),
            "flops_per_token": flops_per_token(model),
            **facts,
            "tuning_loss": self.tuning_loss(model),
            "test_loss": mean_over_domains(test, self.text.test.documents),
            "routing": self.routing(model),
            "document_losses": [round(loss, 5) for loss in test],
        }
        documents = self.output / "documents.json"
        if not documents.is_file():
            documents.write_text(json.dumps(self.text.facts | {"test": self.text.test.documents}, indent=0) + "\n")
        if any(settings.get("evaluates") == arm for settings in self.arms.values()):
            model.save_pretrained(self.cache / f"{arm}-seed{seed}-rate{rate:g}-{self.digest(arm)}")
        path = self.path(arm, seed, rate)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result) + "\n")
        partial.rename(path)
        print(f"{arm}, seed {seed}, rate {rate:g}: test {result['test_loss']:.4f}", file=sys.stderr, flush=True)
        return result

    def routing(self, model: PreTrainedModel) -> dict[str, float] | None:
        """How even a mixture's load is on the tuning split, and how far expert and domain agree; mean over layers."""
        if not isinstance(model, SparseMoePreTrainedModel) or model.config.router_type == "hash":
            return None
        split = self.text.tuning
        batches = [self.batch(split, part) for part in torch.arange(len(split)).split(EVALUATION_ROWS)]
        groups = [split.documents[number][0] for number in split.document.tolist()]
        layers = routing_statistics(model, batches, groups=groups).layers
        return {
            "max_violation": fmean(layer.max_violation for layer in layers),
            "mutual_information": fmean(layer.mutual_information for layer in layers),
        }

    def rate(self, arm: str) -> float:
        """The learning rate of an arm: that of another, or the best of those tried, which this runs where it must."""
        if other := (self.arms[arm].get("rate_of") or self.arms[arm].get("evaluates")):
            return self.rate(other) * self.arms[arm].get("rate_factor", 1)
        seed = self.settings["rate_seed"]
        return min(self.settings["rates"], key=lambda rate: self.run(arm, seed, rate)["tuning_loss"])


def parameter_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Weight decay on matrices alone, and on no router."""
    routers = {id(block.gate.weight) for block in getattr(model, "sparse_blocks", []) if hasattr(block.gate, "weight")}
    decayed, others = [], []
    for parameter in model.parameters():
        (decayed if parameter.dim() > 1 and id(parameter) not in routers else others).append(parameter)
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def warm_up_then_cosine(steps: int, lowest: float) -> Callable[[int], float]:
    """The share of the rate at a step; it ends at `lowest`."""
    warm_up = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        part = (step - warm_up) / max(1, steps - warm_up)
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * part)) / 2

    return factor


def selection_bias_of(model: PreTrainedModel) -> Callable[[], None]:
    """What to call after each optimizer step: it moves the selection bias of a mixture whose config asks for that."""
    if not getattr(model.config, "router_bias_update_speed", 0.0):
        return lambda: None
    callback, arguments = SelectionBiasCallback(), TrainingArguments(report_to="none", use_cpu=True)
    callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model)
    return lambda: callback.on_optimizer_step(arguments, TrainerState(), TrainerControl())


def mean_over_domains(losses: list[float], documents: list[Any]) -> float:
    by_domain: dict[str, list[float]] = {}
    for loss, (domain, _) in zip(losses, documents, strict=True):
        by_domain.setdefault(domain, []).append(loss)
    return fmean(map(fmean, by_domain.values()))


def active_parameters(model: PreTrainedModel) -> int:
    if isinstance(model, SparseMoePreTrainedModel):
        return model.config.num_parameters(only_active=True)
    return model.num_parameters()


def flops_per_token(model: PreTrainedModel) -> int:
    """Of a forward pass, 2 for each weight that a token meets in a matrix product, as `config.flops_per_token()`."""
    if isinstance(model, SparseMoePreTrainedModel):
        return model.config.flops_per_token()
    return 2 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(AUTO_CLASSES), default="decoder")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --first-seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", help="default: all of the configuration")
    parser.add_argument("--ablations", action="store_true", help="run the configuration's ablations in place of arms")
    parser.add_argument("--config", type=Path, default=HERE / "quality.toml")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"default: {CACHE}")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--scale", help="a table of the configuration whose families stand in place of those, as `gpu`"
    )
    options = parser.parse_args(arguments)
    configuration = tomllib.loads(options.config.read_text())
    configuration |= configuration[options.scale] if options.scale else {}
    known = configuration["ablations" if options.ablations else "arms"]
    arms = options.arms or list(known)
    if unknown := [arm for arm in arms if arm not in known]:
        parser.error(f"{options.config} has no {unknown[0]} there. It has {', '.join(known)}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    place = [options.family, *([options.scale, file_name(options.device)] if options.scale else [])]
    output = options.output / "--".join(place)
    comparison = Comparison(options.family, configuration, options.data, options.cache, output, options.device)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in arms:  # a seed at a time, so that what is finished is comparable
            comparison.run(arm, seed, comparison.rate(arm))


if __name__ == "__main__":
    main()
