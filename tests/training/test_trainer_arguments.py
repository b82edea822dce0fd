"""Arguments of the stock Trainer, one by one: a mixture begins with its dense model's numbers, and resumes exactly."""

import os
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_sparse_moe import upcycle
from models.balance_worker import collate
from tiny_models import FAMILIES, tiny_dense, tiny_inputs, without_dropout


ROWS = 8
TABLE = {
    "eval_on_start": {"eval_on_start": True},
    "prediction_loss_only": {"prediction_loss_only": True},
    "full_determinism": {"full_determinism": True},
    "bf16_full_eval": {"bf16_full_eval": True},
    "fp16": {"fp16": True},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "save_only_model": {"save_only_model": True},
    "load_best_model_at_end": {"load_best_model_at_end": True, "eval_steps": 1, "greater_is_better": True},
    "include_for_metrics": {"include_for_metrics": ["inputs", "loss"]},
    "batch_eval_metrics": {"batch_eval_metrics": True},
}
# How near the numbers of both models come: in half precision other roundings add up.
TOLERANCES = {"fp16": 2e-2, "bf16_full_eval": 2e-2}
# Trainer saves no optimizer, or draws other batches for the second half of an epoch, of a dense model too.
RESUMES_NEARLY = ("save_only_model", "group_by_length")


def numbers(prediction, compute_result: bool = True) -> dict[str, float]:
    """What an evaluation hands to `compute_metrics`: how many parts, of which size, and the mean logit."""
    parts = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
    found = {"parts": len(parts), "size": parts[0].size if isinstance(parts[0], numpy.ndarray) else parts[0].numel()}
    found["inputs"] = prediction.inputs is not None
    return found | {"mean": float(parts[0].mean())}


def train(model: PreTrainedModel, folder: Path, resume: str | None = None, **arguments) -> Trainer:
    defaults = {
        "max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "logging_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1,
    }  # fmt: skip
    inputs = tiny_inputs(model, batch=ROWS, length=12)
    lengths = [12 if "torch_compile" in arguments else 6 + row % 4 for row in range(ROWS)]  # one shape, one graph
    rows = [{name: value[row, : lengths[row]] for name, value in inputs.items()} for row in range(ROWS)]
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**defaults, **arguments}),
        collate,
        rows,
        rows,
        compute_metrics=numbers,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(autouse=True)
def restored():
    """What `full_determinism` and `torch_compile` set for the whole process."""
    deterministic, filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    with patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch._dynamo.reset()


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """The losses before the weights of the two models part: of the first step, and of an evaluation before it."""
    kept = ("loss", "eval_loss", "eval_parts", "eval_size", "eval_mean", "eval_inputs")
    lines = [line for line in trainer.state.log_history if line["step"] == 0 or (line["step"] == 1 and "loss" in line)]
    return [{name: line[name] for name in kept if name in line} for line in lines]


def upcycled(dense: PreTrainedModel) -> PreTrainedModel:
    return without_dropout(upcycle(dense, num_experts=4, router_aux_loss_coef=0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [f if f == "decoder" else pytest.param(f, marks=pytest.mark.conformance) for f in FAMILIES]
)
def test_every_argument(family, tmp_path):
    for name, arguments in TABLE.items():
        dense, folder = without_dropout(tiny_dense(family)), tmp_path / name
        mixture = upcycled(dense)
        start = {key: value.clone() for key, value in mixture.state_dict().items()}
        arguments = {"eval_on_start": True, **arguments}
        expected, found = train(dense, folder / "dense", **arguments), train(mixture, folder / "mixture", **arguments)
        assert len(logged(found)) == 2, name
        for wanted, got in zip(logged(expected), logged(found), strict=True):
            assert got == pytest.approx(wanted, rel=TOLERANCES.get(name, 1e-4), abs=1e-3), name

        again = upcycled(tiny_dense(family))
        checkpoint = str(folder / "mixture" / "checkpoint-1")
        resumed = train(again, folder / "resumed", checkpoint, **{**arguments, "eval_on_start": False})
        assert resumed.state.global_step == 2
        trained, weights = found.model.state_dict(), resumed.model.state_dict()
        assert trained.keys() == weights.keys() == start.keys(), name
        assert any(not torch.equal(trained[key], start[key]) for key in start), name
        if name not in RESUMES_NEARLY:
            assert all(torch.equal(trained[key], weights[key]) for key in trained), name
        losses = [trainer.evaluate()["eval_loss"] for trainer in (found, resumed)]
        assert losses[0] == pytest.approx(losses[1], rel=0.1 if name in RESUMES_NEARLY else 1e-6), name
