"""
What does LoRA on experts cost, over PEFT's own `target_parameters`, and over LoRA on the attention alone?

    python benchmarks/lora.py --quick

Two tables: the experts block alone, forward and backward, and a whole training step of a 4-layer Mixtral. Every
contender is a process of its own, so that none fills the others' caches of compiled products, and they take turns of
an untimed call and two timed ones, so that what slows the machine slows all. Every call draws tokens and routing anew:
a backend that has seen a row count before may be faster with it. The tables show PEFT's median time, and its peak
memory in one call, over ours. `--write` puts them into `benchmarks/results/<device>.json`, as `lora`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from typing import Any, NamedTuple

import torch

from measuring import device_name, peak_bytes, save, settle, synchronize


RANK = 16
TOP_K = {8: 2, 16: 4, 64: 8, 128: 8}  # experts a token, by experts
TOKENS = (128, 512, 2048)
BLOCK, STEP = ("PEFT", "ours"), ("PEFT", "ours", "attention only")
SETTLE, TURN = 1, 2  # untimed and timed calls of a contender in a row


class Case(NamedTuple):
    """One line of a table; H hidden, I intermediate of one expert."""

    what: str
    dtype: str
    E: int
    K: int
    T: int
    H: int
    I: int  # noqa: E741


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small cases, few rounds")
    parser.add_argument("--experts", nargs="+", type=int, choices=TOP_K, default=[8, 64], help="of the block")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--step-experts", nargs="+", type=int, choices=TOP_K, default=[16])
    parser.add_argument("--step-tokens", nargs="+", type=int, default=[1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=512, help="of one expert")
    parser.add_argument("--rounds", type=int, nargs=2, default=[3, 10], help="fewest and most turns of each contender")
    parser.add_argument("--seconds", type=float, default=5.0, help="between the two, rounds for about so long a case")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: one thread, by its own CPU time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="put the section into the results file")
    options = parser.parse_args()
    if options.quick:
        options.experts = options.step_experts = [16]
        options.tokens, options.step_tokens, options.rounds = [128], [128], [2, 2]
    if options.cpu_time:
        torch.set_num_threads(1)
    clock = "CPU time" if options.cpu_time else "wall-clock time"
    sizes = options.hidden, options.intermediate
    rows: dict[str, list[dict[str, Any]]] = {}
    written = None
    for what, chosen, tokens, contenders in (
        ("block", options.experts, options.tokens, BLOCK),
        ("step", options.step_experts, options.step_tokens, STEP),
    ):
        print(f"\n{what}, rank {RANK}, H {sizes[0]}, I {sizes[1]}, {device_name(options.device)}, {clock}")
        print("| dtype | E | k | tokens | " + " | ".join(f"{name} ms" for name in contenders), end=" | ")
        print("PEFT / ours | memory, PEFT / ours |\n" + "| --- " * (6 + len(contenders)) + "|", flush=True)
        for case in (
            Case(what, dtype, experts, TOP_K[experts], count, *sizes)
            for dtype in options.dtypes
            for experts in chosen
            for count in tokens
        ):
            row = measure(case, contenders, options)
            rows.setdefault(what, []).append(row)
            times = row["seconds"]
            cells = [case.dtype, case.E, case.K, case.T, *(f"{1e3 * times[name]:.1f}" for name in contenders)]
            cells += [f"{times['PEFT'] / times['ours']:.2f}", f"{row['peak']['PEFT'] / row['peak']['ours']:.1f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            if options.write:  # a run that is cut leaves its part
                written = save("lora", options.device, {"clock": clock, "rank": RANK, **rows})
    if written:
        print("Wrote", written)


def measure(case: Case, contenders: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """The median seconds and the peak bytes of each contender."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in contenders:
        pipes[name], theirs = context.Pipe()
        workers.append(
            context.Process(target=work, args=(theirs, case, name, options.device, torch.get_num_threads()))
        )
        workers[-1].start()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    fewest, most = options.rounds
    number, start = 0, time.perf_counter()
    while number <= fewest or (number <= most and time.perf_counter() - start < options.seconds):
        for name, pipe in pipes.items():
            for part in range(SETTLE + TURN):
                pipe.send(number * (SETTLE + TURN) + part)
                elapsed = pipe.recv()
                if number > 0 and part >= SETTLE:  # the first turns load what there is to load
                    seconds[name].append(elapsed)
        number += 1
    peak = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peak[name] = pipe.recv()
    for worker in workers:
        worker.join()
    return {
        **case._asdict(),
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "peak": peak,
    }


