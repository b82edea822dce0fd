"""
What happens to a mixture whose trainer computes the loss itself, with the balance loss carried along and without it?

A small decoder from scratch, on the bytes of Python's own modules, under TRL's SFTTrainer. Draws the load of the
fullest expert over the mean load, minus 1 (MaxVio, 0 is even), mean over the layers, against the step.

    python benchmarks/outside_loss.py  # writes docs/balance_outside_loss.png
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import transformers as hf
from datasets import Dataset
from matplotlib import pyplot
from tokenizers import Tokenizer, models
from trl import SFTConfig, SFTTrainer

from hf_sparse_moe import RoutingMonitor, SparseMoeDecoderConfig, add_leading_callback


COEFFICIENTS = {"without balance loss": 0.0, "carried by the outputs, coefficient 0.02": 0.02}
LENGTH, BATCH = 64, 16
SIZES = {"vocab_size": 256, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 4}


def rows(number: int) -> Dataset:
    """The first bytes of Python's modules."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in modules)), dtype=torch.uint8)
    return Dataset.from_dict({"input_ids": data[: number * LENGTH].long().view(number, LENGTH).tolist()})


def max_violation(coefficient: float, steps: int) -> tuple[list[int], list[float], float]:
    """Steps, the MaxVio at each, and the last loss."""
    torch.manual_seed(0)
    dense = hf.Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=4)
    config = SparseMoeDecoderConfig.from_dense(dense, num_experts=8, router_aux_loss_coef=coefficient)
    vocabulary = {chr(number): number for number in range(256)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="\0"))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=3e-3, logging_steps=10,
            report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=hf.AutoModelForCausalLM.from_config(config),
            args=arguments,
            train_dataset=rows(steps * BATCH),
            processing_class=hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="\0", eos_token="\1"),
        )
        add_leading_callback(trainer, RoutingMonitor())
        trainer.train()
    logs = [log for log in trainer.state.log_history if "router/max_violation" in log]
    return [log["step"] for log in logs], [log["router/max_violation"] for log in logs], logs[-1]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    figure, axes = pyplot.subplots(figsize=(6, 3))
    for name, coefficient in COEFFICIENTS.items():
        at, values, loss = max_violation(coefficient, steps)
        axes.plot(at, values, label=name)
        print(f"{name}: MaxVio {values[-1]:.2f}, loss {loss:.3f}")
    axes.set(xlabel="step", ylabel="MaxVio (3 is collapse)", ylim=(0, 3))
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "balance_outside_loss.png", dpi=110)


if __name__ == "__main__":
    main()
