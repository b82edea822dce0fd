"""ZeRO's partitions come together again: those that DeepSpeed writes, and the same laid out by hand."""

import sys
import types
from enum import IntEnum
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from distributed.recovery_runs import collate, final_weights, finish, make_rows
from distributed.test_consolidate import Hostile, assert_same, loaded
from hf_sparse_moe.distributed.checkpoint import checkpoint_damage
from hf_sparse_moe.distributed.consolidate import consolidate
from processes import in_processes
from tiny_models import tiny_sparse


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
BIAS = {"scoring_func": "sigmoid"}


class ZeroStageEnum(IntEnum):
    optimizer_states, gradients, weights = 1, 2, 3


class LossScaler:
    def __init__(self):
        self.cur_scale = 1.0


SAVED_TYPES = {"deepspeed.runtime.zero.config": ZeroStageEnum, "deepspeed.runtime.fp16.loss_scaler": LossScaler}


@pytest.fixture
def save(monkeypatch):
    """`torch.save` while the types above have the names that DeepSpeed saves them by."""

    def save_by_their_names(content, path):
        with monkeypatch.context() as patch:
            for name, saved in SAVED_TYPES.items():
                patch.setattr(saved, "__module__", name)
                words = name.split(".")
                for count in range(1, len(words) + 1):
                    package = ".".join(words[:count])
                    patch.setitem(sys.modules, package, sys.modules.get(package, types.ModuleType(package)))
                patch.setattr(sys.modules[name], saved.__name__, saved, raising=False)
            torch.save(content, path)

    return save_by_their_names


def write_zero(folder, model, stage, ranks, save, frozen=()):
    """As DeepSpeed 0.19 lays out a checkpoint; matrices and vectors in a group each, `frozen` ones apart."""
    parts = folder / "global_step7"
    parts.mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    model.config.save_pretrained(folder)
    trained = {name: value.detach() for name, value in model.named_parameters() if name not in frozen}
    held = {name: value.detach() for name, value in model.named_parameters() if name in frozen}
    groups = [{n: v for n, v in trained.items() if (v.dim() > 1) == matrices} for matrices in (True, False)]

    def part(value, rank):
        size = ceil(value.numel() / ranks)
        padded = torch.nn.functional.pad(value.flatten(), (0, ranks * size - value.numel()))
        return padded[rank * size : (rank + 1) * size].clone()

    for rank in range(ranks):
        states = {"zero_stage": ZeroStageEnum(stage), "partition_count": [ranks] * 2, "loss_scaler": LossScaler()}
        if stage == 3:
            states["fp32_flat_groups"] = [torch.cat([part(v, rank) for v in group.values()]) for group in groups]
        else:
            whole = [torch.cat([v.flatten() for v in group.values()]) for group in groups]
            states["single_partition_of_fp32_groups"] = [part(flat, rank) for flat in whole]
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00"
        save({"optimizer_state_dict": states}, parts / f"{name}_optim_states.pt")
        if stage == 3 or rank == 0:
            described = {
                "module": model.state_dict(),
                "buffer_names": [name for name, _ in model.named_buffers() if name in model.state_dict()],
                "param_shapes": [{name: value.shape for name, value in group.items()} for group in groups],
                "frozen_param_shapes": {name: value.shape for name, value in held.items()},
                "frozen_param_fragments": {n: part(v, rank) if stage == 3 else v for n, v in held.items()},
                "shared_params": {},
            }
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            save(described, parts / f"{name}_model_states.pt")


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_partitions_laid_out_by_hand(family, stage, ranks, save, tmp_path):
    """The encoder's head is tied; neither embeddings nor experts divide by three."""
    model = tiny_sparse(family, **BIAS)
    frozen = [name for name, _ in model.named_parameters() if "layer.0.attention" in name or "self_attn" in name]
    assert frozen
    write_zero(tmp_path / "zero", model, stage, ranks, save, frozen)
    done = consolidate(tmp_path / "zero", tmp_path / "model", max_shard_size="20KB")
    assert done.engine == "DeepSpeed ZeRO"
    assert_same(loaded(tmp_path / "model"), model.state_dict())


def break_off_a_rank(parts):
    sorted(parts.glob("*_optim_states.pt"))[-1].unlink()


def cut_short(parts):
    path = sorted(parts.glob("*_optim_states.pt"))[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def lose_a_group(parts):
    path = sorted(parts.glob("*_model_states.pt"))[0]
    states = torch.load(path)
    states["param_shapes"].pop()
    torch.save(states, path)


def lose_the_names(parts):
    path = sorted(parts.glob("*_model_states.pt"))[0]
    torch.save({"module": {}}, path)


@pytest.mark.parametrize("break_it", [break_off_a_rank, cut_short, lose_a_group, lose_the_names])
@pytest.mark.parametrize("stage", [2, 3])
def test_broken_partitions_are_refused(stage, break_it, save, tmp_path):
    write_zero(tmp_path / "zero", tiny_sparse("decoder"), stage, 2, save)
    break_it(tmp_path / "zero" / "global_step7")
    with pytest.raises(ValueError, match="incomplete or corrupt"):
        consolidate(tmp_path / "zero", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_pickle_that_would_run_code(save, tmp_path):
    write_zero(tmp_path / "zero", tiny_sparse("decoder"), 3, 1, save)
    torch.save({"optimizer_state_dict": Hostile()}, next((tmp_path / "zero").rglob("*_optim_states.pt")))
    with pytest.raises(ValueError, match="could run code when it is read"):
        consolidate(tmp_path / "zero", tmp_path / "model")
    assert not Path("/tmp/never made by a consolidation").exists()


def train_with_zero(stage: int, family: str, folder: Path) -> None:
    import deepspeed

    model = tiny_sparse(family, **BIAS)
    for block in model.sparse_blocks:
        block.gate.e_score_correction_bias.uniform_()
    args = TrainingArguments(
        str(folder), deepspeed=str(CONFIGS / f"zero{stage}.json"), per_device_train_batch_size=2, max_steps=2,
        save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    trainer = Trainer(model=model, args=args, train_dataset=make_rows(model), data_collator=collate)
    trainer.train()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        finish(trainer, folder, {name: value.detach().clone() for name, value in model.state_dict().items()})


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "family"), [(2, "decoder"), (3, "encoder")])
def test_partitions_of_deepspeed_itself(stage, family, tmp_path):
    assert in_processes(2, train_with_zero, stage, family, tmp_path / "run") == [0, 0]
    assert checkpoint_damage(tmp_path / "run" / "checkpoint-2") is None
    consolidate(tmp_path / "run" / "checkpoint-2", tmp_path / "model")
    assert_same(loaded(tmp_path / "model"), final_weights(tmp_path / "run"))
