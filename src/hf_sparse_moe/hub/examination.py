"""
What [`doctor`] finds out about a checkpoint, in the process that loads it:
`python -m hf_sparse_moe.hub.examination FOLDER RESULT [BASE OF AN ADAPTER]`. Runs no code that came with the
checkpoint.
"""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_sparse_moe
from hf_sparse_moe import models
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles
from hf_sparse_moe.checkpoints.source import Source, weight_files
from hf_sparse_moe.models.routers import Routing
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, find_mixture_layers, observe_routing
from hf_sparse_moe.upcycling.receipt import probe_inputs

from .adapter_examination import examine_adapter
from .findings import FAILED, NOT_CHECKED, PASSED, WARNING, Finding, some
from .fingerprint import compare_fingerprint, take_fingerprint
from .loading import load_checkpoint


SATURATED = 0.999  # of the probability, on average, on one expert: no gradient is left to choose another


def examine(folder: Path) -> tuple[list[Finding], dict[str, Any]]:
    """
    Load a checkpoint and look at everything that can be seen of it on this machine.

    Returns:
        the findings, and what the process that runs the checkpoint's own code needs to repeat the forward pass.
    """
    try:
        files = TensorFiles(weight_files(Source(folder.resolve().name, folder, None)))
        model, info = load_checkpoint(folder, torch.float32)
    except (ValueError, OSError, ImportError, NotStreamableError) as error:
        return [Finding("loads", FAILED, " ".join(str(error).split()))], {}
    routings: list[tuple[MixtureLayer, Routing]] = []
    layers = _mixture_layers(model)
    with observe_routing(layers, lambda layer, routing: routings.append((layer, routing))):
        taken = take_fingerprint(model, folder)
    findings = [
        Finding("loads", PASSED, f"{type(model).__name__}, {len(files.names)} tensors, {len(layers)} sparse layers."),
        _all_present(info),
        _agree(folder, info, files),
        _finite(model),
        _tied(model),
        _experts(layers, folder),
        _routers(routings, model),
        _code(folder),
        compare_fingerprint(folder, taken),
    ]
    inputs = {name: value.tolist() for name, value in probe_inputs(model.config, model.device).items()}
    return findings, {"inputs": inputs, "fingerprint": taken}


def _mixture_layers(model: PreTrainedModel) -> list[MixtureLayer]:
    try:
        return find_mixture_layers(model)
    except ValueError:
        return []


def _all_present(info: dict[str, Any]) -> Finding:
    fresh = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if fresh:
        told = f"{len(fresh)} tensors are not in the files and were drawn at random: {some(fresh)}."
        return Finding("every tensor present", FAILED, told)
    return Finding("every tensor present", PASSED, "None was drawn at random.")


def _agree(folder: Path, info: dict[str, Any], files: TensorFiles) -> Finding:
    check = "config and weights agree"
    if shapes := sorted(info["mismatched_keys"], key=lambda entry: entry[0]):
        name, stored, wanted = shapes[0]
        return Finding(check, FAILED, f"`{name}` has the shape {tuple(stored)}, the config asks for {tuple(wanted)}.")
    if unused := sorted(info["unexpected_keys"]):
        return Finding(check, FAILED, f"{len(unused)} tensors have no place in the model: {some(unused)}.")
    stored = sorted({str(files.dtype(name)).removeprefix("torch.") for name in files.names})
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    if named is not None and named not in stored:
        return Finding(check, WARNING, f"The config names {named}, the weights are {', '.join(stored)}.")
    return Finding(check, PASSED, f"Shapes and names fit; stored as {', '.join(stored)}.")


def _finite(model: PreTrainedModel) -> Finding:
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        return Finding("every tensor finite", FAILED, f"NaN or infinite numbers in {len(broken)}: {some(broken)}.")
    return Finding("every tensor finite", PASSED, "No NaN, nothing infinite.")


