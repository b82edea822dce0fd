"""
Which way of balancing keeps the experts evenly loaded, which lets them specialise, and what does it cost the loss?

The same small decoder is trained from scratch, once a method and seed, on text sorted by domain: every micro-batch is
of one domain, and the micro-batches of an optimizer step are of different ones. Prints one table:
- MaxVio (highest load over mean load, minus 1; 0 is even), mean over the layers: of all held-out text; and over the
  second half of training of the optimizer steps and of the micro-batches, mean over them.
- entropy of the load on held-out text over its highest value (1 is even), and experts that no held-out token reached,
  in all layers together.
- dropped: share of the assignments in training that found their expert full.
- held-out loss in nats a token; a balance loss is no part of it.
- NMI: normalised mutual information of domain and expert on held-out text, mean over the layers: 0 where the experts
  know nothing of the domain, 1 where one tells the other.
Several seeds: mean (lowest to highest).

    python benchmarks/balance.py
    python benchmarks/balance.py --methods sigmoid loss_free --seeds 0 1 2 --picture load.png

`--data` is a folder of `.jsonl` or `.txt` files, one domain a file, with `train` and `valid` in their paths.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PrinterCallback, Qwen3Config, Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.utils import logging

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
from hf_sparse_moe.models.balancing import expert_counts
from hf_sparse_moe.quickstart.corpus import load_corpus
from hf_sparse_moe.quickstart.examples import Example, make_examples
from hf_sparse_moe.quickstart.small_dense_model import VOCAB_SIZE, train_tokenizer
from hf_sparse_moe.routing import SelectionBiasCallback, routing_statistics


HERE = Path(__file__).parent
DATA = Path(os.environ.get("SPARSE_MOE_DATA", HERE.parent.parent / "shared" / "data")) / "domains"
LENGTH, LAYERS, EXPERTS, TOP_K = 128, 4, 8, 2
COEFFICIENT, CAPACITY, BIAS_SPEED = 0.01, 1.25, 1e-3


@dataclass(frozen=True)
class Method:
    """How one run balances: fields of the mixture's config, or a coefficient of transformers' own loss."""

    label: str
    config: dict = field(default_factory=dict)
    pooled_coefficient: float = 0.0


def methods(accumulation: int) -> dict[str, Method]:
    none, sigmoid = {"router_aux_loss_coef": 0.0}, {"scoring_func": "sigmoid"}
    # transformers' value is K where ours is 1, and its gradient grows with the micro-batches of a step.
    our_scale = COEFFICIENT / (TOP_K * accumulation)
    return {
        "none": Method("nothing", none),
        "stock": Method("pooled over layers, as transformers adds it", none, COEFFICIENT),
        "pooled": Method("pooled over layers, at our scale", none, our_scale),
        "micro_batch": Method("per layer, micro-batch"),
        "sequence": Method("per layer, sequence", {"balance_scope": "sequence"}),
        "global_batch": Method("per layer, global batch", {"balance_scope": "global_batch"}),
        "capacity": Method(f"per layer, micro-batch, capacity {CAPACITY}", {"capacity_factor": CAPACITY}),
        "sigmoid_none": Method("sigmoid, nothing", sigmoid | none),
        "sigmoid": Method("sigmoid, per layer, micro-batch", sigmoid),
        "loss_free": Method("sigmoid, loss-free bias", sigmoid | none | {"router_bias_update_speed": BIAS_SPEED}),
        # The published speed is for many thousands of steps.
        "loss_free_fast": Method(
            "sigmoid, loss-free bias, 10 times as fast", sigmoid | none | {"router_bias_update_speed": 10 * BIAS_SPEED}
        ),
    }


class PooledLossTrainer(Trainer):
    """Adds the balance loss of transformers' mixtures as their forward does: undivided, to a loss that is divided."""

    coefficient = 0.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_router_logits=True, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        if model.training:
            pooled = load_balancing_loss_func(outputs.router_logits, EXPERTS, TOP_K, inputs["attention_mask"])
            loss = loss + self.coefficient * pooled
        return (loss, outputs) if return_outputs else loss


