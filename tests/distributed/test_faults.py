"""What goes wrong on one rank, or with a checkpoint, ends in a clear error on every rank, and costs no checkpoint."""

import json
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import distributed
from transformers import TrainerCallback, TrainingArguments

from distributed.recovery_runs import STEPS, Run, collate, facts, final_weights, finish, make_trainer, train
from hf_sparse_moe.distributed.checkpoint import find_last_checkpoint
from hf_sparse_moe.distributed.stored_weights import check_same_model
from processes import in_processes
from recipe.launch import apply_timeout, check_same_everywhere
from tiny_models import FAMILIES, tiny_sparse, without_dropout


TIMEOUT = 10  # seconds
FULL = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def tell(folder: Path, function: Callable, *arguments, **named) -> None:
    """Call a function that must fail, and leave its error in `folder`; for the processes of other ranks."""
    with pytest.raises((ValueError, OSError, RuntimeError)) as error:
        function(*arguments, **named)
    (folder / f"error-{rank()}.txt").write_text(str(error.value))


def told(folder: Path, number: int) -> str:
    return (folder / f"error-{number}.txt").read_text()


# ---- a rank that hangs --------------------------------------------------------------------------------------------


class Hang(TrainerCallback):
    """Rank 1 stands still in step 3, until rank 0 has ended in an error."""

    def __init__(self, error: Path):
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        while state.global_step == 3 and args.process_index == 1 and not self.error.exists():
            time.sleep(0.1)


def train_beside_a_rank_that_hangs(run: Run, folder: Path) -> None:
    trainer = make_trainer(run, folder, [Hang(folder / "error-0.txt")])
    apply_timeout(trainer.args)
    tell(folder, trainer.train)


def test_a_rank_that_hangs_is_noticed_by_the_others(tmp_path):
    run = Run("decoder", "ddp", 2, arguments={"ddp_timeout": TIMEOUT})
    assert in_processes(2, train_beside_a_rank_that_hangs, run, tmp_path) == [0, 0]
    assert f"Timed out waiting {TIMEOUT}000ms" in told(tmp_path, 0)
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


# ---- a rank without tokens ----------------------------------------------------------------------------------------


def train_with_pads(run: Run, folder: Path) -> None:
    """Of every eight rows the third and fourth are pads: those of rank 1, every other step."""
    trainer = make_trainer(run, folder)
    without_dropout(trainer.model)
    for number, row in enumerate(trainer.train_dataset):
        if number % 8 in (2, 3):
            row["labels"] = torch.full_like(row["labels"], -100)
            row["attention_mask"] = torch.zeros_like(row["attention_mask"])
    trainer.train()
    finish(trainer, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_with_nothing_but_pads_changes_no_numbers(family, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = {
        "fields": {"balance_scope": "global_batch"},
        "arguments": {
            "gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential", "save_strategy": "no",
            "logging_steps": 1,
        },
    }  # fmt: skip
    train_with_pads(Run(family, **options), one)
    assert in_processes(2, train_with_pads, Run(family, "ddp", 2, **options), two) == [0, 0]
    assert facts(two)["world_size"] == 2
    for name, digits in (("loss", 1e-5), ("aux_loss", 1e-5), ("grad_norm", 1e-4)):
        expected, found = ([line[name] for line in facts(folder)["log"] if name in line] for folder in (one, two))
        assert len(expected) == STEPS
        assert found == pytest.approx(expected, rel=digits)


def train_with_an_empty_batch(folder: Path) -> None:
    trainer = make_trainer(Run("decoder", "ddp", 2), folder)
    trainer.data_collator = lambda rows: {name: value[: 2 * (1 - rank())] for name, value in collate(rows).items()}
    tell(folder, trainer.train)


def test_a_rank_without_rows_is_told_what_to_give(tmp_path):
    assert in_processes(2, train_with_an_empty_batch, tmp_path) == [0, 0]
    assert "by peer" in told(tmp_path, 0)  # closed, or reset
    assert "The batch holds no rows. Where a rank may have none, give it a row of pads" in told(tmp_path, 1)


# ---- ranks that differ --------------------------------------------------------------------------------------------


def train_with_other_versions(folder: Path) -> None:
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[])
    if rank() == 1:
        (folder / "peft-99.0.dist-info").mkdir()
        (folder / "peft-99.0.dist-info" / "METADATA").write_text("Name: peft\nVersion: 99.0\n")
        sys.path.insert(0, str(folder))
    tell(folder, check_same_everywhere, args)


def train_with_other_configs(folder: Path) -> None:
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[])
    config = tiny_sparse("decoder", num_experts_per_tok=2 + rank()).config
    tell(folder, check_same_everywhere, args, model=config)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (train_with_other_versions, rf"The ranks differ in `version of peft`: {version('peft')} on rank 0, 99.0 on"),
        (train_with_other_configs, r"The ranks differ in `model.num_experts_per_tok`: 2 on rank 0, 3 on rank 1"),
    ],
)
def test_ranks_that_differ_are_all_told(function, sentence, tmp_path):
    assert in_processes(2, function, tmp_path) == [0, 0]
    assert sentence in told(tmp_path, 0)
    assert told(tmp_path, 1) == told(tmp_path, 0)


