"""
The checks of [`doctor`], run in the process that loads the checkpoint:
`python -m hf_sparse_moe.hub.examination FOLDER RESULT [BASE OF AN ADAPTER]`. Runs no code that came with it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

import hf_sparse_moe
from hf_sparse_moe import models
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles
from hf_sparse_moe.checkpoints.source import Source, weight_files
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME
from hf_sparse_moe.models.routers import Routing
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, find_mixture_layers, observe_routing
from hf_sparse_moe.upcycling.receipt import probe_inputs

from .adapter_base import base_difference, read_base
from .adapter_folder import ADAPTER_WEIGHTS, check_adapter
from .adapter_loading import Attachment, attach
from .adapter_publish import load_base
from .checkpoint import mapping
from .fingerprint import TOLERANCE, fingerprint_difference, probe_output, read_fingerprint, take_fingerprint
from .loading import load_checkpoint


PASSED, FAILED, WARNING, NOT_CHECKED = "passed", "failed", "warning", "not checked"
SATURATED = 0.999  # mean probability of one expert: no gradient is left to choose another
ROUNDING = 2e-6  # of the largest output: an adapter of zeros takes another way to the same sums
_LOADING_FAILS = (ValueError, OSError, ImportError, NotStreamableError)


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


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory, what transformers says about the loading, and what it computes."""

    folder: Path
    model: PreTrainedModel
    info: Mapping[str, Any]
    files: TensorFiles
    layers: list[MixtureLayer]
    routings: list[tuple[MixtureLayer, Routing]]
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its base, what became of its tensors, and what the base computes without and with it."""

    folder: Path
    model: Any
    difference: str | None  # to the recorded base
    attachment: Attachment
    alone: torch.Tensor
    both: torch.Tensor
    fingerprint: dict[str, Any]


def examine(folder: Path) -> tuple[list[Finding], dict[str, Any]]:
    """
    Load a checkpoint and check everything that can be seen of it on this machine.

    Returns:
        the findings, and what the process that runs the checkpoint's own code needs to repeat the forward pass.
    """
    try:
        files = TensorFiles(weight_files(Source(folder.resolve().name, folder, None)))
        model, info = load_checkpoint(folder, torch.float32)
    except _LOADING_FAILS as error:
        return [_does_not_load(error)], {}
    try:
        layers = find_mixture_layers(model)
    except ValueError:
        layers = []
    routings: list[tuple[MixtureLayer, Routing]] = []
    with observe_routing(layers, lambda layer, routing: routings.append((layer, routing))):
        taken = take_fingerprint(model, folder)
    loaded = LoadedModel(folder, model, info, files, layers, routings, taken)
    findings = [Finding(check, *look(loaded)) for check, look in _MODEL_CHECKS.items()]
    inputs = {name: value.tolist() for name, value in probe_inputs(model.config, model.device).items()}
    return findings, {"inputs": inputs, "fingerprint": taken}


def examine_adapter(folder: Path, base: Path) -> list[Finding]:
    """Load an adapter onto the base in another folder, and check everything that can be seen of both."""
    try:
        check_adapter(folder, folder.name)
        model = load_base(base)
        alone, recorded = probe_output(model), read_base(folder)
        difference = base_difference(recorded, model) if recorded else None
        adapted, attachment = attach(model, folder)
    except _LOADING_FAILS as error:
        return [_does_not_load(error)]
    taken, both = take_fingerprint(adapted, folder), probe_output(adapted)
    loaded = LoadedAdapter(folder, adapted, difference, attachment, alone, both, taken)
    return [Finding(check, *look(loaded)) for check, look in _ADAPTER_CHECKS.items()]


def compare_outputs(taken: dict[str, Any], other: dict[str, Any], against: str) -> tuple[str, str]:
    """Verdict and sentence for two fingerprints."""
    difference = fingerprint_difference(other, taken)
    detail = f"Largest difference {against}: {difference:.1e} of the largest output."
    return PASSED if difference <= TOLERANCE else FAILED, detail


def _does_not_load(error: Exception) -> Finding:
    return Finding("loads", FAILED, " ".join(str(error).split()))


def _loads(loaded: LoadedModel) -> tuple[str, str]:
    name, tensors = type(loaded.model).__name__, len(loaded.files.names)
    return PASSED, f"{name}, {tensors} tensors, {len(loaded.layers)} sparse layers."


def _all_present(loaded: LoadedModel) -> tuple[str, str]:
    fresh = sorted({*loaded.info["missing_keys"], *(entry[0] for entry in loaded.info["mismatched_keys"])})
    if fresh:
        return FAILED, f"{len(fresh)} tensors are not in the files and were initialised at random: {_some(fresh)}."
    return PASSED, "All are in the files."


def _agree(loaded: LoadedModel) -> tuple[str, str]:
    if shapes := sorted(loaded.info["mismatched_keys"], key=lambda entry: entry[0]):
        name, stored, wanted = shapes[0]
        return FAILED, f"`{name}` has the shape {tuple(stored)}, the config asks for {tuple(wanted)}."
    if unused := sorted(loaded.info["unexpected_keys"]):
        return FAILED, f"{len(unused)} tensors have no place in the model: {_some(unused)}."
    stored = sorted({str(loaded.files.dtype(name)).removeprefix("torch.") for name in loaded.files.names})
    named = read_json(loaded.folder / "config.json").get("dtype")
    if named is not None and named not in stored:
        return WARNING, f"The config names {named}, the weights are {', '.join(stored)}."
    return PASSED, f"Shapes and names fit; stored as {', '.join(stored)}."


def _finite(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        return FAILED, f"NaN or infinity in {len(broken)} tensors: {_some(broken)}."
    return PASSED, "No NaN, no infinity."


def _tied(loaded: LoadedModel) -> tuple[str, str]:
    # What loading has tied is not the question: where the files hold two different ones, transformers unties them.
    tied = loaded.model.get_expanded_tied_weights_keys(all_submodels=True)
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    apart = sorted(name for name, first in tied.items() if parameters.get(name) is not parameters.get(first))
    if apart:
        return FAILED, f"The config ties {_some(apart)} to another, but the files hold both."
    return PASSED, f"Tied: {_some(sorted(tied))}." if tied else "None is to be tied."


def _experts(loaded: LoadedModel) -> tuple[str, str]:
    layers = loaded.layers
    equal = [layer.name for layer in layers if layer.num_experts > 1 and _all_equal(layer)]
    if not layers:
        return NOT_CHECKED, "No sparse layer."
    if not equal:
        return PASSED, f"In all {len(layers)} sparse layers."
    detail = f"In {len(equal)} of {len(layers)} sparse layers all experts are equal"
    try:
        receipt = read_json(loaded.folder / RECEIPT_NAME, optional=True)
    except ValueError:
        receipt = {}
    if mapping(receipt.get("arguments")).get("method") == "copy":
        return PASSED, f"{detail}, as the receipt says (method `copy`)."
    return FAILED, f"{detail}, and no receipt says that they were copied: {_some(equal)}."


def _all_equal(layer: MixtureLayer) -> bool:
    stacked = [weight for weight in layer.experts.parameters() if weight.dim() == 3]
    return bool(stacked) and all(bool((weight == weight[:1]).all()) for weight in stacked)


def _routers(loaded: LoadedModel) -> tuple[str, str]:
    routings = loaded.routings
    if not routings or getattr(loaded.model.config, "router_type", "top_k") == "hash":
        return NOT_CHECKED, "No router with weights was used."
    blind, saturated, narrow, entropies = [], [], [], []
    for layer, routing in routings:
        probabilities = layer.probabilities(routing.router_logits)
        spread = routing.router_logits.float().std(dim=-1, unbiased=False)
        largest = math.log(layer.num_experts) if layer.num_experts > 1 else 1.0
        entropies.append(-(probabilities * probabilities.clamp(min=1e-30).log()).sum(-1).mean() / largest)
        if layer.num_experts > 1 and not (spread > 0).any():
            blind.append(layer.name)
        elif layer.num_experts > 1 and probabilities.max(dim=-1).values.mean() > SATURATED:
            saturated.append(layer.name)
        elif len(routing.top_k_index.unique()) <= layer.top_k < layer.num_experts and routing.token_index is None:
            narrow.append(layer.name)
    if blind:
        return FAILED, f"All experts get the same score for every token in {_some(blind)}."
    if saturated:
        return FAILED, f"One expert has more than {SATURATED:.1%} of the mean probability in {_some(saturated)}."
    detail = f"Mean entropy {sum(entropies) / len(entropies):.2f} of the largest possible, on 32 tokens"
    if narrow:
        return WARNING, f"{detail}; the same experts serve all of them in {_some(narrow)}."
    return PASSED, f"{detail}."


def _code(loaded: LoadedModel) -> tuple[str, str]:
    """The code that travels is read, never run here: is all of it there, and is it this package's?"""
    folder = loaded.folder
    auto_map = mapping(read_json(folder / "config.json").get("auto_map"))
    if not auto_map:
        return NOT_CHECKED, "None is needed: the config names no code."
    files: set[str] = set()
    for module in sorted({str(value).partition(".")[0] for value in auto_map.values()}):
        try:
            path = folder / f"{module}.py"
            if not re.fullmatch(r"\w+", module) or not path.is_file():
                raise FileNotFoundError(path)
            files |= {path.name, *(Path(name).name for name in get_relative_import_files(path))}
        except (OSError, ValueError) as error:
            return FAILED, f"`{module}.py`, or what it imports, cannot be read ({type(error).__name__})."
    ours = Path(models.__file__).parent
    different = sorted(name for name in files if not _same(folder / name, ours / name))
    version = f"hf_sparse_moe {hf_sparse_moe.__version__}"
    if different:
        return WARNING, f"{len(different)} of {len(files)} files are not those of {version}: {different[0]}."
    return PASSED, f"{len(files)} files, byte for byte those of {version}."


