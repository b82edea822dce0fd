"""
Does the router's gradient depend on how a batch of 8 sequences is split over micro-batches and processes?

One optimizer step of the stock Trainer on a tiny Mixtral and on tiny Llama mixtures of ours, one a balance scope,
with a coefficient of 1; the task loss is part of the gradient. Columns: batch size of a process x micro-batches, and
x 2 where there are two processes (gloo, DDP). Two tables, both against one process with 8 x 1:
- equal sequences: the norm of the router's gradient over that norm. 1 is right.
- different sequences of equal length: the norm of the difference over that norm. 0 is the same gradient. Where the
  load is that of a micro-batch, or of the micro-batches so far, it cannot be 0.

    python benchmarks/balance_invariance.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers as hf
from transformers.utils import logging

import hf_sparse_moe


SEQUENCES, LENGTH, VOCABULARY = 8, 12, 96
MODELS = {
    "stock Mixtral": None,
    "ours, `micro_batch`": "micro_batch",
    "ours, `sequence`": "sequence",
    "ours, `global_batch`": "global_batch",
}
SPLITS = {1: [(8, 1), (4, 2), (2, 4), (1, 8)], 2: [(4, 1), (2, 2)]}  # by the number of processes
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
_MIXTURE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}


def build(scope: str | None) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    if scope is None:
        config = hf.MixtralConfig(**_SIZES, **_MIXTURE, num_local_experts=8, output_router_logits=True)
    else:
        config = hf_sparse_moe.SparseMoeDecoderConfig.from_dense(
            hf.LlamaConfig(**_SIZES), **_MIXTURE, num_experts=8, balance_scope=scope
        )
    return hf.AutoModelForCausalLM.from_config(config)


def examples(equal: bool) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in (ids[:1].expand_as(ids) if equal else ids)]


class RouterGradient(hf.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "gate.weight" in name])


def router_gradient(scope: str | None, equal: bool, batch_size: int, micro_batches: int) -> torch.Tensor:
    """The gradient of all routers of one optimizer step, flat; `batch_size` is a process's."""
    callback = RouterGradient()
    with tempfile.TemporaryDirectory() as folder:
        arguments = hf.TrainingArguments(
            folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=micro_batches, max_steps=1,
            max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            ddp_find_unused_parameters=False,
        )  # fmt: skip
        trainer = hf.Trainer(model=build(scope), args=arguments, train_dataset=examples(equal), callbacks=[callback])
        trainer.train()
    return callback.gradient


def gradients(processes: int) -> dict[tuple, torch.Tensor]:
    """By model, kind of sequences, processes and split."""
    return {
        (name, equal, processes, *split): router_gradient(scope, equal, *split)
        for name, scope in MODELS.items()
        for equal in (True, False)
        for split in SPLITS[processes]
    }


def gradients_of_two_processes() -> dict[tuple, torch.Tensor]:
    """Of this file under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gradients.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, __file__, str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
        saved = torch.load(out)
    if saved["world_size"] != 2:
        raise RuntimeError(f"torchrun started {saved['world_size']} process instead of 2.")
    return saved["gradients"]


def as_rank(out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        process = hf.TrainingArguments(folder, use_cpu=True)
        measured = gradients(process.world_size)
    if process.process_index == 0:
        torch.save({"gradients": measured, "world_size": process.world_size}, out)


def main() -> None:
    measured = gradients(1) | gradients_of_two_processes()
    splits = [(processes, *split) for processes, of_it in SPLITS.items() for split in of_it]
    titles = [f"{size} x {micro}" + (f" x {processes}" if processes > 1 else "") for processes, size, micro in splits]
    for equal in (True, False):
        print("\nEqual sequences, ratio of the norms:" if equal else "\nDifferent sequences, relative difference:")
        print("\n| |", " | ".join(titles), "|")
        print("| --- |", " | ".join(["---"] * len(titles)), "|")
        for name in MODELS:
            reference = measured[name, equal, 1, 8, 1]
            row = [measured[name, equal, *split] for split in splits]
            if equal:
                cells = [f"{(gradient.norm() / reference.norm()).item():.6f}" for gradient in row]
            else:
                cells = [f"{((gradient - reference).norm() / reference.norm()).item():.1e}" for gradient in row]
            print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if len(sys.argv) > 1:
        as_rank(sys.argv[1])
    else:
        main()