# ---- a full disk --------------------------------------------------------------------------------------------------


class FillDisk(TrainerCallback):
    """After step 3 no file can grow over 10 kB, which is an error like that of a full disk."""

    def __init__(self, ranks: tuple[int, ...]):
        self.ranks = ranks

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index in self.ranks:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def train_on_a_disk_that_fills(run: Run, folder: Path, ranks: tuple[int, ...]) -> None:
    tell(folder, make_trainer(run, folder, [FillDisk(ranks)]).train)


@pytest.mark.parametrize(
    ("engine", "arguments", "ranks"),
    [("ddp", {}, (0,)), ("fsdp2", {}, (1,)), ("fsdp2", FULL, (0,))],
    ids=["ddp", "fsdp2", "fsdp2-gathered"],
)
def test_a_full_disk_is_told_and_ends_every_rank(engine, arguments, ranks, tmp_path):
    run = Run("decoder", engine, 2, arguments=arguments)
    assert in_processes(2, train_on_a_disk_that_fills, run, tmp_path, ranks) == [0, 0]
    for number in (0, 1):
        full = "checkpoint-4` is full" in told(tmp_path, number)
        assert full or (number not in ranks and "peer" in told(tmp_path, number))
    last = find_last_checkpoint(tmp_path)
    assert last == str(tmp_path / "checkpoint-2")
    check_same_model(tiny_sparse("decoder"), last)
    with pytest.raises(ValueError, match=r"is of another model: its .* of shape \(4, .* is \(8, .* in the model"):
        check_same_model(tiny_sparse("decoder", num_experts=8), last)


# ---- a checkpoint of another model --------------------------------------------------------------------------------


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    tiny_sparse("t5").save_pretrained(tmp_path / "whole")
    adapted = make_trainer(Run("decoder", lora=True), tmp_path / "out").model
    adapted.save_pretrained(tmp_path / "adapter")
    check_same_model(tiny_sparse("t5"), tmp_path / "whole")  # its tied weights are saved once
    check_same_model(adapted, tmp_path / "adapter")
    for other, folder, reason in (
        (tiny_sparse("bert"), "whole", "is nowhere in the model"),
        (tiny_sparse("t5", num_shared_experts=1), "whole", "it lacks `.*shared_experts"),
        (tiny_sparse("decoder"), "adapter", "it holds an adapter, and the model has none"),
        (make_trainer(Run("encoder", lora=True), tmp_path / "out").model, "adapter", "is nowhere in the model"),
    ):
        with pytest.raises(ValueError, match=rf"is of another model: .*{reason}"):
            check_same_model(other, tmp_path / folder)


# ---- the end of a training, and what FSDP2 leaves ------------------------------------------------------------------


def test_a_training_that_is_over_takes_no_step_more(tmp_path):
    """Also where its last step is in the middle of an epoch, as here."""
    run = Run("decoder", fields={"scoring_func": "sigmoid"}, arguments={"lr_scheduler_type": "constant"})
    train(run, tmp_path)
    weights = final_weights(tmp_path)
    last = find_last_checkpoint(tmp_path)
    assert last == str(tmp_path / f"checkpoint-{STEPS}")
    train(run, tmp_path, resume=last)
    assert all(torch.equal(value, final_weights(tmp_path)[name]) for name, value in weights.items())
    assert [line["step"] for line in facts(tmp_path)["log"] if "loss" in line][-1] == STEPS


def test_what_fsdp_wraps_is_saved_as_itself(tmp_path):
    """torch makes a class of its own of it, whose name and code the checkpoint would carry."""
    run = Run("decoder", "fsdp2", 2, arguments=FULL | {"max_steps": 2})
    assert in_processes(2, train, run, tmp_path / "wrapped") == [0, 0]
    assert facts(tmp_path / "wrapped")["wrapper"] == "FSDPSparseMoeDecoderForCausalLM"
    tiny_sparse("decoder").save_pretrained(tmp_path / "alone")
    checkpoint, alone = tmp_path / "wrapped" / "checkpoint-2", tmp_path / "alone"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (checkpoint, alone)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert {path.name for path in checkpoint.glob("*.py")} == {path.name for path in alone.glob("*.py")}


# ---- a port in use ------------------------------------------------------------------------------------------------


def test_a_port_in_use_stops_torchrun_before_it_starts_a_rank(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(f"open({str(tmp_path / 'started')!r}, 'w')")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        line = ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}", str(script)]
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *line], capture_output=True, text=True, timeout=60
        )
    assert result.returncode != 0
    assert f"port: {port}" in result.stderr
    assert "address already in use" in result.stderr
    assert not (tmp_path / "started").exists()