def _same(path: Path, other: Path) -> bool:
    return other.is_file() and path.read_bytes() == other.read_bytes()


def _fingerprint(loaded: LoadedModel | LoadedAdapter) -> tuple[str, str]:
    recorded, taken = read_fingerprint(loaded.folder), loaded.fingerprint
    if recorded is None:
        return NOT_CHECKED, "There is no fingerprint.json; a push writes it."
    verdict, detail = compare_outputs(taken, recorded, "on 32 tokens")
    if verdict == PASSED:
        return verdict, detail
    changed = recorded.get("files") != taken["files"]
    return verdict, f"{detail} {'Its files have changed since.' if changed else 'Its files have not changed.'}"


def _base(loaded: LoadedAdapter) -> tuple[str, str]:
    if not read_base(loaded.folder):
        return NOT_CHECKED, "It has no adapter_base.json; a push writes it."
    if difference := loaded.difference:
        return FAILED, f"{difference[0].upper()}{difference[1:]}."
    return PASSED, "It is the one that was recorded."


def _attached(loaded: LoadedAdapter) -> tuple[str, str]:
    if fault := loaded.attachment.fault():
        return FAILED, f"{fault[0].upper()}{fault[1:]}."
    return PASSED, f"{len(loaded.attachment.attached)} tensors, none initialised at random."


