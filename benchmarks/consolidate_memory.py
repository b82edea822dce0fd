"""
What does `consolidate` hold in memory? Its own, beside mapped files, while it makes one checkpoint of FSDP's shards.

    python benchmarks/consolidate_memory.py

Two processes (gloo, CPU) write the shards of a Llama mixture of 1.2 GB in float32 by `torch.distributed.checkpoint`,
as Trainer does under FSDP2 with `SHARDED_STATE_DICT`; a third one consolidates them. Needs Linux and 3 GiB of disk.
"""

from __future__ import annotations

import json
import tempfile
import threading
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers as hf
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
from hf_sparse_moe.distributed.consolidation import consolidate


MB = 1e6
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
PROCESSES = get_context("spawn")


def make_config() -> SparseMoeDecoderConfig:
    return SparseMoeDecoderConfig.from_dense(hf.LlamaConfig(**SIZES, vocab_size=32000), num_experts=8)


def write_shards(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = SparseMoeDecoderForCausalLM(make_config())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "checkpoint" / "pytorch_model_fsdp_0")
    if rank == 0:
        model.config.save_pretrained(folder / "checkpoint")
        sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
        (folder / "sizes.json").write_text(json.dumps([sum(sizes) / MB, max(sizes) / MB]))
    distributed.destroy_process_group()


def measure(folder: Path) -> None:
    before, peak, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    consolidate(folder / "checkpoint", folder / "whole", max_shard_size="500MB")
    done.set()
    watcher.join()
    (folder / "peak.json").write_text(json.dumps(peak[0] - before))


def anonymous() -> float:
    """This process's own memory in MB; pages of a mapped file, which the system may drop, are not in it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024 / MB


def run(*processes) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A process failed.")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(*(PROCESSES.Process(target=write_shards, args=(rank, folder)) for rank in range(2)))
        run(PROCESSES.Process(target=measure, args=(folder,)))
        total, largest = json.loads((folder / "sizes.json").read_text())
        peak = json.loads((folder / "peak.json").read_text())
    print(f"{total:,.0f} MB of shards, the largest tensor {largest:,.0f} MB: memory grew by {peak:,.0f} MB")


if __name__ == "__main__":
    main()
