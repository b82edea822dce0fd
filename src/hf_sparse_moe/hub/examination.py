"""The checks of [`doctor`]. They run no code that came with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import hf_sparse_moe
from hf_sparse_moe import models
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.loading import fresh_tensors, load_checkpoint, load_whole
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles
from hf_sparse_moe.checkpoints.source import Source, weight_files
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME
from hf_sparse_moe.models.routers import Routing
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, find_mixture_layers, observe_routing
from hf_sparse_moe.stock.targets import EXPORT_TARGETS
from hf_sparse_moe.surgery.receipts import describe_operation

from .adapter_files import ADAPTER_WEIGHTS, base_difference, file_hashes, is_mixture, read_adapter
from .adapter_loading import attach, count_moved
from .checkpoint import mapping
from .fingerprint import (
    TOLERANCE,
    compute_in_float32,
    fingerprint_difference,
    fixed_inputs,
    probe_output,
    read_fingerprint,
    take_fingerprint,
)
from .publishable import code_files


PASSED, FAILED, WARNING, NOT_CHECKED = "passed", "failed", "warning", "not checked"
SATURATED = 0.999  # mean probability of one expert: no gradient is left to choose another
ROUNDING = 2e-6  # of the largest output: an adapter of zeros takes another way to the same sums
_LOADING_FAILS = (ValueError, OSError, ImportError, NotStreamableError)

Outcome = tuple[str, str]  # verdict and detail


@dataclass(frozen=True)
class Finding:
    """
    The outcome of one check.

    Args:
        check (`str`): What was asked.
        verdict (`str`): `"passed"`, `"failed"`, `"warning"` or `"not checked"`.
        detail (`str`): What was seen, in a sentence.
    """

    check: str
    verdict: str
    detail: str


def examine(folder: Path) -> tuple[list[Finding], dict[str, Any]]:
    """
    Load a checkpoint as it is stored and check everything that can be seen of it on this machine.

    Returns:
        the findings, and what a process that runs the checkpoint's own code needs to repeat the forward pass.
    """
    try:
        files = TensorFiles(weight_files(Source(folder.resolve().name, folder, None)))
        model, info = load_checkpoint(folder)
    except _LOADING_FAILS as error:
        return _findings({"loads": (FAILED, str(error))}), {}
    layers = find_mixture_layers(model) if is_mixture(model) else []
    routings: list[tuple[MixtureLayer, Routing]] = []
    with observe_routing(layers, lambda layer, routing: routings.append((layer, routing))):
        taken = take_fingerprint(compute_in_float32(model), folder)
    loads = f"{type(model).__name__}, {len(files.names)} tensors, {len(layers)} sparse layers."
    if model.config.model_type in {target.model_type for target in EXPORT_TARGETS}:
        loads += " A stock mixture: `hf-sparse-moe import-stock` reads it into this package's classes."
    if made := describe_operation(read_json(folder / RECEIPT_NAME, optional=True)):
        loads += f" Expert surgery: {', '.join(f'{name} {value}' for name, value in made.items())}."
    outcomes = {
        "loads": (PASSED, loads),
        "every tensor present": _present(info),
        "config and weights agree": _agree(folder, files, info),
        "every tensor finite": _finite(model.state_dict()),
        "tied weights tied": _tied(model),
        "experts differ": _experts(folder, layers),
        "routers choose": _routers(model, routings),
        "code for loading without the package": _code(folder),
        "outputs equal the fingerprint": _fingerprint(folder, taken),
    }
    inputs = {name: value.tolist() for name, value in fixed_inputs(model).items()}
    return _findings(outcomes), {"inputs": inputs, "fingerprint": taken}


def examine_adapter(folder: Path, base: Path) -> list[Finding]:
    """Load an adapter onto the base in another folder, and check everything that can be seen of both."""
    try:
        adapter = read_adapter(folder, folder.name)
        model = load_whole(base, torch.float32)
        alone = probe_output(model)
        difference = base_difference(adapter.base, file_hashes(base))
        adapted = attach(model, adapter)
    except _LOADING_FAILS as error:
        return _findings({"loads": (FAILED, str(error))})
    adapts, moved = count_moved(adapted)
    found = f"{adapts} of {adapts} adapted tensors found, {moved} moved" if adapts else "every tensor attached"
    taken = take_fingerprint(adapted, folder)
    share = ((probe_output(adapted) - alone).abs().max() / alone.abs().max()).item()
    outcomes = {
        "loads": (PASSED, f"On {type(adapted.get_base_model()).__name__}, {found}."),
        "base is its own": _verdict(difference, "It is the one that was recorded."),
        "every tensor finite": _finite(load_file(folder / ADAPTER_WEIGHTS)),
        "outputs change": (FAILED if share <= ROUNDING else PASSED, f"By up to {share:.1e} of the base's largest."),
        "outputs equal the fingerprint": _fingerprint(folder, taken),
    }
    if not adapter.base:
        outcomes["base is its own"] = NOT_CHECKED, "It has no adapter_base.json; a push writes it."
    try:
        plain = attach(adapted.unload(), adapter, plain=True)  # last: the adapter is taken off the model
        outcome = compare_outputs(take_fingerprint(plain, folder), taken, "to this package")
    except ValueError as error:
        outcome = WARNING, str(error)
    return _findings({**outcomes, "plain PEFT computes the same": outcome})


def compare_outputs(taken: dict[str, Any], other: dict[str, Any], against: str) -> Outcome:
    """Verdict and sentence for two fingerprints."""
    difference = fingerprint_difference(other, taken)
    detail = f"Largest difference {against}: {difference:.1e} of the largest output."
    return PASSED if difference <= TOLERANCE else FAILED, detail


def _findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    return [Finding(check, verdict, " ".join(detail.split())) for check, (verdict, detail) in outcomes.items()]


def _verdict(fault: str | None, passed: str) -> Outcome:
    return (FAILED, f"{fault[0].upper()}{fault[1:]}.") if fault else (PASSED, passed)


def _present(info: dict[str, Any]) -> Outcome:
    fresh = fresh_tensors(info)
    told = f"{len(fresh)} tensors are not in the files and were initialised at random: {_some(fresh)}"
    return _verdict(told if fresh else None, "All are in the files.")


def _agree(folder: Path, files: TensorFiles, info: dict[str, Any]) -> Outcome:
    if shapes := sorted(info["mismatched_keys"], key=lambda entry: entry[0]):
        name, stored, wanted = shapes[0]
        return FAILED, f"`{name}` has the shape {tuple(stored)}, the config asks for {tuple(wanted)}."
    if unused := sorted(info["unexpected_keys"]):
        return FAILED, f"{len(unused)} tensors have no place in the model: {_some(unused)}."
    dtypes = sorted({str(files.dtype(name)).removeprefix("torch.") for name in files.names})
    named = read_json(folder / "config.json").get("dtype")
    if named is not None and named not in dtypes:
        return WARNING, f"The config names {named}, the weights are {', '.join(dtypes)}."
    return PASSED, f"Shapes and names fit; stored as {', '.join(dtypes)}."


def _finite(tensors: Mapping[str, torch.Tensor]) -> Outcome:
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    return _verdict(f"NaN or infinity in {_some(broken)}" if broken else None, "No NaN, no infinity.")


def _tied(model: PreTrainedModel) -> Outcome:
    # What loading has tied is not the question: where the files hold two different ones, transformers unties them.
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apart = sorted(name for name, first in tied.items() if parameters.get(name) is not parameters.get(first))
    told = f"the config ties {_some(apart)} to another, but the files hold both" if apart else None
    return _verdict(told, f"Tied: {_some(sorted(tied)) or 'none'}.")


def _experts(folder: Path, layers: list[MixtureLayer]) -> Outcome:
    if not layers:
        return NOT_CHECKED, "No sparse layer."
    equal = [layer.name for layer in layers if layer.num_experts > 1 and _all_equal(layer)]
    try:
        arguments = mapping(read_json(folder / RECEIPT_NAME).get("arguments"))
    except ValueError:
        arguments = {}
    method = arguments.get("method")
    if equal and (method == "copy" or (method == "split" and arguments.get("granularity") == 1)):
        return PASSED, f"All are equal in {_some(equal)}, as the receipt says (method `{method}`)."
    told = f"all are equal in {_some(equal)}, and no receipt says that they were copied" if equal else None
    return _verdict(told, f"In all {len(layers)} sparse layers.")


def _all_equal(layer: MixtureLayer) -> bool:
    stacked = [weight for weight in layer.experts.parameters() if weight.dim() == 3]
    return bool(stacked) and all(bool((weight == weight[:1]).all()) for weight in stacked)


def _routers(model: PreTrainedModel, routings: list[tuple[MixtureLayer, Routing]]) -> Outcome:
    if not routings or getattr(model.config, "router_type", "top_k") == "hash":
        return NOT_CHECKED, "No router with weights was used."
    blind, saturated = [], []
    for layer, routing in routings:
        if layer.num_experts == 1:
            continue
        if not (routing.router_logits.float().std(dim=-1, unbiased=False) > 0).any():
            blind.append(layer.name)
        elif layer.probabilities(routing.router_logits).max(dim=-1).values.mean() > SATURATED:
            saturated.append(layer.name)
    if blind:
        return FAILED, f"All experts get the same score for every token in {_some(blind)}."
    if saturated:
        return FAILED, f"One expert has more than {SATURATED:.1%} of the mean probability in {_some(saturated)}."
    return PASSED, "None scores all experts alike, or is sure of one for every token, on 32 tokens."


def _code(folder: Path) -> Outcome:
    """The code that travels is read, never run here: is all of it there, and is it this package's?"""
    files, ours = code_files(folder), Path(models.__file__).parent
    if not files:
        return NOT_CHECKED, "None is needed: the config names no code."
    if missing := [name for name in files if not (folder / name).is_file()]:
        return FAILED, f"Not in the folder: {_some(missing)}."
    version = f"hf_sparse_moe {hf_sparse_moe.__version__}"
    own = [name for name in files if (ours / name).is_file()]
    same = [name for name in own if (folder / name).read_bytes() == (ours / name).read_bytes()]
    if different := sorted({*files} - {*same}):
        return WARNING, f"Not those of {version}: {_some(different)}."
    return PASSED, f"{len(files)} files, byte for byte those of {version}."


def _fingerprint(folder: Path, taken: dict[str, Any]) -> Outcome:
    recorded = read_fingerprint(folder)
    if recorded is None:
        return NOT_CHECKED, "There is no fingerprint.json; a push writes it."
    verdict, detail = compare_outputs(taken, recorded, "on 32 tokens")
    changed = " Its files have changed since." if recorded.get("files") != taken["files"] else ""
    return verdict, detail + changed


def _some(names: list[str], most: int = 3) -> str:
    more = "" if len(names) <= most else f" and {len(names) - most} more"
    return ", ".join(f"`{name}`" for name in names[:most]) + more
