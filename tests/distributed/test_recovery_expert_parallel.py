"""Expert parallelism is saved and goes on: bit for bit in its own layout, to 1e-5 in another one."""

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

import hf_sparse_moe
from distributed.recovery_runs import Kill, collate, facts, finish, make_rows
from distributed.test_consolidate import assert_same, loaded
from hf_sparse_moe.distributed.checkpoint import find_last_checkpoint, keep_checkpoints_whole
from hf_sparse_moe.distributed.consolidation import consolidate
from hf_sparse_moe.distributed.resume import ResumableTrainer
from hf_sparse_moe.routing import SelectionBiasCallback
from processes import in_processes
from tiny_models import tiny_sparse


EXPERTS, FSDP = {"fsdp_size": 2, "ep_size": 2}, {"fsdp_size": 2}


def train(start: Path, folder: Path, sizes: dict, resume: str | None = None, kill: Kill | None = None) -> None:
    set_seed(0)
    torch.distributed.init_process_group("gloo")
    model = hf_sparse_moe.SparseMoeDecoderForCausalLM.from_pretrained(
        start, distributed_config=DistributedConfig(**sizes)
    )
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=6, save_steps=2, logging_steps=1, learning_rate=1e-2,
        warmup_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, seed=1,
    )  # fmt: skip
    callbacks = [SelectionBiasCallback(0.01), *([kill] if kill else [])]
    trainer = ResumableTrainer(model, args, train_dataset=make_rows(model), data_collator=collate, callbacks=callbacks)
    keep_checkpoints_whole(trainer)
    trainer.train(resume_from_checkpoint=resume)
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    finish(trainer, folder, weights)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    fields = {"scoring_func": "sigmoid", "router_aux_loss_coef": 0.1, "balance_scope": "global_batch"}
    tiny_sparse("decoder", **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert in_processes(2, train, start, folder, EXPERTS) == [0, 0]
    return folder


@pytest.mark.parametrize("sizes", [EXPERTS, FSDP], ids=["experts", "fsdp"])
def test_killed_and_resumed(sizes, start, whole, tmp_path):
    codes = in_processes(2, train, start, tmp_path, EXPERTS, kill=Kill(5, "step"))
    assert codes == [-signal.SIGKILL] * 2
    last = find_last_checkpoint(tmp_path)
    assert os.path.basename(last) == "checkpoint-4"
    assert not (tmp_path / "checkpoint-4" / "model.safetensors").exists()  # nobody holds the whole model
    assert in_processes(2, train, start, tmp_path, sizes, resume=last) == [0, 0]
    expected, found = torch.load(whole / "final.pt"), torch.load(tmp_path / "final.pt")
    if sizes == EXPERTS:
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    losses = [[line["loss"] for line in facts(folder)["log"] if "loss" in line] for folder in (whole, tmp_path)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_its_checkpoint_is_consolidated(whole, tmp_path):
    consolidate(whole / "checkpoint-6", tmp_path / "model")
    assert_same(loaded(tmp_path / "model"), torch.load(whole / "final.pt"))


def test_a_model_of_one_process_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not spread over the ranks.*distributed_config"):
        ResumableTrainer(tiny_sparse("decoder"), TrainingArguments(str(tmp_path), use_cpu=True))
