"""Small trainings in processes of their own: as one process, as ranks of DDP or of FSDP2, and killed at any moment."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

from hf_sparse_moe import expert_lora_config
from hf_sparse_moe.distributed.checkpoint import keep_checkpoints_whole
from hf_sparse_moe.routing import RoutingMonitor, SelectionBiasCallback, add_leading_callback
from models.balance_worker import collate
from processes import kill_at_file
from tiny_models import tiny_inputs, tiny_sparse


ROWS, STEPS, SAVE_STEPS = 28, 7, 2  # 7 micro-batches of 4 an epoch: step 4 ends one, with one micro-batch


@dataclass(frozen=True)
class Run:
    """
    A training. `engine` is "one" (process), "ddp" or "fsdp2"; `lora` trains adapters on experts alone; `fields` are
    the config's, `arguments` those of Trainer.
    """

    family: str = "decoder"
    engine: str = "one"
    ranks: int = 1
    lora: bool = False
    fields: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.family, self.engine, *(["lora"] if self.lora else []), *map(str, self.arguments)])


class Kill(TrainerCallback, ExportableState):
    """
    SIGKILL to this process when it comes to a moment of a step: "forward" (of the first micro-batch), "step", or
    "save", when a checkpoint lacks nothing but `trainer_state.json`.
    """

    def __init__(self, step: int, moment: str, ranks: tuple[int, ...] = (0, 1)):
        self.step, self.moment, self.ranks = step, moment, ranks
        self.steps_seen = 0

    def _at(self, moment, args, state):
        self.steps_seen = state.global_step
        if (moment, state.global_step) == (self.moment, self.step) and args.process_index in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_substep_end(self, args, state, control, **kwargs):
        self._at("forward", args, state)

    def on_step_end(self, args, state, control, **kwargs):
        self._at("step", args, state)

    def state(self):
        if (self.moment, self.steps_seen) == ("save", self.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"args": {}, "attributes": {}}


def make_trainer(run: Run, folder: Path, callbacks=(), whole: bool = True) -> Trainer:
    """
    A trainer with dropout, shuffled rows of unequal lengths, two micro-batches a step, a falling learning rate, the
    routers' monitor, and the selection bias where there is one.
    """
    set_seed(0)
    engine = {"accelerator_config": {"use_configured_state": True}} if run.engine == "fsdp2" else {}
    if engine:
        _fsdp_on_cpu()
        engine |= {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    defaults = {
        "per_device_train_batch_size": 4 // run.ranks, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "save_strategy": "steps", "save_steps": SAVE_STEPS, "logging_steps": 3, "learning_rate": 1e-2,
        "warmup_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1, **engine,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **run.arguments})
    model = tiny_sparse(run.family, **{"router_aux_loss_coef": 0.1, **run.fields})
    rows = make_rows(model)
    if run.lora:
        model = get_peft_model(model, expert_lora_config(model, r=2, lora_alpha=4, lora_dropout=0.1))
    biased = run.fields.get("scoring_func") == "sigmoid" and not run.lora
    callbacks = [*([SelectionBiasCallback(0.01)] if biased else []), *callbacks]
    trainer = Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], data_collator=collate, callbacks=callbacks
    )
    add_leading_callback(trainer, RoutingMonitor(log_layers=True))
    if whole:
        keep_checkpoints_whole(trainer)
    return trainer


def make_rows(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    inputs = tiny_inputs(model, batch=ROWS, length=12)
    return [{name: value[row, : 5 + row % 8] for name, value in inputs.items()} for row in range(ROWS)]


def _fsdp_on_cpu() -> None:
    """accelerate shards with FSDP only where it sees GPUs: on CPUs it becomes DDP, without a word."""
    os.environ.setdefault("LOCAL_RANK", "0")
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def train(
    run: Run, folder: Path, resume: str | None = None, kill: Kill | None = None, kill_at: int | None = None
) -> None:
    """
    Train as one of the ranks; rank 0 leaves the final weights, the log and the wrapper's class in `folder`. `kill_at`
    is the number of a file, see [`kill_at_file`].
    """
    if kill_at is not None:
        kill_at_file(folder, kill_at)
    trainer = make_trainer(run, folder, [kill] if kill else [])
    trainer.train(resume_from_checkpoint=resume)
    finish(trainer, folder)


def finish(trainer: Trainer, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Every rank calls it; `weights` are gathered unless given."""
    weights = weights or trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        facts = {
            "wrapper": type(trainer.model_wrapped).__name__,
            "world_size": trainer.args.world_size,
            "log": trainer.state.log_history,
        }
        (folder / "facts.json").write_text(json.dumps(facts))
        torch.save({name: value.clone() for name, value in weights.items()}, folder / "final.pt")


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "final.pt")


def facts(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint of one process or of DDP."""
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(folder / name)
