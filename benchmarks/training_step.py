"""
Where does the time of a Trainer's step go, and how long is the step beside the dense model's?

    python benchmarks/training_step.py --quick

Two tables. The first profiles steps of each family with torch.profiler, before, with transformers' `grouped_mm` for
the experts, and now, with ours, and sums what each part takes, forward and backward: an operation belongs to the
innermost part that ran it, in backward to the part whose forward it differentiates. "matrix products" are those of all
parts, attention's included. What a mixture does beyond them is "router" (its logits, scores, choice and weights),
"record", "statistics" (counting the load) and "balance loss". "experts, around the products" sorts, gathers, activates
and adds up. The profiler makes small operations look longer. The second table has the whole step's time over that of a
dense model with as many active parameters, for our backend and transformers', in turns. `--write` puts both into
`benchmarks/results/<device>.json`, as `training_step`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    ModernBertConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

from hf_sparse_moe import (
    SparseMoeDecoderConfig,
    SparseMoeDecoderForCausalLM,
    SparseMoeEncoderConfig,
    SparseMoeEncoderDecoderConfig,
    SparseMoeEncoderDecoderForConditionalGeneration,
    SparseMoeEncoderForMaskedLM,
)
from hf_sparse_moe.models import balancing, moe_block, pretrained_model, routing
from measuring import device_name, interleave, save


FAMILIES = ("encoder", "decoder", "encoder-decoder")
BACKENDS = ("sparse_moe", "grouped_mm", "eager")
BEFORE, NOW = "grouped_mm", "sparse_moe"  # the backends that are profiled
VOCAB, LENGTH, TOP_K = 8192, 256, 2
PRODUCTS, OURS = "matrix products", ("router", "record", "statistics", "balance loss")
PARTS = (PRODUCTS, *OURS, "experts, around the products", "optimizer", "dense model and Trainer")
NAMED, BACKWARD = "part: ", "autograd::engine::evaluate_function"  # how the names of events begin
PRODUCT_OPERATIONS = {
    f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "mv", "addmv", "_addmm_activation")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=768, help="of one expert")
    parser.add_argument("--layers", type=int, default=4, help="of each side")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help=f"in sequences of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: one thread, by its own CPU time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="put the section into the results file")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.intermediate, options.layers, options.tokens, options.rounds = 64, 96, 1, 512, 2
    if options.cpu_time:
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    clock = "CPU time" if options.cpu_time else "wall-clock time"
    print(f"{device_name(options.device)}, {clock}, hidden {options.hidden}, {options.layers} layers a side,", end=" ")
    print(f"k {TOP_K} of {options.experts}, {options.tokens} tokens\n")
    rows = [measure(family, options) for family in options.families]
    for cells in profile_lines(rows):
        print("| " + " | ".join(cells) + " |")
    print("\n| step, over the dense model's | " + " | ".join(BACKENDS) + " | dense ms |\n" + "| --- " * 5 + "|")
    for row in rows:
        seconds = row["seconds"]
        ratios = " | ".join(f"{seconds[name] / seconds['dense']:.2f}" for name in BACKENDS)
        print(f"| {row['family']} | {ratios} | {1e3 * seconds['dense']:.0f} |")
    if options.write:
        sizes = {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "experts", "tokens")}
        print("Wrote", save("training_step", options.device, {"clock": clock, **sizes, "K": TOP_K, "rows": rows}))


def measure(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """The median seconds of a step of each contender, and the share of each part before and now."""
    torch.manual_seed(0)
    mixture = Stepper(make_mixture(family, options), family, options)
    dense = Stepper(make_dense(family, options, TOP_K * options.intermediate), family, options)

    def with_backend(name: str) -> Callable[[int], None]:
        def step(number: int) -> None:
            mixture.model.set_experts_implementation(name)
            mixture.step(number)

        return step

    contenders = {"dense": dense.step} | {name: with_backend(name) for name in BACKENDS}
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = interleave(contenders, options.device, options.rounds, 0, clock, turn=1, settle=1)
    parts = {}
    for name in (BEFORE, NOW):
        contenders[name](0)
        with named_parts(mixture.model), profile(activities=[ProfilerActivity.CPU]) as profiler:
            for number in range(options.rounds):
                mixture.step(number)
        parts[name] = shares(profiler.events())
    print(f"{family}: measured", flush=True)
    return {"family": family, "seconds": seconds, "parts": parts}


def profile_lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of the first table: a line a part, and of each family its share before and now."""
    profiles = [(f"{row['family']}, {when}", row["parts"][name]) for row in rows for when, name in
                (("before", BEFORE), ("now", NOW))]  # fmt: skip
    lines = [["part of the step", *(title for title, _ in profiles)], ["---"] * (1 + len(profiles))]
    for title, parts in (*((part, (part,)) for part in PARTS), (" + ".join(OURS), OURS)):
        lines.append([title, *(f"{sum(share[part] for part in parts):.1%}" for _, share in profiles)])
    return lines


