"""
What does `RoutingMonitor` cost? Step times of the same training with it and without.

    python benchmarks/monitor_cost.py

Two Trainers train two equal decoders of 8 experts, in one process, by turns of a few optimizer steps. Each turn with
the monitor is compared with the one without that ran right beside it, in changing order, so that a busy machine
slows both. Every turn ends with a log, so that the read and the all-reduce are in it. Prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from transformers import Qwen3Config, Trainer, TrainerCallback, TrainingArguments

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
from hf_sparse_moe.train import RoutingMonitor, SelectionBiasCallback, add_leading_callback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, in sequences of 256")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn, and between logs")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--bias", action="store_true", help="measure SelectionBiasCallback in its place")
    options = parser.parse_args()
    what = "SelectionBiasCallback" if options.bias else "RoutingMonitor"
    print(f"\n| hidden | layers | experts | tokens a step | step, ms | with {what}, ms | cost | cost, middle half |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for hidden in options.hidden:
        plain, watched = make_trainer(options, hidden, False), make_trainer(options, hidden, True)
        for trainer in (plain, watched):  # memory, compiled kernels
            turn(trainer)
        times: list[tuple[float, float]] = []
        for number in range(options.turns):
            order = (plain, watched) if number % 2 else (watched, plain)
            seconds = {trainer: turn(trainer) for trainer in order}
            times.append((seconds[plain], seconds[watched]))
        costs = [there / here - 1 for here, there in times]
        low, _, high = statistics.quantiles(costs, n=4)
        without, with_it = (1000 * statistics.median(column) / options.steps for column in zip(*times, strict=True))
        print(
            f"| {hidden} | {options.layers} | {options.experts} | {options.tokens * options.accumulation:,} | "
            f"{without:.1f} | {with_it:.1f} | {statistics.median(costs):+.2%} | {low:+.2%} to {high:+.2%} |"
        )


def make_trainer(options: argparse.Namespace, hidden: int, watched: bool) -> Trainer:
    torch.manual_seed(0)
    dense = Qwen3Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
    )
    scoring = {"scoring_func": "sigmoid"} if options.bias else {}
    model = SparseMoeDecoderForCausalLM(
        SparseMoeDecoderConfig.from_dense(dense, num_experts=options.experts, **scoring)
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4096, (64, 256))]
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=max(options.tokens // 256, 1),
        gradient_accumulation_steps=options.accumulation,
        max_steps=options.steps,
        logging_steps=options.steps,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if "Printer" not in type(callback).__name__
    ]
    if watched and options.bias:
        trainer.add_callback(SelectionBiasCallback(update_speed=1e-3))
    elif watched:
        add_leading_callback(trainer, RoutingMonitor(log_layers=True))
    return trainer


def turn(trainer: Trainer) -> float:
    """Seconds of the steps of one `train()`, from its first step's begin to its log."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return clock.seconds


class Clock(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._synchronize()
            self.start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._synchronize()
            self.seconds = time.perf_counter() - self.start

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
