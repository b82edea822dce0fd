"""
Do the collectives of a training step move the bytes that `plan` says?

Small mixtures (Qwen3, BERT, T5; 4 experts, 2 a token) take one step in 2 and in 4 processes (gloo, on the CPU), with
DDP and with the layouts of transformers' `DistributedConfig`. Each collective is seen where torch dispatches it, and
the size of its tensor counted: what is gathered, scattered or reduced in all, or what a rank sends to all ranks. The
mean of the ranks stands beside the prediction, in bytes. What DDP broadcasts (buffers) is left out.

    python benchmarks/collectives.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import hf_sparse_moe
from hf_sparse_moe.planning import Layout, Workload, read_shape
from hf_sparse_moe.planning.formulas import traffic


LENGTH, SEQUENCES = 16, 2
_VOCABULARY = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    **_VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01, "balance_scope": "global_batch"}
_QWEN3 = hf.Qwen3Config(**_SIZES, num_key_value_heads=4, head_dim=8, tie_word_embeddings=False)
MODELS = {  # class, dense config, and what differs from _MIXTURE
    "decoder": (hf_sparse_moe.SparseMoeDecoderForCausalLM, _QWEN3, {}),
    "decoder, 2 experts": (hf_sparse_moe.SparseMoeDecoderForCausalLM, _QWEN3, {"num_experts": 2}),
    "encoder": (hf_sparse_moe.SparseMoeEncoderForMaskedLM, hf.BertConfig(**_SIZES), {}),
    "encoder_decoder": (
        hf_sparse_moe.SparseMoeEncoderDecoderForConditionalGeneration,
        hf.T5Config(**_VOCABULARY, **_T5),
        {},
    ),
}
DDP_2, FSDP_2, FSDP_EP_2 = Layout("ddp", replicas=2), Layout("fsdp", fsdp=2), Layout("fsdp", fsdp=2, ep=2)
LAYOUTS = [DDP_2, FSDP_2, FSDP_EP_2]
# (processes, family, layout, gradient checkpointing)
FAMILIES = ("decoder", "encoder", "encoder_decoder")
CASES = [(2, family, layout, False) for family in FAMILIES for layout in LAYOUTS] + [
    (2, "decoder", Layout("fsdp", tp=2), False),
    (2, "decoder", Layout("fsdp", fsdp=2, ep=2), True),
    (4, "decoder", Layout("fsdp", fsdp=4, ep=2), False),
    (4, "decoder", Layout("fsdp", fsdp=4, ep=4), False),
    (4, "decoder, 2 experts", Layout("fsdp", fsdp=4), False),
    (4, "decoder, 2 experts", Layout("fsdp", replicas=2, fsdp=2), False),
    (4, "decoder", Layout("fsdp", replicas=2, fsdp=2), False),
    (4, "decoder", Layout("fsdp", fsdp=2, tp=2), False),
    (4, "decoder", Layout("fsdp", fsdp=2, tp=2), True),
    (4, "decoder", Layout("fsdp", fsdp=2, tp=2, ep=2), False),
    (4, "decoder", Layout("fsdp", fsdp=2, tp=2, ep=4), False),
    (4, "decoder", Layout("fsdp", fsdp=2, tp=2, ep=4), True),
]


class CollectiveCounter(TorchDispatchMode):
    """Bytes of the collectives that run inside, by kind; DTensors are seen as the tensors that they become."""

    # Name to kind, and which argument is the whole tensor; a functional gather is called with a part of it alone.
    _KNOWN = {
        "_allgather_base_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "allreduce_": ("all_reduce", 0),
        "alltoall_base_": ("all_to_all", 1),
        "all_gather_into_tensor": ("all_gather", 0),
        "reduce_scatter_tensor": ("reduce_scatter", 0),
        "all_reduce": ("all_reduce", 0),
        "all_to_all_single": ("all_to_all", 0),
    }
    _OTHERS = {"wait_tensor", "_wrap_tensor_autograd", "broadcast_"}

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in self._OTHERS:
            kind, position = self._KNOWN[func._opname]
            parts = args[1] if func._opname == "all_gather_into_tensor" else 1
            tensors = args[position] if isinstance(args[position], list) else [args[position]]
            self.bytes[kind] += parts * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def counted_bytes(folder: Path, family: str, layout: Layout, checkpointing: bool) -> dict[str, float]:
    """The mean over the ranks of what one step moves, on each of them."""
    model_class = MODELS[family][0]
    if layout.engine == "ddp":
        model: Any = model_class.from_pretrained(folder)
        trained = DistributedDataParallel(model)
    else:
        degrees = {"dp_replicate_size": layout.replicas, "fsdp_size": layout.fsdp}
        degrees |= {"tp_size": layout.tp, "ep_size": layout.ep}
        trained = model = model_class.from_pretrained(folder, distributed_config=DistributedConfig(**degrees))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(distributed.get_rank() // layout.tp)
    ids = torch.randint(3, 96, (SEQUENCES * layout.tp, LENGTH), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trained(**inputs).loss.backward()  # the first step also sets up the engine
    model.zero_grad()
    with CollectiveCounter() as counter:
        trained(**inputs).loss.backward()
    ranks = distributed.get_world_size()
    everybody: list[Any] = [None] * ranks
    distributed.all_gather_object(everybody, dict(counter.bytes))
    return {kind: sum(each.get(kind, 0) for each in everybody) / ranks for kind in set().union(*everybody)}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Prediction and count of the cases of this many processes."""
    distributed.init_process_group("gloo")
    logging.set_verbosity_error()
    found = []
    for ranks, family, layout, checkpointing in CASES:
        if ranks != distributed.get_world_size():
            continue
        workload = Workload(LENGTH, SEQUENCES, "float32", gradient_checkpointing=checkpointing)
        predicted: Counter[str] = Counter()
        for collective in traffic(read_shape(folder / family), layout, workload):
            predicted[collective.kind] += collective.bytes
        counted = counted_bytes(folder / family, family, layout, checkpointing)
        name = layout.name + (", checkpointing" if checkpointing else "")
        for kind in sorted(predicted.keys() | counted.keys()):
            sizes = {"predicted": predicted[kind], "counted": counted.get(kind, 0)}
            found.append({"family": family, "layout": name, "collective": kind, **sizes})
    distributed.destroy_process_group()
    return found


