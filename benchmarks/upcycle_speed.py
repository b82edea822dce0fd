"""
How fast is streaming upcycling, and how much memory does it take? Side by side with `cp -r` of the same output bytes.

    python benchmarks/upcycle_speed.py

Generates a Llama-shaped bfloat16 checkpoint, then alternates between upcycling it and copying the result, each time up
to the moment when the disk holds every byte. Each upcycling is a process of its own, whose peak memory is what
the system says of it. `cp` reads what was just written, so mostly from memory. Removes its files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


# The processes below import torch; this one stays small, because a child's peak memory begins at its parent's.
GENERATE = """
import sys, torch, transformers
layers, folder = int(sys.argv[1]), sys.argv[2]
config = transformers.LlamaConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16
)
torch.manual_seed(0)
transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
"""
UPCYCLE = """
import json, resource, sys, time
from hf_sparse_moe.upcycling.streaming import stream_upcycle
source, target, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
stream_upcycle(source, target, **arguments)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "imported": imported * 1024, "peak": peak * 1024}))
"""
LAYER_GIB = 8 * 3 * 2048 * 8192 * 2 / 2**30  # of 8 experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="output, at least")
    parser.add_argument("--methods", nargs="+", default=["copy"], help="of upcycling")
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary one by default")
    options = parser.parse_args()
    layers = int(options.gib / LAYER_GIB) + 1
    needed = 3.5 * (layers * LAYER_GIB + 1) * 2**30
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < needed:
            sys.exit(f"This needs {needed / 2**30:.0f} GiB of disk, and {folder} has {free / 2**30:.0f}.")
        run(GENERATE, layers, folder / "dense")
        rows = [measure(folder, method, options.max_shard_size, options.rounds) for method in options.methods]
    print("\n| method | output GiB | upcycle GiB/s | cp GiB/s | ratio | peak MiB | largest shard MiB | above it MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def measure(folder: Path, method: str, max_shard_size: str, rounds: int) -> list[str]:
    mixture, copy = folder / "mixture", folder / "copy"
    arguments = json.dumps({"num_experts": 8, "method": method, "max_shard_size": max_shard_size})
    upcycled, copied, peaks = [], [], []
    for number in range(rounds):
        measured = json.loads(run(UPCYCLE, folder / "dense", mixture, arguments).splitlines()[-1])
        files = sorted(mixture.glob("*.safetensors"))
        size, largest = sum(path.stat().st_size for path in files), max(path.stat().st_size for path in files)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", mixture, copy], check=True)
        subprocess.run(["sync", *copy.iterdir()], check=True)
        copied.append(time.perf_counter() - start)
        upcycled.append(measured["seconds"])
        peaks.append(measured["peak"])
        print(
            f"{method}, round {number + 1}: upcycle {upcycled[-1]:.1f} s, cp {copied[-1]:.1f} s, peak "
            f"{peaks[-1] / 2**20:.0f} MiB, of which the imports {measured['imported'] / 2**20:.0f} MiB",
            flush=True,
        )
        shutil.rmtree(mixture)
        shutil.rmtree(copy)
    ratio = statistics.median(there / here for here, there in zip(upcycled, copied, strict=True))
    gib, peak = size / 2**30, max(peaks)
    return [
        method,
        f"{gib:.2f}",
        f"{gib / statistics.median(upcycled):.2f}",
        f"{gib / statistics.median(copied):.2f}",
        f"{ratio:.2f}",
        f"{peak / 2**20:.0f}",
        f"{largest / 2**20:.0f}",
        f"{(peak - largest) / 2**20:.0f}",
    ]


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
