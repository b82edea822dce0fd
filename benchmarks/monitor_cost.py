"""
What does `RoutingMonitor` cost? Step times of the same training with it and without.

    python benchmarks/monitor_cost.py

A Trainer trains a decoder of 8 experts by turns of a few optimizer steps. Each turn with the monitor is compared with
the one without that ran right beside it, in changing order, so that a busy machine slows both. Every turn ends with a
log, so that the read and the all-reduce are in it. Prints medians, and what the callback's own code takes: exact on a
CPU, where the step times of a busy machine may differ by more than that.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import Qwen3Config, Trainer, TrainerCallback, TrainingArguments

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
from hf_sparse_moe.routing import RoutingMonitor, SelectionBiasCallback, add_leading_callback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch, in sequences of 256")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a turn, and between logs")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, which other programs disturb less")
    parser.add_argument("--bias", action="store_true", help="measure SelectionBiasCallback in its place")
    options = parser.parse_args()
    read = time.process_time if options.cpu_time else time.perf_counter
    what = "SelectionBiasCallback" if options.bias else "RoutingMonitor"
    print(f"\n{what}\n")
    print("| hidden | layers | experts | tokens a step | step, ms | with it, ms | cost, middle half | its own code |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for hidden in options.hidden:
        own_seconds = [0.0]
        trainer = make_trainer(options, hidden)  # one for both: two models' memory may differ by more than the cost
        callback = SelectionBiasCallback(update_speed=1e-3) if options.bias else RoutingMonitor(log_layers=True)
        names = ["_add", "_update"] if options.bias else ["_add_calls", "_add_losses", "on_log"]
        timed(callback, names, read, own_seconds)
        for watcher in (None, callback):  # memory, compiled kernels
            turn(trainer, read, watcher)
        times: list[tuple[float, float]] = []
        for number in range(options.turns):
            order = (None, callback) if number % 2 else (callback, None)
            seconds = {watcher: turn(trainer, read, watcher) for watcher in order}
            times.append((seconds[None], seconds[callback]))
        costs = [there / here - 1 for here, there in times]
        low, middle, high = statistics.quantiles(costs, n=4)
        without, with_it = (1000 * statistics.median(column) / options.steps for column in zip(*times, strict=True))
        own = 1000 * own_seconds[0] / ((options.turns + 1) * options.steps)
        print(
            f"| {hidden} | {options.layers} | {options.experts} | {options.tokens * options.accumulation:,} | "
            f"{without:.1f} | {with_it:.1f} | {middle:+.2%} ({low:+.2%} to {high:+.2%}) | "
            f"{own:.2f} ms, {own / without:.2%} |"
        )


def timed(callback: TrainerCallback, names: list[str], read: Callable[[], float], seconds: list[float]) -> None:
    """Add what these methods take to `seconds[0]`."""
    for name in names:
        method = getattr(callback, name)

        def call(*args, method=method, **kwargs):
            start = read()
            result = method(*args, **kwargs)
            seconds[0] += read() - start
            return result

        setattr(callback, name, call)


def make_trainer(options: argparse.Namespace, hidden: int) -> Trainer:
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
    return trainer


def turn(trainer: Trainer, read: Callable[[], float], watcher: TrainerCallback | None) -> float:
    """Seconds of the steps of one `train()`, from its first step's begin to its log."""
    clock = Clock(read)
    trainer.add_callback(clock)
    if watcher is not None:
        add_leading_callback(trainer, watcher)
    trainer.train()
    if watcher is not None:
        trainer.remove_callback(watcher)
    trainer.remove_callback(clock)
    return clock.seconds


class Clock(TrainerCallback):
    def __init__(self, read: Callable[[], float]):
        self.read = read

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._synchronize()
            self.start = self.read()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._synchronize()
            self.seconds = self.read() - self.start

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