def _changes(loaded: LoadedAdapter) -> tuple[str, str]:
    share = ((loaded.both - loaded.alone).abs().max() / loaded.alone.abs().max()).item()
    if share <= ROUNDING:
        return FAILED, "Base and adapter compute what the base computes alone."
    return PASSED, f"By up to {share:.1e} of the base's largest output, on 32 tokens."


def _plain_peft(loaded: LoadedAdapter) -> tuple[str, str]:
    """Comes last: the adapter is taken off the model."""
    try:
        plain, _ = attach(loaded.model.unload(), loaded.folder, plain=True)
    except ValueError as error:
        return WARNING, " ".join(str(error).split())
    return compare_outputs(take_fingerprint(plain, loaded.folder), loaded.fingerprint, "to this package")


_MODEL_CHECKS: dict[str, Callable[[LoadedModel], tuple[str, str]]] = {
    "loads": _loads,
    "every tensor present": _all_present,
    "config and weights agree": _agree,
    "every tensor finite": lambda loaded: _finite(loaded.model.state_dict()),
    "tied weights tied": _tied,
    "experts differ": _experts,
    "routers choose": _routers,
    "code for loading without the package": _code,
    "outputs equal the fingerprint": _fingerprint,
}
_ADAPTER_CHECKS: dict[str, Callable[[LoadedAdapter], tuple[str, str]]] = {
    "loads": lambda loaded: (PASSED, f"On {type(loaded.model.get_base_model()).__name__}."),
    "base is its own": _base,
    "every tensor attached": _attached,
    "every tensor finite": lambda loaded: _finite(load_file(loaded.folder / ADAPTER_WEIGHTS)),
    "outputs change": _changes,
    "outputs equal the fingerprint": _fingerprint,
    "plain PEFT computes the same": _plain_peft,
}


def _some(names: list[str], most: int = 3) -> str:
    more = "" if len(names) <= most else f" and {len(names) - most} more"
    return ", ".join(f"`{name}`" for name in names[:most]) + more


def main() -> None:
    folder, _, *base = map(Path, sys.argv[1:])
    findings, probe = (examine_adapter(folder, base[0]), {}) if base else examine(folder)
    result = {"findings": [asdict(finding) for finding in findings], "probe": probe}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
