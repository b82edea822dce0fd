"""
What do frozen experts in 8 or 4 bits save under LoRA, and what do they cost in time and in loss?

    python benchmarks/quantized_experts.py --quick

Two tables. Memory and time: a training step of a Mixtral of random weights with LoRA on its experts, each contender in
a process of its own; the bytes that the experts are stored in, the most that a step holds beyond the model, and the
median time of a step over that with floats. Loss: a small dense decoder becomes a mixture, and LoRA on its experts
learns a domain, from several seeds; the held-out loss before and after, over experts as floats, in 8 and in 4 bits.
`--model` is a dense decoder with a tokenizer, `--data` a folder of `.jsonl` or `.txt` files, one domain a file.
Without them: the stories260k checkpoint and the domains where they lie beside the checkout.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM, logging, set_seed

from hf_sparse_moe import SparseMoeDecoderConfig, quantize_experts, upcycle
from hf_sparse_moe.adapters import expert_lora_config
from hf_sparse_moe.quickstart.corpus import load_corpus
from hf_sparse_moe.quickstart.examples import interleave, make_examples
from hf_sparse_moe.quickstart.training import held_out_losses, train
from measuring import device_name, peak_bytes, synchronize


DATA = Path(os.environ.get("SPARSE_MOE_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
CONSOLE = Console(stderr=True)  # progress; the tables go to stdout
BITS = {"floats": None, "8 bits": 8, "4 bits": 4}
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few steps")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024, help="of one expert")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default=str(DATA / "stories260k" / "hf"))
    parser.add_argument("--data", default=str(DATA / "domains"))
    parser.add_argument("--domain", default="law")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.tokens, options.rounds, options.steps, options.seeds = 2, 128, 2, 10, 1
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    memory_and_time(options)
    if Path(options.model).exists() and Path(options.data).exists():
        loss(options)
    else:
        print(f"\nNo loss: there is no `{options.model}` or no `{options.data}`. Name them by --model and --data.")


def memory_and_time(options: argparse.Namespace) -> None:
    sizes = f"{options.layers} layers, E {options.experts}, H {options.hidden}, I {options.intermediate}"
    print(f"\nLoRA step, {sizes}, {options.tokens} tokens, {options.dtype}, {device_name(options.device)}")
    print("| experts | stored MB | over floats | step's peak MB | both over floats | time over floats |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    context = multiprocessing.get_context("spawn")
    floats: dict[str, float] = {}
    for contender in BITS:
        with context.Pool(1) as pool:
            row = pool.apply(measure_step, (contender, options, torch.get_num_threads()))
        row["both"] = row["stored"] + row["peak"]
        floats = floats or row
        stored, both, slower = (f"{row[key] / floats[key]:.2f}" for key in ("stored", "both", "seconds"))
        sizes = f"{row['stored'] / MB:.0f} | {stored} | {row['peak'] / MB:.0f} | {both}"
        print(f"| {contender} | {sizes} | {slower} |", flush=True)


def measure_step(contender: str, options: argparse.Namespace, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    set_seed(0)
    config = MixtralConfig(
        vocab_size=1000, hidden_size=options.hidden, intermediate_size=options.intermediate,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=8,
        num_local_experts=options.experts, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(options.device, getattr(torch, options.dtype))
    if (bits := BITS[contender]) is not None:
        quantize_experts(model, bits)
    weights = [value for name, value in model.named_parameters() if ".experts." in name]
    peft_model = get_peft_model(model, expert_lora_config(model, r=16)).train()
    optimizer = torch.optim.AdamW([value for value in peft_model.parameters() if value.requires_grad], lr=1e-4)

    def step(number: int) -> None:
        generator = torch.Generator(options.device).manual_seed(number)
        ids = torch.randint(0, 1000, (1, options.tokens), generator=generator, device=options.device)
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for number in range(2 + options.rounds):
        synchronize(options.device)
        start = time.process_time() if threads == 1 else time.perf_counter()
        step(number)
        synchronize(options.device)
        seconds.append((time.process_time() if threads == 1 else time.perf_counter()) - start)
    return {
        "stored": sum(weight.nbytes for weight in weights),
        "seconds": statistics.median(seconds[2:]),
        "peak": peak_bytes(lambda: step(0), options.device),
    }


def loss(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    corpus = load_corpus(options.data)
    learn, held_out = (
        make_examples(part[options.domain], tokenizer, SparseMoeDecoderConfig, 256, limit)
        for part, limit in ((corpus.train, 4000), (corpus.held_out, 64))
    )
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    mixture = upcycle(dense, num_experts=8, num_experts_per_tok=2)
    print(f"\nHeld-out loss on `{options.domain}`, nats a token; {options.steps} steps, {options.seeds} seeds")
    print("| experts | before | after, mean | by seed |\n| --- | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for contender, bits in BITS.items():
            base = copy.deepcopy(mixture)
            if bits is not None:
                quantize_experts(base, bits)
            after = []
            for seed in range(options.seeds):
                set_seed(seed)
                fresh = copy.deepcopy(base)
                peft_model = get_peft_model(fresh, expert_lora_config(fresh, r=8))
                train(
                    peft_model, interleave({options.domain: learn}, options.steps * 16, seed=seed), batch_size=16,
                    learning_rate=5e-3, seed=seed, name=contender, folder=folder, console=CONSOLE,
                )  # fmt: skip
                after.append(measure_loss(peft_model, held_out, options.domain, folder))
            before = measure_loss(base, held_out, options.domain, folder)
            seeds = ", ".join(f"{value:.4f}" for value in after)
            print(f"| {contender} | {before:.4f} | {statistics.mean(after):.4f} | {seeds} |", flush=True)


def measure_loss(model: torch.nn.Module, held_out: list, domain: str, folder: Path) -> float:
    return held_out_losses(model, {domain: held_out}, batch_size=16, folder=folder)[domain]


if __name__ == "__main__":
    main()
