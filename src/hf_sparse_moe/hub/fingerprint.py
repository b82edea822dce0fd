"""A fingerprint of what a checkpoint computes: outputs on one fixed sequence, to be compared wherever it arrives."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.config import sensible_config
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.hashes import source_files
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.experts.tuning import fixed_choice
from hf_sparse_moe.models.modeling_sparse_moe import SparseMoeEncoderForMultipleChoice
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers
from hf_sparse_moe.upcycling.receipt import probe_inputs

from .adapter_files import is_mixture, without_adapter


if TYPE_CHECKING:
    from peft import PeftModel

FINGERPRINT_NAME = "fingerprint.json"
SAMPLES = 256
# Of the largest output: float32 on another processor rounds otherwise, a wrong weight changes far more.
TOLERANCE = 1e-4
# Larger weights are not loaded by a push that does not ask for it.
LARGEST_BY_DEFAULT = 4 * 2**30


def is_wanted(fingerprint: bool | None, weight_bytes: int) -> bool:
    """What `fingerprint` of [`push`] means for weights of this size: None is up to 4 GiB."""
    return weight_bytes <= LARGEST_BY_DEFAULT if fingerprint is None else fingerprint


def fixed_inputs(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """The sequence of 32 tokens, as the model takes it: (B, S), or (B, choices, S) for multiple choice."""
    inputs = probe_inputs(model.config, model.device)
    has_choices = isinstance(without_adapter(model), SparseMoeEncoderForMultipleChoice)
    return {name: value.unsqueeze(1) for name, value in inputs.items()} if has_choices else inputs


@torch.no_grad()
def probe_output(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """The first output (logits, or last hidden states) on the fixed sequence."""
    with fixed_choice():
        return model(**fixed_inputs(model))[0]


def take_fingerprint(model: PreTrainedModel | PeftModel, folder: Path) -> dict[str, Any]:
    """
    What [`fingerprint_difference`] compares: evenly spaced outputs, and the hashes of the files that made them.
    The model, which was loaded from `folder`, must compute in float32, so that the order of sums matters least.
    """
    output = probe_output(model)
    flat = output.flatten()
    return {
        "class": type(model).__name__,
        "shape": list(output.shape),
        "dtype": str(output.dtype).removeprefix("torch."),
        "largest": output.abs().max().item(),
        "outputs": flat[torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).long()].tolist(),
        "files": source_files(folder),
    }


@torch.no_grad()
def compute_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """
    Have a model compute in float32 while its experts, nearly all of its size, stay as they are stored: those of a
    layer are widened while that layer runs. Changes `model`, which can then be used for inference only.
    """
    stored: set[int] = set()
    for layer in find_mixture_layers(model) if is_mixture(model) else ():
        weights = list(layer.experts.parameters())
        stored |= {id(weight) for weight in weights}
        layer.experts.register_forward_pre_hook(partial(_convert, torch.float32))
        layer.experts.register_forward_hook(partial(_convert, weights[0].dtype), always_call=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in stored:
            tensor.data = tensor.float()
    return model


def _convert(dtype: torch.dtype, module: nn.Module, *_: Any) -> None:
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)  # back again without a loss: it was stored so


def make_fingerprint(folder: Path, target: Path, take: bool = True) -> bool:
    """
    Write the fingerprint of a checkpoint to the file `target`: that in the folder, if it is of these very files, or
    else a new one if it may `take` one, for which the model is loaded as it is stored and computes in float32. Returns
    whether there is one. Raises a `ValueError` for weights that do not fill the model, or compute NaN.
    """
    fingerprint = read_fingerprint(folder)
    if fingerprint is None or fingerprint.get("files") != source_files(folder):
        if not take:
            return False
        with sensible_config(folder):
            fingerprint = take_fingerprint(compute_in_float32(load_whole(folder)), folder)
    write_fingerprint(fingerprint, target, folder)
    return True


def write_fingerprint(fingerprint: dict[str, Any], target: Path, folder: Path) -> None:
    """Write it to `target`. Raises a `ValueError` where the checkpoint in `folder` computes NaN."""
    if not _are_finite(fingerprint["outputs"]):
        raise ValueError(
            f"`{folder}` computes numbers that are not finite, so it is not published. Run "
            f"`hf-sparse-moe doctor {folder}`, which says where."
        )
    target.write_text(json.dumps(fingerprint) + "\n", encoding="utf-8")


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """The folder's fingerprint, or None where there is none or something else in its place."""
    try:
        value = read_json(folder / FINGERPRINT_NAME)
    except ValueError:
        return None
    return value if isinstance(value.get("outputs"), list) else None


def fingerprint_difference(recorded: dict[str, Any], taken: dict[str, Any]) -> float:
    """The largest difference of two fingerprints, relative to the largest output; infinite for what has no number."""
    there, here = recorded["outputs"], taken["outputs"]
    if recorded.get("shape") != taken["shape"] or len(there) != len(here) or not _are_finite([*there, *here]):
        return math.inf
    largest = max(abs(one - other) for one, other in zip(there, here, strict=True))
    return largest / taken["largest"] if taken["largest"] > 0 else largest


def _are_finite(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
