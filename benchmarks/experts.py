"""
How fast are the experts of one layer, forward and backward, and what do they keep? All backends side by side.

    python benchmarks/experts.py --quick

Every call has a routing of its own, since a backend that has seen a row count before may be faster with it. Beside the
backends stand "ideal", the bare matrix products on rows that are already sorted, of row counts already seen, in memory
that is already there; and "dense", a gated feed-forward of linears with as many active parameters and so as many
multiplications. "routing" is what comes before the experts: the router's product, its softmax, the choice and the
sort. The table shows medians over the median of "ideal". With `--write`, or without any choice of shapes, writes the
section `experts` of `benchmarks/results/<device>.json`; on two cores the whole grid takes about eight minutes.

Not among the contenders: mixture-of-experts 0.2.3 and st-moe-pytorch 0.1.8 (both MIT), the peers that a package index
has for the CPU. They drop what goes beyond a capacity and hand tokens out with one-hot tensors of (tokens, E,
capacity), and their experts are not gated as these, or have biases: neither computes the function that is timed here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import hf_sparse_moe.experts  # noqa: F401  registers ours
from hf_sparse_moe.experts.choice import compute_dtype, has_hardware
from hf_sparse_moe.experts.segments import find_segments
from measuring import SETTLE, TURN, device_name, interleave, peak_bytes, save, saved_bytes, settle


class Shape(NamedTuple):
    """Tokens, hidden, intermediate of one expert, experts, experts a token."""

    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int


QUICK = [Shape(512, 512, 1024, 8, 2), Shape(512, 512, 256, 64, 8)]
FULL = [
    Shape(tokens, hidden, intermediate, experts, top_k)
    for hidden, intermediate, experts, top_k in (
        (512, 1024, 8, 2),
        (512, 256, 64, 8),
        (256, 512, 8, 1),
    )
    for tokens in (1, 8, 128, 2048)
]
MODES = ("float32", "bf16 autocast", "bfloat16")
# `batched_mm` copies the weights of every pair's expert: beyond this many of them it is only a way to fill the memory.
BATCHED_MM_LIMIT = 2**27
# The backward pass of `eager` fills a gradient of all experts for each of them: beyond this many numbers it is a wait.
EAGER_LIMIT = 2**30
# Where one of these takes so many times as long as the bare products, it is timed once, with the call that finds out.
SLOW, OFTEN_SLOW = 8, ("eager", "batched_mm")
FEWEST, MOST = 3, 12  # rounds
BARE = ("ideal", "dense", "routing")  # they draw no routing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes, few rounds, writes no file")
    parser.add_argument("--shapes", nargs="+", help="T,H,I,E,K each; the grid of the page by default")
    parser.add_argument("--modes", nargs="+", default=MODES[:2], choices=MODES)
    parser.add_argument("--backends", nargs="+", help="of transformers' registry, and `eager`")
    parser.add_argument("--rounds", type=int, help=f"turns of each contender, of {TURN} timed calls")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help=f"rounds for about so long a row, but not fewer than {FEWEST}"
    )
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: one thread, by its own CPU time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--write", action="store_true", help="write the results file even of chosen shapes")
    options = parser.parse_args()
    if options.threads or options.cpu_time:
        torch.set_num_threads(1 if options.cpu_time else options.threads)
    shapes = [Shape(*map(int, shape.split(","))) for shape in options.shapes or ()]
    shapes = shapes or (QUICK if options.quick else FULL)
    backends = options.backends or _default_backends()
    clock = "CPU time" if options.cpu_time else "wall-clock time"
    print(f"{device_name(options.device)}, {clock}. Times over those of the bare products (ms); memory in MB.\n")
    rows, written = [], None
    half = options.device != "cpu" or has_hardware(torch.bfloat16)
    for mode in options.modes:
        print(f"### {mode}\n")
        heads = ["T, H, I, E, K", "ideal ms", *backends, "dense", "ideal fwd ms"]
        heads += [f"{name} fwd" for name in _forward_names(backends)]
        heads += [f"{name} {what}" for what in ("saved", "peak") for name in (*backends, "dense")]
        print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
        for shape in shapes:
            if mode == MODES[1] and shape.T > 8 and not (options.shapes or half):
                continue  # ours compute in float32 there, and the others for minutes
            row = measure(shape, mode, backends, options)
            rows.append(row)
            print(_line(row, backends), flush=True)
            if options.write or not (options.quick or options.shapes):  # a run that is cut leaves its part
                written = save("experts", options.device, {"clock": clock, "rows": rows})
        print()
    if written:
        print("Wrote", written)


def measure(shape: Shape, mode: str, backends: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Times in seconds and memory in bytes of every contender for one shape."""
    torch.manual_seed(0)
    setting = Setting(shape, mode, options.device)
    chosen = [name for name in backends if setting.is_sane(name)]
    steps: dict[str, Callable] = {"ideal": setting.ideal_step, "dense": setting.dense_step}
    forwards: dict[str, Callable] = {"ideal": setting.ideal_forward, "dense": setting.dense_forward}
    forwards["routing"] = setting.route
    steps |= {name: partial(setting.step, name) for name in chosen}
    forwards |= {name: partial(setting.forward, name) for name in chosen}
    row: dict[str, Any] = {**shape._asdict(), "mode": mode, "bytes_a_number": setting.compute_dtype.itemsize}
    row["step_s"] = setting.seconds(steps, options)
    with torch.no_grad():
        row["forward_s"] = setting.seconds(forwards, options)
    row["saved_bytes"] = {name: setting.saved(name) for name in (*chosen, "dense")}
    row["peak_bytes"] = {
        name: peak_bytes(lambda name=name: steps[name](0), options.device)
        for name in (*chosen, "dense")
        if row["step_s"][name] < SLOW * row["step_s"]["ideal"]
    }
    return row