def _tied(model: PreTrainedModel) -> Finding:
    # What loading has tied is not the question: where the files hold two different ones, transformers unties them.
    check, tied = "tied weights tied", model.get_expanded_tied_weights_keys(all_submodels=True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apart = sorted(name for name, first in tied.items() if parameters.get(name) is not parameters.get(first))
    if apart:
        return Finding(check, FAILED, f"The config ties {some(apart)} to another, but the files hold both.")
    return Finding(check, PASSED, f"Tied: {some(sorted(tied))}." if tied else "None is to be tied.")


def _experts(layers: list[MixtureLayer], folder: Path) -> Finding:
    check = "experts differ"
    equal = [layer.name for layer in layers if layer.num_experts > 1 and _all_equal(layer)]
    if not layers:
        return Finding(check, NOT_CHECKED, "No sparse layer.")
    if not equal:
        return Finding(check, PASSED, f"In all {len(layers)} sparse layers.")
    told = f"In {len(equal)} of {len(layers)} sparse layers all experts are equal"
    if _receipt_method(folder) == "copy":
        return Finding(check, PASSED, f"{told}, as the receipt says (method `copy`).")
    return Finding(check, FAILED, f"{told}, and no receipt says that they were copied: {some(equal)}.")


def _all_equal(layer: MixtureLayer) -> bool:
    stacked = [weight for weight in layer.experts.parameters() if weight.dim() == 3]
    return bool(stacked) and all(bool((weight == weight[:1]).all()) for weight in stacked)


def _receipt_method(folder: Path) -> object:
    try:
        receipt = json.loads((folder / models.pretrained_model.RECEIPT_NAME).read_text(encoding="utf-8"))
        return receipt["arguments"]["method"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _routers(routings: list[tuple[MixtureLayer, Routing]], model: PreTrainedModel) -> Finding:
    check = "routers choose"
    if not routings or getattr(model.config, "router_type", "top_k") == "hash":
        return Finding(check, NOT_CHECKED, "No router with weights was used.")
    blind, saturated, narrow, entropies = [], [], [], []
    for layer, routing in routings:
        probabilities = layer.probabilities(routing.router_logits)
        spread = routing.router_logits.float().std(dim=-1, unbiased=False)
        entropies.append(-(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1).mean() / _most(layer))
        if layer.num_experts > 1 and not (spread > 0).any():
            blind.append(layer.name)
        elif layer.num_experts > 1 and probabilities.max(dim=-1).values.mean() > SATURATED:
            saturated.append(layer.name)
        elif len(routing.top_k_index.unique()) <= layer.top_k < layer.num_experts and routing.token_index is None:
            narrow.append(layer.name)
    if blind:
        return Finding(check, FAILED, f"All experts get the same score for every token in {some(blind)}.")
    if saturated:
        told = f"One expert has over {SATURATED:.1%} of the probability, on average, in {some(saturated)}."
        return Finding(check, FAILED, told)
    mean = sum(entropies) / len(entropies)
    told = f"Entropy {mean:.2f} of the largest possible, on average, on 32 tokens"
    if narrow:
        return Finding(check, WARNING, f"{told}; the same experts serve all of them in {some(narrow)}.")
    return Finding(check, PASSED, f"{told}.")


def _most(layer: MixtureLayer) -> float:
    return math.log(layer.num_experts) if layer.num_experts > 1 else 1.0


def _code(folder: Path) -> Finding:
    """The code that travels is read, never run here: is it all there, and is it the code that this package tests?"""
    check = "code for loading without the package"
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if not isinstance(auto_map, dict) or not auto_map:
        return Finding(check, NOT_CHECKED, "None is needed: the config names no code.")
    wanted = sorted({f"{str(value).partition('.')[0]}.py" for value in auto_map.values()})
    files: set[str] = set()
    try:
        while wanted:
            name = wanted.pop()
            if name not in files:
                files.add(name)
                wanted += _siblings((folder / name).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return Finding(check, FAILED, f"`{name}` cannot be read ({type(error).__name__}).")
    ours = Path(models.__file__).parent
    different = sorted(name for name in files if not _same(folder / name, ours / name))
    version = f"hf_sparse_moe {hf_sparse_moe.__version__}"
    if different:
        return Finding(
            check, WARNING, f"{len(different)} of {len(files)} files are not those of {version}: {different[0]}."
        )
    return Finding(check, PASSED, f"{len(files)} files, byte for byte those of {version}.")


def _siblings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            yield f"{node.module}.py"


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and path.read_bytes() == other.read_bytes()


def main() -> None:
    folder, _, *base = map(Path, sys.argv[1:])
    findings, probe = (examine_adapter(folder, base[0]), {}) if base else examine(folder)
    result = {"findings": [asdict(finding) for finding in findings], "probe": probe}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
