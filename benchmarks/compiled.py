"""
What does `torch.compile` do for a mixture? Forward and backward of a decoder, compiled over not, by backend.

    python benchmarks/compiled.py --quick

Prints the time over that of the dense model that is not compiled, and the graph breaks. `--write` puts them into
`benchmarks/results/<device>.json`, as `compiled`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
from measuring import device_name, interleave, save


BACKENDS = ("sparse_moe", "grouped_mm", "batched_mm")
TOP_K, EXPERTS = 2, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024, help="of one expert")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="put the section into the results file")
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.intermediate, options.layers, options.tokens, options.rounds = 64, 96, 1, 64, 2
    logging.set_verbosity_error()
    rows = measure(options)
    print(f"{device_name(options.device)}, {options.dtype}, H {options.hidden}, {options.tokens} tokens\n")
    print("| model | over the dense model | compiled | graph breaks |\n| --- | ---: | ---: | ---: |")
    for name, row in rows.items():
        print(f"| {name} | {row['plain']:.2f} | {row['compiled']:.2f} | {row['graph_breaks']} |")
    if options.write:
        sizes = {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "tokens", "dtype")}
        print("Wrote", save("compiled", options.device, {**sizes, "E": EXPERTS, "K": TOP_K, "rows": rows}))


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    ids = torch.randint(1, 1000, (1, options.tokens), device=options.device)
    steps: dict[Any, Any] = {}
    breaks = {}
    for name in ("dense", *BACKENDS):
        for way in ("plain", "compiled"):
            torch.compiler.reset()
            model = make_model(name, options)
            if way == "compiled":
                breaks[name] = torch._dynamo.explain(model)(ids, labels=ids).graph_break_count
                torch.compiler.reset()
                model.compile(dynamic=False)

            def step(_: int, model: PreTrainedModel = model) -> None:
                model(ids, labels=ids).loss.backward()
                model.zero_grad()

            steps[name, way] = step
    torch.compiler.reset()
    seconds = interleave(steps, options.device, options.rounds)
    reference = seconds["dense", "plain"]
    return {
        name: {way: seconds[name, way] / reference for way in ("plain", "compiled")} | {"graph_breaks": count}
        for name, count in breaks.items()
    }


def make_model(name: str, options: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = max(options.hidden // 64, 1)
    sizes = {"vocab_size": 1000, "hidden_size": options.hidden, "num_hidden_layers": options.layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "use_cache": False}
    if name == "dense":
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=TOP_K * options.intermediate))
    else:
        dense = LlamaConfig(**sizes, intermediate_size=options.intermediate)
        config = SparseMoeDecoderConfig.from_dense(dense, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
        model = SparseMoeDecoderForCausalLM(config)
        model.set_experts_implementation(name)
    return model.to(options.device, getattr(torch, options.dtype)).train()


if __name__ == "__main__":
    main()
