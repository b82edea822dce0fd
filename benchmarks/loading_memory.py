"""
What does a process hold while it loads its part of a mixture? Its own memory, beside the mapped file, by layout.

    python benchmarks/loading_memory.py

Saves a mixture of 925 MiB (Qwen3-like, 16 experts, float32) into a temporary folder, and loads it in one process and
in two (gloo, CPU) with `from_pretrained(distributed_config=...)`. Needs Linux, 1 GiB of disk and 3 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM


MIB = 2**20
LAYOUTS: list[dict[str, int]] = [{}, {"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the mixture: 105 MiB each")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "LAYOUT"), help=argparse.SUPPRESS)  # one rank of ours
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.load:
        load(Path(options.load[0]), json.loads(options.load[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_mixture(options.layers)
        model.save_pretrained(folder)
        print(f"A mixture of {sum(part.numel() * 4 for part in model.parameters()) / MIB:,.0f} MiB\n")
        del model
        print("| layout | its part, MiB | while loading | once written to |\n| --- | ---: | ---: | ---: |")
        for layout in LAYOUTS:
            told = run(Path(folder), layout)
            name = " x ".join(f"{key} {value}" for key, value in layout.items()) or "one process"
            print(f"| {name} | {told['part']:,.0f} | {told['loading']:,.0f} | {told['written']:,.0f} |", flush=True)


def make_mixture(layers: int) -> SparseMoeDecoderForCausalLM:
    dense = hf.Qwen3Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=False,
    )
    return SparseMoeDecoderForCausalLM(SparseMoeDecoderConfig.from_dense(dense, num_experts=16))


def run(folder: Path, layout: dict[str, int]) -> dict[str, float]:
    """The largest figures of the ranks, in MiB."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if layout else []
    command = [sys.executable, *launcher, __file__, "--load", str(folder), json.dumps(layout)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    ranks = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def load(folder: Path, layout: dict[str, int]) -> None:
    """As one rank: print the growth of anonymous memory, at its peak and once every weight has been written to."""
    if layout:
        distributed.init_process_group("gloo")
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    arguments: dict[str, Any] = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    model = SparseMoeDecoderForCausalLM.from_pretrained(folder, **arguments)
    done.set()
    watcher.join()
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in model.parameters()]
    for part in parts:
        part.data.add_(0)
    part_mib = sum(part.numel() * part.element_size() for part in parts) / MIB
    told = {"part": part_mib, "loading": peak[0] - before, "written": anonymous_mib() - before}
    print("\n" + json.dumps(told), flush=True)
    if layout:
        distributed.destroy_process_group()


def anonymous_mib() -> float:
    """Of this process; pages of a mapped file, which the system may drop, are not in it."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