def work(pipe: Any, case: Case, contender: str, device: str, threads: int) -> None:
    """Time a call for every number that comes; measure the memory of one, and end, when None comes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    call = (block if case.what == "block" else step)(case, contender, device)
    clock = time.process_time if threads == 1 else time.perf_counter
    settle(lambda number: call.run(*call.draw(number)))
    while (number := pipe.recv()) is not None:
        arguments = call.draw(number)
        synchronize(device)
        start = clock()
        call.run(*arguments)
        synchronize(device)
        pipe.send(clock() - start)
    arguments = call.draw(0)
    pipe.send(peak_bytes(lambda: call.run(*arguments), device))


class block:
    """Forward and backward of one layer's experts, the input's gradient included."""

    def __init__(self, case: Case, contender: str, device: str):
        self.case, self.device, self.dtype = case, device, getattr(torch, case.dtype)
        experts = next(module for name, module in adapted(case, contender, device, 1).named_modules()
                       if name.endswith("mlp.experts"))  # fmt: skip
        self.experts = experts
        self.popularity = 0.5 * torch.randn(case.E, device=device)

    def draw(self, number: int):
        generator = torch.Generator(self.device).manual_seed(number)
        case, options = self.case, {"generator": generator, "device": self.device}
        hidden = torch.randn(case.T, case.H, **options).to(self.dtype).requires_grad_()
        logits = torch.randn(case.T, case.E, **options) + self.popularity
        weights, index = logits.softmax(-1).topk(case.K)
        return hidden, index, weights.to(self.dtype).requires_grad_(), torch.randn_like(hidden)

    def run(self, hidden, index, weights, gradient) -> None:
        self.experts(hidden, index, weights).backward(gradient)


class step:
    """A training step of a model of 4 layers, with AdamW."""

    def __init__(self, case: Case, contender: str, device: str):
        self.case, self.device = case, device
        self.model = adapted(case, contender, device, 4).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def draw(self, number: int):
        generator = torch.Generator(self.device).manual_seed(number)
        length = min(self.case.T, 512)
        shape = (self.case.T // length, length)
        return (torch.randint(0, 1000, shape, generator=generator, device=self.device),)

    def run(self, input_ids) -> None:
        self.model(input_ids=input_ids, labels=input_ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def adapted(case: Case, contender: str, device: str, layers: int) -> torch.nn.Module:
    """A Mixtral of random weights with the contender's adapter, whose B is not zero, so that nothing is trivial."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    from hf_sparse_moe.adapters import expert_lora_config

    config = MixtralConfig(
        vocab_size=1000, hidden_size=case.H, intermediate_size=case.I, num_hidden_layers=layers,
        num_attention_heads=case.H // 64, num_key_value_heads=case.H // 64, num_local_experts=case.E,
        num_experts_per_tok=case.K, max_position_embeddings=512, router_aux_loss_coef=0.0,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(device, getattr(torch, case.dtype))
    if contender == "ours":
        chosen = expert_lora_config(model, r=RANK)
    elif contender == "PEFT":
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        chosen = LoraConfig(r=RANK, lora_alpha=32, target_modules=[], target_parameters=parameters)
    else:
        chosen = LoraConfig(r=RANK, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(model, chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


if __name__ == "__main__":
    main()