def run(processes: int, folder: Path) -> list[dict[str, Any]]:
    """`rows` of so many processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    output = folder / f"{processes}.json"
    command = [*launch, __file__, "--worker", str(folder), "--output", str(output)]
    finished = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    if finished.returncode:
        raise RuntimeError(f"{processes} processes failed:\n{finished.stderr[-4000:]}")
    return json.loads(output.read_text())


def measure(numbers: list[int]) -> list[dict[str, Any]]:
    """The cases of these numbers of processes, a launch each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        for family, (model_class, dense_config, changes) in MODELS.items():
            config = model_class.config_class.from_dense(dense_config, **{**_MIXTURE, **changes})
            model_class(config).save_pretrained(folder / family)
        return [row for processes in numbers for row in run(processes, folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--processes", type=int, nargs="+", default=sorted({case[0] for case in CASES}))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        found = rows(arguments.worker)
        if os.environ["RANK"] == "0":
            arguments.output.write_text(json.dumps(found))
        return
    found = measure(arguments.processes)
    if arguments.json:
        print(json.dumps(found))
        return
    print("| model | layout | collective | predicted bytes | counted bytes |\n| --- | --- | --- | ---: | ---: |")
    for row in found:
        names = f"| {row['family']} | {row['layout']} | {row['collective']} "
        print(f"{names}| {row['predicted']:,.0f} | {row['counted']:,.0f} |")


if __name__ == "__main__":
    main()
