"""
How many tokens a second does `generate` write with a mixture, over a dense model with as many active parameters?

    python benchmarks/generate.py --quick

Both are Llama-like decoders of random weights; the dense model's feed-forward is as wide as the K experts that a token
of the mixture takes. Every call writes the same number of tokens, greedily, and all take turns. A model of random
weights repeats itself and would always ask the same experts, so the experts of every token are drawn anew. "mixture,
bare products" does in its sparse layers nothing but the matrix products, expert by expert: what no backend can beat
that computes each expert's tokens at once. "Mixtral" is transformers' own model with its default backend. Prints
tokens a second over the dense model's. `--write` puts them into `benchmarks/results/<device>.json`, as `generate`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
from measuring import device_name, interleave, save, settle


TOP_K, PROMPT = 2, 16
SIZES = ("hidden", "intermediate", "layers", "new_tokens")
BACKENDS = ("sparse_moe", "grouped_mm", "batched_mm")
BARE, MIXTRAL = "mixture, bare products", "Mixtral"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case, a few tokens")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=768, help="of one expert")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: one thread, by its own CPU time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="put the section into the results file")
    options = parser.parse_args()
    if options.quick:
        options.experts, options.dtypes, options.hidden, options.intermediate = [8], ["float32"], 64, 96
        options.layers, options.new_tokens, options.rounds = 2, 4, 2
    if options.cpu_time:
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    clock = "CPU time" if options.cpu_time else "wall-clock time"
    print(f"{device_name(options.device)}, {clock}, hidden {options.hidden}, {options.layers} layers, k {TOP_K} of E")
    names = [*BACKENDS, MIXTRAL, BARE]
    print("\n| dtype | E | batch | dense tokens/s | " + " | ".join(names) + " |\n" + "| --- " * (4 + len(names)) + "|")
    rows, written = [], None
    for dtype in options.dtypes:
        for experts in options.experts:
            models = make_models(options, experts, dtype)
            for batch_size in options.batch_sizes:
                seconds = measure(models, batch_size, experts, options)
                row = {"dtype": dtype, "E": experts, "K": TOP_K, "batch_size": batch_size, "seconds": seconds}
                rows.append(row)
                ratios = (f"{seconds['dense'] / seconds[name]:.2f}" if name in seconds else "" for name in names)
                speed = batch_size * options.new_tokens / seconds["dense"]
                print(f"| {dtype} | {experts} | {batch_size} | {speed:.0f} | " + " | ".join(ratios) + " |", flush=True)
                if options.write:  # a run that is cut leaves its part
                    sizes = {name: getattr(options, name) for name in SIZES}
                    content = {"clock": clock, **sizes, "prompt": PROMPT, "rows": rows}
                    written = save("generate", options.device, content)
    if written:
        print("Wrote", written)


def make_models(options: argparse.Namespace, experts: int, dtype: str) -> dict[str, PreTrainedModel]:
    """The dense model, our mixture and transformers' own, each layer of which asks its router for drawn experts."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 8192,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "num_key_value_heads": max(options.hidden // 128, 1),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    one_expert = LlamaConfig(**sizes, intermediate_size=options.intermediate)
    config = SparseMoeDecoderConfig.from_dense(one_expert, num_experts=experts, num_experts_per_tok=TOP_K)
    mixtral = MixtralConfig(
        **sizes, intermediate_size=options.intermediate, num_local_experts=experts, num_experts_per_tok=TOP_K
    )
    models: dict[str, PreTrainedModel] = {
        "dense": LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=TOP_K * options.intermediate)),
        "mixture": SparseMoeDecoderForCausalLM(config),
        MIXTRAL: MixtralForCausalLM(mixtral),
    }
    return {name: model.to(options.device, getattr(torch, dtype)).eval() for name, model in models.items()}


def measure(
    models: dict[str, PreTrainedModel], batch_size: int, experts: int, options: argparse.Namespace
) -> dict[str, float]:
    """The median seconds of a call of `generate`, by contender."""
    dense, mixture, mixtral = models.values()
    prompt = torch.randint(1, 8000, (batch_size, PROMPT), device=options.device)
    arguments = {"min_new_tokens": options.new_tokens, "max_new_tokens": options.new_tokens, "do_sample": False}
    draws = Draws(batch_size, experts, options.device)
    blocks = [module for module in mixture.modules() if hasattr(module, "gate") and hasattr(module, "experts")]
    routers = [module.gate for model in (mixture, mixtral) for module in model.modules() if hasattr(module, "experts")]

    def call(model: PreTrainedModel, number: int, backend: str | None = None) -> None:
        draws.start(number)
        if backend is not None:
            model.set_experts_implementation(backend)
        model.generate(prompt, **arguments)

    def call_bare(model: PreTrainedModel, number: int) -> None:
        for block in blocks:
            block.forward = lambda hidden, block=block: draws.multiply(block.experts, hidden)
        call(model, number)
        for block in blocks:
            del block.forward

    # `batched_mm` copies the weights of every pair's expert: with more sequences it is only a way to fill the memory.
    backends = [name for name in BACKENDS if name != "batched_mm" or batch_size == 1]
    contenders: dict[str, Callable[[int], Any]] = {"dense": lambda number: call(dense, number)}
    contenders |= {name: lambda number, name=name: call(mixture, number, name) for name in backends}
    contenders |= {MIXTRAL: lambda number: call(mixtral, number), BARE: lambda number: call_bare(mixture, number)}
    hooks = [router.register_forward_hook(draws.replace_experts) for router in routers]
    clock = time.process_time if options.cpu_time else time.perf_counter
    with torch.no_grad():
        settle(contenders["sparse_moe"])
        seconds = interleave(contenders, options.device, options.rounds, warmup=1, clock=clock)
    for hook in hooks:
        hook.remove()
    return seconds


class Draws:
    """Experts of the tokens of a decoding step, drawn beforehand; each layer and step takes the next draw."""

    def __init__(self, batch_size: int, experts: int, device: str):
        self.draws: dict[int, list[torch.Tensor]] = {}  # by the number of tokens
        for tokens in (batch_size, batch_size * PROMPT):
            self.draws[tokens] = [torch.rand(tokens, experts, device=device).topk(TOP_K).indices for _ in range(499)]
        self.rows = {
            tokens: [list(enumerate(torch.bincount(draw.flatten()).tolist())) for draw in draws]
            for tokens, draws in self.draws.items()
        }
        self.start(0)

    def start(self, number: int) -> None:
        """Begin a call: that of the same round gets the same draws, whichever contender it is."""
        self.next = {tokens: _from(draws, 131 * number) for tokens, draws in self.draws.items()}
        self.next_rows = {tokens: _from(rows, 131 * number) for tokens, rows in self.rows.items()}

    def replace_experts(self, router: nn.Module, args: tuple, routing: tuple) -> tuple:
        """A forward hook: of what a router returns, the third is the experts (T, K)."""
        logits, weights, index, *rest = routing
        values = (logits, weights, next(self.next[len(index)]), *rest)
        return type(routing)(*values) if hasattr(routing, "_fields") else values

    def multiply(self, experts: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The products of the experts that the next draw asks, each over as many rows as it has tokens."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        drawn = [(expert, count) for expert, count in next(self.next_rows[len(rows)]) if count]
        for expert, count in drawn:
            up = nn.functional.linear(rows[:count], experts.gate_up_proj[expert])
            nn.functional.linear(up[:, : experts.intermediate_dim], experts.down_proj[expert])
        return hidden


def _from(values: list, start: int) -> Iterator:
    start %= len(values)
    return cycle(values[start:] + values[:start])


if __name__ == "__main__":
    main()