class Stepper:
    """A Trainer, and one whole optimizer step of it on random tokens."""

    def __init__(self, model: PreTrainedModel, family: str, options: argparse.Namespace):
        arguments = TrainingArguments(
            tempfile.mkdtemp(), report_to=[], disable_tqdm=True, use_cpu=options.device == "cpu", save_strategy="no"
        )
        self.trainer = Trainer(model=model, args=arguments)
        self.trainer.create_optimizer()
        self.model, self.family, self.tokens = model, family, options.tokens

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1, VOCAB, (max(self.tokens // LENGTH, 1), LENGTH), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        if self.family == "encoder-decoder":  # as many tokens in all
            half = len(ids) // 2
            inputs = {name: value[:half] for name, value in inputs.items()} | {"labels": ids[half:]}
        elif self.family == "encoder":
            unmasked = torch.rand(ids.shape, generator=generator) > 0.15
            inputs["labels"] = ids.masked_fill(unmasked, -100)
        labels = inputs["labels"].ne(-100).sum()
        self.model.train()
        self.trainer.training_step(self.model, inputs, labels)
        with record_function(f"{NAMED}optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
            self.trainer.optimizer.step()
        self.model.zero_grad()


def make_dense(family: str, options: argparse.Namespace, intermediate: int) -> PreTrainedModel:
    auto_class = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}.get(family, AutoModelForSeq2SeqLM)
    return auto_class.from_config(dense_config(family, options, intermediate))


def make_mixture(family: str, options: argparse.Namespace) -> PreTrainedModel:
    config_class, model_class = {
        "encoder": (SparseMoeEncoderConfig, SparseMoeEncoderForMaskedLM),
        "decoder": (SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM),
        "encoder-decoder": (SparseMoeEncoderDecoderConfig, SparseMoeEncoderDecoderForConditionalGeneration),
    }[family]
    dense = dense_config(family, options, options.intermediate)
    return model_class(config_class.from_dense(dense, num_experts=options.experts, num_experts_per_tok=TOP_K))


def dense_config(family: str, options: argparse.Namespace, intermediate: int):
    """Of the architecture that the family builds by default."""
    heads, layers = max(options.hidden // 64, 1), options.layers
    if family == "encoder-decoder":
        return T5Config(
            vocab_size=VOCAB, d_model=options.hidden, d_ff=intermediate, d_kv=64, num_heads=heads, num_layers=layers,
            num_decoder_layers=layers, feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0,
        )  # fmt: skip
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": options.hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "pad_token_id": 0,
    }
    if family == "encoder":
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
        return ModernBertConfig(**sizes, **ends)
    return Qwen3Config(**sizes, num_key_value_heads=max(heads // 2, 1), head_dim=64, tie_word_embeddings=True)


@contextmanager
def named_parts(model: PreTrainedModel) -> Iterator[None]:
    """While open, what a mixture adds runs under names that the profiler sees."""
    places: list[tuple[Any, str, str]] = [
        (moe_block, "active_record", "record"),
        (pretrained_model, "tokens_by_side", "record"),
        (pretrained_model, "RoutingRecord", "record"),
        (pretrained_model, "BalanceLosses", "balance loss"),
        (balancing, "expert_counts", "statistics"),
        (routing, "expert_counts", "statistics"),
    ]
    for block in model.sparse_blocks:
        places += [(block.gate, "forward", "router"), (block.experts, "forward", "experts, around the products")]
    earlier = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, _named(getattr(owner, name), part))
    try:
        yield
    finally:
        for owner, name, value in earlier:
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _named(function: Callable, part: str) -> Callable:
    @wraps(function)
    def call(*args, **kwargs):
        with record_function(f"{NAMED}{part}"):
            return function(*args, **kwargs)

    return call


def shares(events: Any) -> dict[str, float]:
    """The share of each part in the time of all events, each event's own time without that of those inside it."""
    # By the number that an operation's node gets in autograd's graph; those before it without a node have it as well.
    forward_parts: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not any(parent.name.startswith(BACKWARD) for parent in _with_parents(event)):
            forward_parts[event.sequence_nr] = _part(event, {})
    totals: Counter[str] = Counter()
    for event in events:
        is_product = "attention" in event.name or any(
            parent.name in PRODUCT_OPERATIONS for parent in _with_parents(event)
        )
        totals[PRODUCTS if is_product else _part(event, forward_parts)] += event.self_cpu_time_total
    whole = sum(totals.values())
    return {part: totals[part] / whole for part in PARTS}


def _part(event: Any, forward_parts: dict[int, str]) -> str:
    """The innermost part that the event runs in, or whose forward it differentiates."""
    for parent in _with_parents(event):
        if parent.name.startswith(NAMED):
            return parent.name.removeprefix(NAMED)
        if parent.name.startswith(BACKWARD) and parent.sequence_nr in forward_parts:
            return forward_parts[parent.sequence_nr]
    return PARTS[-1]


def _with_parents(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


if __name__ == "__main__":
    main()
