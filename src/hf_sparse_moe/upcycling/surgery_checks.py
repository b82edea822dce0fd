"""What `verify` holds a mixture made of another to, and a dense model made of one: its receipt and its source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.reader import TensorFiles
from hf_sparse_moe.checkpoints.source import Source, weight_files

from .receipt import allowed_difference, output_difference


if TYPE_CHECKING:
    from hf_sparse_moe.routing.mixture_layers import MixtureLayer

Finding = tuple[bool, str]
VERDICTS = {
    "pruned": "verified: the mixture computes what its source computes without the experts that the receipt says went",
    "merged": "verified: the mixture is its source with the experts merged that the receipt names; merging changes "
    "what it computes",
    "to_dense": "verified: the dense model is its source but for the feed-forwards, which are made of the experts; "
    "that changes what it computes",
    "expanded": "verified: the mixture is its source with the copies of experts, and the number of them a token, that "
    "the receipt names",
    "more_layers": "verified: the mixture is its source with the more sparse layers that the receipt names",
}


def last_surgery(receipt: Mapping[str, Any]) -> str | None:
    """Which of the operations of a receipt was the last."""
    return next((name for name in reversed([*receipt]) if name in VERDICTS), None)


def weights_sha256(folder: Path) -> str:
    """Of all tensors of a checkpoint, whichever files they are in."""
    files, digest = TensorFiles(weight_files(Source(folder.name, folder, None))), hashlib.sha256()
    for name in sorted(files.names):
        digest.update(f"{name} {files.dtype(name)} {files.shape(name)}".encode())
        for piece in files.pieces(name, files.dtype(name)):
            digest.update(piece.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_surgery(
    operation: str, made: Mapping[str, Any], result: PreTrainedModel, source: PreTrainedModel, folder: Path
) -> tuple[list[Finding], dict[str, Any]]:
    """
    Findings of the result in a folder, and the difference of the outputs where there should be none. `made` is the
    receipt's part.
    """
    # Slow to import, and for the other commands not needed.
    from hf_sparse_moe.routing.mixture_layers import find_mixture_layers
    from hf_sparse_moe.routing.switches import disable_experts

    if operation == "to_dense":
        return [_outside_feed_forwards(result, source), *_as_written(made, folder)], {}
    if operation in ("expanded", "more_layers"):
        findings, measured = _check_growth(operation, made, result, source)
        return [*findings, *_as_written(made, folder)], measured
    groups = made.get("groups") if operation == "merged" else made.get("kept")
    if not isinstance(groups, dict):
        raise ValueError(f"The receipt does not say which experts were {operation}. Fetch it again.")
    old, new = ({layer.name: layer for layer in find_mixture_layers(model)} for model in (source, result))
    of_each = {
        name: [each if operation == "merged" else [each] for each in chosen] if isinstance(chosen, list) else None
        for name, chosen in groups.items()
    }
    for name, chosen in of_each.items():
        if told := _misnamed(name, chosen, operation, old, new):
            return [(False, told)], {}
    findings = [
        _rows({name: (old[name], new[name], chosen) for name, chosen in of_each.items()}),
        _outside_experts(result, source, [*of_each]),
        *_as_written(made, folder),
    ]
    if operation == "merged":
        return findings, {}
    places = {layer.name: place for place, layer in enumerate(find_mixture_layers(source))}
    gone = {places[name]: sorted(set(range(old[name].num_experts)) - set(chosen)) for name, chosen in groups.items()}
    with disable_experts(source, gone):
        outputs, measured = _outputs(result, source, True, "the source with the other experts disabled")
    return [outputs, *findings], measured


def _check_growth(
    operation: str, made: Mapping[str, Any], result: PreTrainedModel, source: PreTrainedModel
) -> tuple[list[Finding], dict[str, Any]]:
    """Of [`expand`], and of [`upcycle`] of a mixture."""
    from hf_sparse_moe.routing.mixture_layers import find_mixture_layers

    old, new = ({layer.name: layer for layer in find_mixture_layers(model)} for model in (source, result))
    if operation == "more_layers":
        layers = sorted(new.keys() - old.keys())
        told = f"{len(layers)} layers are sparse that were dense in the source."
        if layers != sorted(map(str, made.get("layers") or ())):
            return [(False, f"{told} The receipt says others.")], {}
        before, after = source.state_dict(), result.state_dict()
        outside = [name for name in after if not name.startswith(tuple(f"{layer}." for layer in layers))]
        findings = [(True, told), _same(outside, before, after)]
    else:
        every = {name: [*range(layer.num_experts)] for name, layer in old.items()}
        copied = made.get("copied")
        for name, layer in new.items():
            ids = copied.get(name) if isinstance(copied, dict) else None
            if not isinstance(ids, list) or name not in old or not all(expert in every[name] for expert in ids):
                return [(False, f"The receipt does not say of which experts of `{name}` there are copies.")], {}
            every[name] += ids
            if layer.num_experts != len(every[name]):
                told = f"`{name}` has {layer.num_experts} experts, but the receipt says {len(every[name])}."
                return [(False, told)], {}
        groups = {name: [[expert] for expert in ids] for name, ids in every.items()}
        grown = [name for name, layer in old.items() if len(every[name]) > layer.num_experts]
        findings = [
            _rows({name: (old[name], new[name], each) for name, each in groups.items()}),
            _outside_experts(result, source, grown),
        ]
    outputs, measured = _outputs(result, source, made.get("exact") is True, "the source")
    return [outputs, *findings], measured


def _outputs(
    result: PreTrainedModel, source: PreTrainedModel, promised: bool, of: str
) -> tuple[Finding, dict[str, Any]]:
    whole: Any = [model.dequantize() if getattr(model, "is_quantized", False) else model for model in (source, result)]
    measured: Any = output_difference(*(model.float() for model in whole))
    kept = measured["max_abs_difference"] <= 10 * allowed_difference(measured, torch.float32)
    told = f"The outputs differ by at most {measured['max_abs_difference']:.1e} from those of {of}, where they reach "
    told += f"{measured['max_abs_output']:.1f}{'' if promised else '; the receipt does not promise the same'}."
    return (kept or not promised, told), {"float32": measured}


def _as_written(made: Mapping[str, Any], folder: Path) -> list[Finding]:
    """What no source holds is held against its hash, where the receipt has one."""
    if "weights_sha256" not in made:
        return []
    if made["weights_sha256"] == weights_sha256(folder):
        return [(True, "All tensors are those that were written, bit for bit.")]
    return [(False, "The tensors are not those that were written: training or damage changed them.")]


def _misnamed(name: str, groups: Any, operation: str, old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What is wrong with the receipt's experts of one layer."""
    if name not in old or name not in new:
        return f"The receipt names the layer `{name[:200]}`, which is not a sparse one of both models."
    every = [expert for group in groups or [None] for expert in (group if isinstance(group, list) else [None])]
    count = old[name].num_experts
    if any(type(expert) is not int or not 0 <= expert < count for expert in every) or len(every) > len(set(every)):
        return f"The receipt names experts of `{name}` twice, or others than the {count} of the source."
    if operation == "merged" and len(every) < count:
        return f"The receipt's groups hold {len(every)} of the {count} experts of `{name}`."
    if len(groups) != new[name].num_experts:
        return f"`{name}` has {new[name].num_experts} experts, but the receipt says {len(groups)}."
    return None