class TrainingLoad:
    """Counts the assignments of every training micro-batch, with forward hooks on the routers."""

    def __init__(self, model: SparseMoeDecoderForCausalLM):
        self.counts: list[list[torch.Tensor]] = [[] for _ in model.sparse_blocks]  # (E,) a layer and micro-batch
        self.dropped: list[float] = []
        for block, counts in zip(model.sparse_blocks, self.counts, strict=True):
            block.gate.register_forward_hook(partial(self._add, counts))

    def _add(self, counts, gate, args, routing):
        if gate.training:
            counts.append(expert_counts(routing.top_k_index, EXPERTS))  # the blocks of text have no pads
            self.dropped.append(0.0 if routing.kept is None else 1 - routing.kept.float().mean().item())

    def max_violation(self, micro_batches: int) -> float:
        """Of groups of so many micro-batches: mean over the second half of training and over the layers."""
        counts_LGE = (
            torch.stack([torch.stack(layer) for layer in self.counts]).unflatten(1, (-1, micro_batches)).sum(2)
        )
        violation_LG = counts_LGE.amax(-1) / counts_LGE.mean(-1) - 1
        return violation_LG[:, violation_LG.shape[1] // 2 :].mean().item()


def one_domain_a_micro_batch(examples: dict[str, list[Example]], options: argparse.Namespace, seed: int):
    """The examples of a training in their order; a domain comes again when all others have."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {name: torch.randperm(len(pool), generator=generator).tolist() for name, pool in examples.items()}
    order, place, names = [], dict.fromkeys(examples, 0), sorted(examples)
    for number in range(options.steps * options.accumulation):
        if number % len(names) == 0:
            turn = torch.randperm(len(names), generator=generator).tolist()
        name = names[turn[number % len(names)]]
        for _ in range(options.batch_size):
            pool = shuffled[name]
            order.append(examples[name][pool[place[name] % len(pool)]])
            place[name] += 1
    return order


def run(
    method: Method,
    seed: int,
    train_set: dict[str, list[Example]],
    held_out: dict[str, list[Example]],
    options: argparse.Namespace,
) -> dict:
    """Train and measure one model; all methods of a seed start from the same weights and see the same text."""
    set_seed(seed)
    dense = Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    fields = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "router_aux_loss_coef": COEFFICIENT}
    config = SparseMoeDecoderConfig.from_dense(dense, **(fields | method.config))
    model = SparseMoeDecoderForCausalLM(config)
    load = TrainingLoad(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation, per_device_eval_batch_size=16,
            learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=options.steps // 20,
            train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, seed=seed,
        )  # fmt: skip
        trainer_class = PooledLossTrainer if method.pooled_coefficient else Trainer
        trainer = trainer_class(
            model, arguments, train_dataset=one_domain_a_micro_batch(train_set, options, seed),
            eval_dataset=[example for name in held_out for example in held_out[name]],
            data_collator=default_data_collator,
            callbacks=[SelectionBiasCallback()] if config.router_bias_update_speed else None,
        )  # fmt: skip
        trainer.coefficient = method.pooled_coefficient
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    batches = [default_data_collator(held_out[name]) for name in held_out]
    layers = routing_statistics(model, batches, groups=[name for name in held_out for _ in held_out[name]]).layers
    return {
        "MaxVio, held-out": statistics.fmean(layer.max_violation for layer in layers),
        "MaxVio, step": load.max_violation(options.accumulation),
        "MaxVio, micro-batch": load.max_violation(1),
        "entropy": statistics.fmean(layer.entropy for layer in layers),
        "dead experts": sum(len(layer.dead_experts) for layer in layers),
        "dropped": statistics.fmean(load.dropped),
        "held-out loss": loss,
        "NMI": statistics.fmean(layer.mutual_information for layer in layers),
        "load": [[round(share, 4) for share in layer.load.tolist()] for layer in layers],
    }


def earlier_results(path: Path, settings: dict) -> dict[str, dict[str, dict]]:
    """By method and seed, what an earlier call with the same settings wrote."""
    saved = json.loads(path.read_text()) if path.is_file() else {}
    return saved["results"] if saved.get("settings") == settings else {}


def shown(values: list[float]) -> str:
    digits = 0 if all(isinstance(value, int) for value in values) else 3
    mean = f"{statistics.fmean(values):.{digits if len(values) == 1 else max(digits, 1)}f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(results: dict[str, dict[str, dict]], labels: dict[str, str]) -> str:
    columns = [name for name in next(iter(next(iter(results.values())).values())) if name != "load"]
    lines = [f"| balanced by | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, seeds in results.items():
        cells = [shown([run[column] for run in seeds.values()]) for column in columns]
        lines.append(f"| {labels[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, dict]], labels: dict[str, str], path: str) -> None:
    """Each expert's share of the held-out load, a bar an expert, its layers side by side, for the first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.3 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, seeds) in zip(axes, results.items(), strict=True):
        for place, load in enumerate(next(iter(seeds.values()))["load"]):
            left = place * (EXPERTS + 1)
            axis.bar(range(left, left + EXPERTS), sorted(load, reverse=True), color="#0072B2")
        axis.axhline(1 / EXPERTS, linestyle="--", linewidth=0.8, color="#222222")
        axis.set_title(labels[name], fontsize=9, loc="left")
    axes[-1].set_xticks([place * (EXPERTS + 1) + (EXPERTS - 1) / 2 for place in range(LAYERS)])
    axes[-1].set_xticklabels([f"layer {place}, its experts by load" for place in range(LAYERS)], fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--methods", nargs="+", choices=list(methods(1)), default=list(methods(1)))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--accumulation", type=int, default=5, help="micro-batches of an optimizer step")
    parser.add_argument("--batch-size", type=int, default=4, help=f"sequences of {LENGTH} tokens in a micro-batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=24, help="sequences a domain")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "balance.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --output holds, of equal settings")
    parser.add_argument("--picture", help="also draw the load of each expert to this file")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"there is no folder {options.data}. Pass --data, a folder with one file of text a domain.")
    logging.set_verbosity_error()

    corpus = load_corpus(str(options.data))
    tokenizer = train_tokenizer(document for name in corpus.domains for document in corpus.train[name])

    def examples(texts: dict[str, list[str]], limit: int) -> dict[str, list[Example]]:
        made = {n: make_examples(texts[n], tokenizer, SparseMoeDecoderConfig, LENGTH, limit) for n in corpus.domains}
        return {n: [row | {"attention_mask": torch.ones_like(row["input_ids"])} for row in made[n]] for n in made}

    train_set, held_out = examples(corpus.train, 2000), examples(corpus.held_out, options.held_out)
    fewest = min(map(len, held_out.values()))
    held_out = {name: rows[:fewest] for name, rows in held_out.items()}  # an even load of domains

    known = methods(options.accumulation)
    settings = {name: getattr(options, name) for name in ("steps", "accumulation", "batch_size", "learning_rate")}
    settings |= {"data": options.data.name, "sequences held out": fewest} | {
        name: version(name) for name in ("torch", "transformers")
    }
    results = earlier_results(options.output, settings) if options.resume else {}
    for seed in options.seeds:
        for name in options.methods:
            if str(seed) in results.get(name, {}):
                continue
            start = time.perf_counter()
            results.setdefault(name, {})[str(seed)] = run(known[name], seed, train_set, held_out, options)
            print(f"seed {seed}, {name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    labels = {name: method.label for name, method in known.items()}
    results = {name: results[name] for name in known if name in results}
    print(table(results, labels))
    if options.picture:
        draw(results, labels, options.picture)


if __name__ == "__main__":
    main()
