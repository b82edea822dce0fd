"""
How fast is streaming upcycling, and how much memory does it take? Side by side with `cp -r` of the same output bytes.

    python benchmarks/upcycle_speed.py

For each method, generates a Llama-shaped bfloat16 checkpoint with as many layers as the output needs to be large
enough, then alternates between upcycling it and copying the result, each time up to the moment when the disk holds
every byte. Each upcycling is a process of its own, whose peak memory is what the system says of it; "command" is the
whole process, with its imports. `cp` reads what was just written, so mostly from memory. The processor's seconds say
what a busy machine hides. Removes its files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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
from hf_sparse_moe import upcycle
source, target, arguments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
imported = resource.getrusage(resource.RUSAGE_SELF)
start = time.perf_counter()
upcycle(source, output=target, **arguments)
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
cpu = used.ru_utime + used.ru_stime - imported.ru_utime - imported.ru_stime
peaks = {"imported": imported.ru_maxrss * 1024, "peak": used.ru_maxrss * 1024}
print(json.dumps({"seconds": seconds, "cpu": cpu, **peaks}))
"""
FEED_FORWARD_GIB = 3 * 2048 * 8192 * 2 / 2**30
FEED_FORWARDS = {"split": 4, "partition": 1, "graft": 9}  # how many a layer writes; the others 8, one an expert
METHODS = ["copy", "noise", "drop", "split", "partition", "graft"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="output, at least")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--max-shard-size", default="1GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary one by default")
    options = parser.parse_args()
    rows = []
    for method in options.methods:
        layer_gib = FEED_FORWARDS.get(method, 8) * FEED_FORWARD_GIB
        layers = int(options.gib / layer_gib) + 1
        needed = (layers * (FEED_FORWARD_GIB + 2.2 * layer_gib) + 2) * 2**30
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            free = shutil.disk_usage(folder).free
            if free < needed:
                sys.exit(f"This needs {needed / 2**30:.0f} GiB of disk, and {folder} has {free / 2**30:.0f}.")
            run(GENERATE, layers, folder / "dense")
            rows.append(measure(folder, method, options.max_shard_size, options.rounds))
    heads = ["method", "output GiB", "upcycle GiB/s", "cp GiB/s", "ratio", "command s", "cp s", "upcycle CPU s/GiB"]
    heads += ["cp CPU s/GiB", "peak MiB", "largest shard MiB", "above it MiB"]
    print("\n| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def measure(folder: Path, method: str, max_shard_size: str, rounds: int) -> list[str]:
    mixture, copy = folder / "mixture", folder / "copy"
    arguments = json.dumps({"num_experts": 8, "method": method, "max_shard_size": max_shard_size})
    commands, upcycled, copied, peaks, cpus, copy_cpus = [], [], [], [], [], []
    for number in range(rounds):
        start = time.perf_counter()
        measured = json.loads(run(UPCYCLE, folder / "dense", mixture, arguments).splitlines()[-1])
        commands.append(time.perf_counter() - start)
        files = sorted(mixture.glob("*.safetensors"))
        size, largest = sum(path.stat().st_size for path in files), max(path.stat().st_size for path in files)
        start, before = time.perf_counter(), children_cpu()
        subprocess.run(["cp", "-r", mixture, copy], check=True)
        subprocess.run(["sync", *copy.iterdir()], check=True)
        copied.append(time.perf_counter() - start)
        copy_cpus.append(children_cpu() - before)
        upcycled.append(measured["seconds"])
        cpus.append(measured["cpu"])
        peaks.append(measured["peak"])
        print(
            f"{method}, round {number + 1}, load {os.getloadavg()[0]:.1f}: command {commands[-1]:.1f} s, of it "
            f"upcycle {upcycled[-1]:.1f} s, cp {copied[-1]:.1f} s, peak {peaks[-1] / 2**20:.0f} MiB, of which the "
            f"imports {measured['imported'] / 2**20:.0f} MiB",
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
        f"{statistics.median(commands):.1f}",
        f"{statistics.median(copied):.1f}",
        f"{statistics.median(cpus) / gib:.2f}",
        f"{statistics.median(copy_cpus) / gib:.2f}",
        f"{peak / 2**20:.0f}",
        f"{largest / 2**20:.0f}",
        f"{(peak - largest) / 2**20:.0f}",
    ]


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