def _rows(layers: Mapping[str, tuple[MixtureLayer, MixtureLayer, Sequence[Sequence[int]]]]) -> Finding:
    """
    Router rows are those of each group's first expert, but those of copies, which have noise; an expert of a group of
    its own is what it was.
    """
    different, alone = [], 0
    for name, (old, new, groups) in layers.items():
        firsts = [group[0] for group in groups]
        single = [place for place, group in enumerate(groups) if len(group) == 1]
        alone += len(single)
        parts = (
            (old.router, new.router, [*range(min(len(groups), old.num_experts))]),
            (old.experts, new.experts, single),
        )
        for before, after, places in parts:
            tensors = after.state_dict()
            for key, tensor in before.state_dict().items():
                other = tensors.get(key)
                if other is None or not tensor.dim() or tensor.shape == other.shape:
                    continue
                if (len(tensor), len(other)) == (old.num_experts, new.num_experts) and not torch.equal(
                    tensor[[firsts[place] for place in places]], other[places]
                ):
                    different.append(f"{name}: {key}")
    if different:
        return (
            False,
            f"The source's experts, or their router rows, are not those that the receipt says: {different[0]}.",
        )
    learnt = any(old.router.state_dict() for old, _, _ in layers.values())
    told = f"The router rows in {len(layers)} layers, and {alone} experts," if learnt else f"{alone} experts"
    return True, f"{told} are those of the source, bit for bit."


def _outside_experts(result: PreTrainedModel, source: PreTrainedModel, layers: list[str]) -> Finding:
    before, after = source.state_dict(), result.state_dict()

    def rewritten(name: str) -> bool:
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if layer is None:
            return False
        inside = name.removeprefix(f"{layer}.").startswith("experts.")
        return inside or (name in before and name in after and before[name].shape != after[name].shape)

    outside = [name for name in before | after if not rewritten(name)]
    return _same(outside, before, after)


def _outside_feed_forwards(result: PreTrainedModel, source: PreTrainedModel) -> Finding:
    after = result.state_dict()
    before = {name.removeprefix("dense."): tensor for name, tensor in source.state_dict().items()}
    outside = [name for name in after if name in before]
    if not outside:
        return False, "The dense model has no tensor of the source."
    return _same(outside, before, after)


def _same(names: list[str], before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Finding:
    for name in names:
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            return False, f"`{name}` is not that of the source, though it is not of the experts."
    return True, f"All {len(names)} other tensors are those of the source, bit for bit."