class Setting:
    """The experts, their dense twin and the bare products of one shape, with inputs and routing."""

    def __init__(self, shape: Shape, mode: str, device: str):
        tokens, hidden, intermediate, experts, top_k = self.shape = shape
        self.autocast = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=mode == "bf16 autocast")
        weight_dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        self.product_dtype = torch.float32 if mode == "float32" else torch.bfloat16
        with self.autocast:
            self.compute_dtype = compute_dtype(torch.empty(0, dtype=weight_dtype, device=device))
        config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
        with torch.device(device):
            self.experts = MixtralExperts(config).to(weight_dtype)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=0.02)
            self.dense = Dense(hidden, top_k * intermediate).to(weight_dtype)
            self.hidden = torch.randn(tokens, hidden, dtype=weight_dtype, requires_grad=True)
            self.gradient = torch.randn(tokens, hidden, dtype=weight_dtype)
            self.favour = torch.randn(experts) / 4  # some experts get more than others, as they do
            self.router = torch.randn(experts, hidden, dtype=weight_dtype)
            rows = tokens * top_k
            up, down, dtype = self.experts.gate_up_proj, self.experts.down_proj, self.product_dtype
            self.matrices = [(a.detach().to(dtype), b.detach().to(dtype)) for a, b in zip(up, down, strict=True)]
            self.products = [torch.randn(rows, size, dtype=dtype) for size in (hidden, 2 * intermediate, intermediate)]
            self.outputs = [torch.empty_like(product) for product in (*self.products, self.products[0])]
            self.gradients = [(torch.empty_like(a), torch.empty_like(b)) for a, b in self.matrices]
        self.counts = torch.bincount(self.routing(0)[0].flatten(), minlength=experts).tolist()

    def is_sane(self, backend: str) -> bool:
        tokens, hidden, intermediate, experts, top_k = self.shape
        expert = 3 * hidden * intermediate
        if backend == "eager":
            return experts**2 * expert <= EAGER_LIMIT * (3 if tokens <= 2048 else 1)
        return backend != "batched_mm" or tokens * top_k * expert <= BATCHED_MM_LIMIT

    def seconds(self, contenders: dict[str, Callable[[int], Any]], options: argparse.Namespace) -> dict[str, float]:
        """The median of each, without the drawing of a routing; each contender draws others than the rest."""
        apart = {
            name: lambda number, call=call, place=place: call(1000 * place + number)
            for place, (name, call) in enumerate(contenders.items())
        }
        clock = time.process_time if options.cpu_time else time.perf_counter
        settings = {"device": options.device, "warmup": 0, "clock": clock}
        for name in contenders.keys() & {"sparse_moe", "sparse_moe_recompute"}:
            settle(contenders[name])
        once = interleave(apart, rounds=1, settle=1, **settings)
        slow = {name: value for name, value in once.items() if name in OFTEN_SLOW and value > SLOW * once["ideal"]}
        timed = {name: call for name, call in apart.items() if name not in slow}
        turns = options.seconds / 2 / ((SETTLE + TURN) * sum(once[name] for name in timed))
        rounds = options.rounds or max(FEWEST, min(MOST, round(turns)))
        found = interleave(timed | {"drawing": self.routing}, rounds=rounds, settle=SETTLE, turn=TURN, **settings)
        drawing = found.pop("drawing")
        found |= slow
        return {name: value - (0 if name in BARE else drawing) for name, value in found.items()}

    def routing(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(self.hidden.device).manual_seed(number)
        logits = torch.randn(self.shape.T, self.shape.E, generator=generator, device=self.hidden.device) + self.favour
        weights, index = logits.softmax(-1).topk(self.shape.K)
        return index, weights.to(self.hidden.dtype).requires_grad_()

    def route(self, _: int) -> None:
        """What comes before the experts: the router, and the order of the pairs."""
        logits = nn.functional.linear(self.hidden, self.router)
        _, index = logits.float().softmax(-1).topk(self.shape.K)
        if index.device.type == "cpu":
            find_segments(index, self.shape.E, fill_up=self.product_dtype.itemsize == 2, may_skip=False)
        else:
            index.flatten().sort()

    def forward(self, backend: str, number: int) -> torch.Tensor:
        self.experts.config._experts_implementation = backend
        index, weights = self.routing(number)
        self.experts.train(torch.is_grad_enabled())
        with self.autocast:
            return self.experts(self.hidden, index, weights)

    def step(self, backend: str, number: int) -> None:
        self.forward(backend, number).backward(self.gradient)
        self._forget()

    def dense_forward(self, number: int) -> torch.Tensor:
        with self.autocast:
            return self.dense(self.hidden)

    def dense_step(self, number: int) -> None:
        output = self.dense_forward(number)
        output.backward(self.gradient.to(output.dtype))
        self._forget()

    def ideal_forward(self, _: int) -> None:
        parts = [tensor.split(self.counts) for tensor in (*self.products, *self.outputs)]
        for (up, down), x, _, a, _, d_first, _, y in zip(self.matrices, *parts, strict=True):
            if len(x):
                torch.mm(x, up.t(), out=d_first)
                torch.mm(a, down.t(), out=y)

    def ideal_step(self, _: int) -> None:
        parts = [tensor.split(self.counts) for tensor in (*self.products, *self.outputs)]
        for (up, down), (d_up, d_down), x, first, a, d_x, d_first, d_a, y in zip(
            self.matrices, self.gradients, *parts, strict=True
        ):
            if not len(x):
                continue
            torch.mm(x, up.t(), out=d_first)
            torch.mm(a, down.t(), out=y)
            torch.mm(x, down, out=d_a)
            torch.mm(x.t(), a, out=d_down)
            torch.mm(first, up, out=d_x)
            torch.mm(first.t(), x, out=d_up)

    def saved(self, name: str) -> int:
        forward = self.dense_forward if name == "dense" else lambda number: self.forward(name, number)
        known = [self.hidden, *self.experts.parameters(), *self.dense.parameters()]
        return saved_bytes(lambda: forward(0), without=known)

    def _forget(self) -> None:
        self.experts.zero_grad()
        self.dense.zero_grad()
        self.hidden.grad = None


class Dense(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def _default_backends() -> list[str]:
    return ["sparse_moe", "sparse_moe_recompute", "grouped_mm", "eager", "batched_mm"]


def _forward_names(backends: list[str]) -> list[str]:
    return [*backends, "dense", "routing"]


def _line(row: dict[str, Any], backends: list[str]) -> str:
    steps, forwards = row["step_s"], row["forward_s"]
    cells = [", ".join(str(row[size]) for size in Shape._fields)]
    for seconds, names in ((steps, [*backends, "dense"]), (forwards, _forward_names(backends))):
        cells.append(f"{seconds['ideal'] * 1e3:.1f}")
        cells += [f"{seconds[name] / seconds['ideal']:.2f}" if name in seconds else "" for name in names]
    for memory in (row["saved_bytes"], row["peak_bytes"]):
        cells += [f"{memory[name] / 1e6:.0f}" if name in memory else "" for name in (*backends, "dense")]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
