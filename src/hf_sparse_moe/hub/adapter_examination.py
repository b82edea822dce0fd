"""What [`doctor`] finds out about an adapter, on its base, in the process that loads both. Runs no code of either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .adapter_base import base_difference, read_base
from .adapter_folder import ADAPTER_WEIGHTS, check_adapter
from .adapter_loading import Attachment, attach
from .adapter_publish import load_base
from .findings import FAILED, NOT_CHECKED, PASSED, WARNING, Finding, some
from .fingerprint import TOLERANCE, compare_fingerprint, fingerprint_difference, probe_output, take_fingerprint


ROUNDING = 2e-6  # of the largest output: an adapter of zeros takes another way to the same sums


def examine_adapter(folder: Path, base: Path) -> list[Finding]:
    """
    Load an adapter onto its base and look at everything that can be seen of both.

    Args:
        folder (`Path`): Of the adapter.
        base (`Path`): The folder of the base.
    """
    try:
        check_adapter(folder, folder.name)
        model = load_base(base)
        alone = probe_output(model)
        identity = _identity(read_base(folder), model)
        loaded, attachment = attach(model, folder)
    except (ValueError, OSError, ImportError) as error:
        return [Finding("loads", FAILED, " ".join(str(error).split()))]
    taken = take_fingerprint(loaded, folder)
    both = probe_output(loaded)
    return [
        Finding("loads", PASSED, f"{type(loaded).__name__} on {type(model).__name__}."),
        identity,
        _attached(attachment),
        _finite(folder),
        _changes(alone, both),
        compare_fingerprint(folder, taken),
        _plain(loaded.unload(), folder, taken),
    ]


def _identity(recorded: Mapping[str, Any], model: PreTrainedModel) -> Finding:
    check = "base is its own"
    if not recorded:
        return Finding(check, NOT_CHECKED, "It has no adapter_base.json; a push writes it.")
    if difference := base_difference(recorded, model):
        return Finding(check, FAILED, f"{difference[0].upper()}{difference[1:]}.")
    layers, others = len(recorded["layers"]), len(recorded.get("weights", ()))
    return Finding(check, PASSED, f"Its {layers} sparse layers and {others} other weights are those recorded.")


def _attached(attachment: Attachment) -> Finding:
    check = "every tensor attached"
    if told := attachment.fault():
        return Finding(check, FAILED, f"{told[0].upper()}{told[1:]}.")
    return Finding(check, PASSED, f"{len(attachment.attached)} tensors, none drawn at random.")


def _finite(folder: Path) -> Finding:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        return Finding("every tensor finite", FAILED, f"NaN or infinite numbers in {len(broken)}: {some(broken)}.")
    return Finding("every tensor finite", PASSED, "No NaN, nothing infinite.")


def _changes(alone: torch.Tensor, both: torch.Tensor) -> Finding:
    check = "outputs change"
    share = ((both - alone).abs().max() / alone.abs().max()).item()
    if share <= ROUNDING:
        return Finding(check, FAILED, "Base and adapter compute what the base computes alone.")
    return Finding(check, PASSED, f"By up to {share:.1e} of the base's largest output, on 32 tokens.")


def _plain(model: Any, folder: Path, taken: dict[str, Any]) -> Finding:
    check = "plain PEFT computes the same"
    try:
        loaded, _ = attach(model, folder, plain=True)
    except ValueError as error:
        return Finding(check, WARNING, " ".join(str(error).split()))
    difference = fingerprint_difference(taken, take_fingerprint(loaded, folder))
    verdict = PASSED if difference <= TOLERANCE else FAILED
    return Finding(check, verdict, f"Largest difference {difference:.1e} of the largest output.")
