"""
How much slower does a mixture get when it gets more experts, at the same K for each token?

    python benchmarks/growth.py --quick

Forward and backward of the experts of one layer, for ours, for transformers' `grouped_mm` and for the bare matrix
products. The tokens are as many as give each expert 32 rows where there are
the most experts; a step computes the same number of multiplications at every E. All take turns, and each call draws
its routing anew. Prints tokens a second over those at the fewest experts. `--write` puts them into
`benchmarks/results/<device>.json`, as `growth`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from experts import Setting, Shape
from measuring import SETTLE, TURN, device_name, interleave, save, settle


TOP_K, ROWS, LENGTH = 2, 32, 256
CONTENDERS = ("sparse_moe", "grouped_mm", "bare products")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few experts, few rounds")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 256])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=256, help="of one expert")
    parser.add_argument("--rounds", type=int, default=4, help=f"turns of each, of {TURN} timed calls")
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: one thread, by its own CPU time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="put the section into the results file")
    options = parser.parse_args()
    if options.quick:
        options.experts, options.hidden, options.intermediate, options.rounds = [8, 32], 64, 32, 2
    if options.cpu_time:
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    tokens = max(max(options.experts) * ROWS // TOP_K, LENGTH)
    clock = "CPU time" if options.cpu_time else "wall-clock time"
    print(f"{device_name(options.device)}, {clock}, {tokens} tokens, k {TOP_K}, hidden {options.hidden}, ", end="")
    print(f"intermediate {options.intermediate}; tokens a second over those at E {options.experts[0]}\n")
    names = CONTENDERS
    print("| E | rows an expert | " + " | ".join(names) + " |\n" + "| --- " * (2 + len(names)) + "|")
    blocks = measure(block_steps(tokens, options), options)
    rows = [{"E": experts, "seconds": blocks[experts]} for experts in options.experts]
    for row in rows:
        shares = (rows[0]["seconds"][name] / row["seconds"][name] for name in names)
        print(
            f"| {row['E']} | {tokens * TOP_K // row['E']} | " + " | ".join(f"{share:.2f}" for share in shares) + " |"
        )
    if options.write:
        sizes = {"hidden": options.hidden, "intermediate": options.intermediate, "T": tokens, "K": TOP_K}
        print("Wrote", save("growth", options.device, {"clock": clock, **sizes, "rows": rows}))


def measure(steps: dict[str, Callable[[int], Any]], options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """The median seconds by E and contender; the keys of `steps` are both."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = interleave(steps, options.device, options.rounds, 0, clock, TURN, SETTLE)
    return {
        experts: {key[1]: value for key, value in seconds.items() if key[0] == experts} for experts in options.experts
    }


def block_steps(tokens: int, options: argparse.Namespace) -> dict[tuple[int, str], Callable[[int], Any]]:
    steps: dict[tuple[int, str], Callable[[int], Any]] = {}
    for experts in options.experts:
        shape = Shape(tokens, options.hidden, options.intermediate, experts, TOP_K)
        setting = Setting(shape, "float32", options.device)
        settle(lambda number, setting=setting: setting.step("sparse_moe", number))
        for name in ("sparse_moe", "grouped_mm"):
            steps[experts, name] = lambda number, setting=setting, name=name: setting.step(name, number)
        steps[experts, "bare products"] = setting.ideal_step
    return steps


if __name__ == "__main__":
    main()
