"""`load_best_model_at_end` ends with the best model, of every family, engine and with adapters."""

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from distributed.recovery_runs import Run, finish, make_trainer
from processes import in_processes
from tiny_models import FAMILIES


BEST = {
    "load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1,
    "save_steps": 1, "save_total_limit": 1, "max_steps": 4, "warmup_steps": 0,
    "greater_is_better": True,  # the loss falls, so that an early model is "the best"
}  # fmt: skip
BIAS = {"scoring_func": "sigmoid"}
RUNS = [Run(family, fields=BIAS, arguments=BEST) for family in FAMILIES]
RUNS += [
    Run("decoder", lora=True, arguments=BEST),
    Run("decoder", "ddp", 2, fields=BIAS, arguments=BEST),
    Run("decoder", "fsdp2", 2, fields=BIAS, arguments=BEST),
]


class KeepWeights(TrainerCallback):
    """The weights after every step, on rank 0."""

    def __init__(self):
        self.trainer, self.after = None, {}

    def on_step_end(self, args, state, control, **kwargs):
        weights = self.trainer.accelerator.get_state_dict(self.trainer.model)
        self.after[state.global_step] = {name: value.clone() for name, value in weights.items()}


def train_for_the_best(run: Run, folder: Path) -> None:
    kept = KeepWeights()
    trainer = kept.trainer = make_trainer(run, folder, [kept])
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    finish(trainer, folder)
    if trainer.is_world_process_zero():
        torch.save(kept.after, folder / "after.pt")
        state = trainer.state
        (folder / "best.json").write_text(
            json.dumps({"step": state.best_global_step, "metric": state.best_metric, "loss": loss})
        )


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.family}-{run.engine}{'-lora' * run.lora}")
def test_the_best_model_comes_back_bit_for_bit(run, tmp_path):
    assert in_processes(run.ranks, train_for_the_best, run, tmp_path) == [0] * run.ranks
    best = json.loads((tmp_path / "best.json").read_text())
    after, final = torch.load(tmp_path / "after.pt"), torch.load(tmp_path / "final.pt")
    assert best["step"] < max(after)  # else nothing was to be loaded
    assert best["loss"] == best["metric"]
    moved = 0
    for name, value in final.items():
        assert torch.equal(value, after[best["step"]][name]), name
        moved += not torch.equal(value, after[max(after)][name])
    assert moved > 0
