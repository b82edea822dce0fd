"""DeepSpeed's own function puts ZeRO's partitions together; what it gives becomes a normal checkpoint."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Trainer, TrainingArguments

from distributed.recovery_runs import collate, final_weights, finish, make_rows
from distributed.test_consolidate import Hostile, assert_same, loaded
from hf_sparse_moe.distributed.checkpoint import checkpoint_damage
from hf_sparse_moe.distributed.consolidation import consolidate
from processes import in_processes
from tiny_models import tiny_sparse


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
BIAS = {"scoring_func": "sigmoid"}


class Gathered:
    """As DeepSpeed's lazy mode gives a parameter: put together when it is asked for."""

    def __init__(self, tensor):
        self.shape, self.dtype, self.contiguous = tensor.shape, tensor.dtype, tensor.clone


@pytest.fixture
def checkpoint(tmp_path):
    """A folder that looks like one of DeepSpeed's, and the model that is to be in it; the encoder's head is tied."""
    model = tiny_sparse("encoder", **BIAS)
    folder = tmp_path / "zero"
    (folder / "global_step7").mkdir(parents=True)
    (folder / "latest").write_text("global_step7")
    model.config.save_pretrained(folder)
    return folder, model


def use(monkeypatch, read):
    """Let `consolidate` find modules of DeepSpeed whose reader of checkpoints is `read`."""
    for name, contents in {
        "deepspeed.runtime.fp16.loss_scaler": {"DynamicLossScaler": int, "LossScaler": int},
        "deepspeed.runtime.zero.config": {"ZeroStageEnum": int},
        "deepspeed.utils.tensor_fragment": {"fragment_address": int},
        "deepspeed.utils.zero_to_fp32": {"get_fp32_state_dict_from_zero_checkpoint": read},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def test_what_deepspeed_reads_is_written_as_a_normal_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    folder, model = checkpoint

    def read(path, lazy_mode):
        assert (path, lazy_mode) == (str(folder), True)
        print("Processing zero checkpoint")
        return {name: Gathered(value) for name, value in model.state_dict().items()}

    use(monkeypatch, read)
    done = consolidate(folder, tmp_path / "model", max_shard_size="20KB")
    assert done.engine == "DeepSpeed ZeRO"
    assert_same(loaded(tmp_path / "model"), model.state_dict())
    assert "Processing" not in capsys.readouterr().out  # it is the place of `--json`


def test_a_pickle_that_would_run_code(checkpoint, tmp_path, monkeypatch):
    """DeepSpeed asks torch to run it."""
    folder, _ = checkpoint
    torch.save({"optimizer_state_dict": Hostile()}, folder / "states.pt")
    use(monkeypatch, lambda path, lazy_mode: torch.load(folder / "states.pt", weights_only=False))
    with pytest.raises(ValueError, match="could run code when it is read"):
        consolidate(folder, tmp_path / "model")
    assert not Path("/tmp/never made by a consolidation").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("error", [KeyError("param_shapes"), FileNotFoundError("no files"), AssertionError()])
def test_what_deepspeed_cannot_read_is_told_in_one_sentence(error, checkpoint, tmp_path, monkeypatch):
    def read(path, lazy_mode):
        raise error

    use(monkeypatch, read)
    with pytest.raises(ValueError, match="incomplete or corrupt"):
        consolidate(checkpoint[0], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_deepspeed(checkpoint, tmp_path, monkeypatch):
    for name in ("deepspeed", "deepspeed.utils.zero_to_fp32"):  # another test may have imported it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"is a checkpoint of DeepSpeed\. Run: pip install deepspeed"):
        consolidate(checkpoint[0], tmp_path / "model")


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
