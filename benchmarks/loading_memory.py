"""
What does a process hold while it gets its part of a mixture? Its own memory, beside mapped files, by layout.

    python benchmarks/loading_memory.py

Writes a dense checkpoint and the mixture of 925 MiB that it becomes (Qwen3-like, 16 experts, float32) into a temporary
folder. One, two and four processes (gloo, CPU) load the mixture with `from_pretrained(distributed_config=...)`, and
make it of the dense checkpoint with `upcycle(distributed_config=...)`. Needs Linux, 1.2 GiB of disk and 3 GiB of
memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers as hf
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging

from hf_sparse_moe import SparseMoeDecoderForCausalLM, upcycle


MIB = 2**20
EXPERTS = 16
LAYOUTS: list[dict[str, int]] = [
    {},
    {"fsdp_size": 2},
    {"fsdp_size": 2, "ep_size": 2},
    {"tp_size": 2},
    {"fsdp_size": 4},
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 2, "tp_size": 2},
]
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_sparse_moe.upcycling", "transformers.models.qwen3.modeling_qwen3"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the mixture: 100 MiB each")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        whole = make_checkpoints(Path(name), options.layers)
        rows = [measure(Path(name), layout, way) for way in ("load", "upcycle") for layout in LAYOUTS]
    print(f"A mixture of {whole:,.0f} MiB\n")
    print("| | layout | its part, MiB | at most | once written to |\n| --- | --- | ---: | ---: | ---: |")
    for row in rows:
        name = " x ".join(f"{key} {value}" for key, value in row["layout"].items()) or "one process"
        print(f"| {row['way']} | {name} | {row['part']:,.0f} | {row['peak']:,.0f} | {row['written']:,.0f} |")


def make_checkpoints(folder: Path, layers: int) -> float:
    """`dense`, and the `mixture` that it becomes; returns the MiB of that."""
    config = hf.Qwen3Config(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=False,
    )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    upcycle(folder / "dense", EXPERTS, method="noise", output=folder / "mixture")
    return sum(file.stat().st_size for file in (folder / "mixture").glob("*.safetensors")) / MIB


def measure(folder: Path, layout: dict[str, int], way: str) -> dict:
    """The largest figures of the ranks, in MiB."""
    ranks = layout.get("fsdp_size", 1) * layout.get("tp_size", 1)
    with tempfile.TemporaryDirectory(dir=folder) as results:
        processes = [
            PROCESSES.Process(target=run_as_rank, args=(rank, ranks, folder, layout, way, Path(results)))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{way} {layout} failed.")
        told = [json.loads(file.read_text()) for file in Path(results).glob("*.json")]
    largest = {name: max(rank[name] for rank in told) for name in told[0]}
    return {"way": way, "layout": layout, **largest}


def run_as_rank(rank: int, ranks: int, folder: Path, layout: dict[str, int], way: str, results: Path) -> None:
    """Write down the growth of anonymous memory, at its peak and once every weight has been written to."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if ranks > 1:
        distributed.init_process_group("gloo", f"file://{results}/meet", rank=rank, world_size=ranks)
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = get_part(folder, layout, way)
    done.set()
    watcher.join()
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in model.parameters()]
    for part in parts:
        part.data.add_(0)
    part_mib = sum(part.numel() * part.element_size() for part in parts) / MIB
    told = {"part": part_mib, "peak": peak[0] - before, "written": anonymous_mib() - before}
    (results / f"{rank}.json").write_text(json.dumps(told))
    if ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def get_part(folder: Path, layout: dict[str, int], way: str) -> hf.PreTrainedModel:
    sizes = DistributedConfig(**layout)
    if way == "load":
        shared = {"distributed_config": sizes} if layout else {}
        return SparseMoeDecoderForCausalLM.from_pretrained(folder / "mixture", **shared)
    if not layout:
        return upcycle(str(folder / "dense"), num_experts=EXPERTS, method="noise")
    return upcycle(folder / "dense", EXPERTS, method="noise", distributed_config=sizes)


def anonymous_mib() -> float:
    """Of this process; pages of a mapped file, which the system may drop, are not in it."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
