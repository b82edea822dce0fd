"""The tensors of a mixture in our names and in a target's, part by part. E experts, I intermediate, H hidden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.models.moe_block import SparseMoeBlock
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .targets import ExportTarget


Tensors = dict[str, torch.Tensor]

SCORE_BIAS = "gate.e_score_correction_bias"
_SHARED_GATE = "shared_expert_gate.weight"
_SHARED_UP, _SHARED_DOWN = "shared_experts.up_proj.weight", "shared_experts.down_proj.weight"


def stored_tensors(model: PreTrainedModel) -> Tensors:
    """What a checkpoint of `model` holds: its state without tied copies."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}


def in_layer(names: Mapping[str, Any], layer: str) -> dict[str, Any]:
    """The entries below `layer`, by their names from there."""
    return {name.removeprefix(f"{layer}."): value for name, value in names.items() if name.startswith(f"{layer}.")}


def parts_of(model: SparseMoePreTrainedModel) -> list[tuple[str, list[str]]]:
    """The stored tensors of a mixture, part by part: first each other one alone, under "", then each sparse block."""
    names = list(stored_tensors(model))
    paths = [path for path, module in model.named_modules() if isinstance(module, SparseMoeBlock)]
    inside = tuple(f"{path}." for path in paths)
    alone = [("", [name]) for name in names if not name.startswith(inside)]
    return alone + [(path, [name for name in names if name.startswith(f"{path}.")]) for path in paths]


def layer_of(block: str) -> str:
    """Where the layer of a sparse block is, in the target."""
    return block.removeprefix("dense.").rpartition(".")[0]


def part_to_target(
    target: ExportTarget, path: str, part: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> Tensors:
    """A part of [`parts_of`] in the target's names, which has tensors of these `shapes`."""
    if not path:
        names = {name: name.removeprefix("dense.").replace(f".{target.feed_forward}.", ".mlp.") for name in part}
        return {names[name]: tensor for name, tensor in part.items()}
    layer = layer_of(path)
    block = _block_to_target(target, in_layer(part, path), in_layer(shapes, layer))
    return {f"{layer}.{name}": tensor for name, tensor in block.items()}


def our_name(target: ExportTarget, name: str) -> str:
    """The way back of a tensor outside the sparse blocks."""
    return f"dense.{name.replace('.mlp.', f'.{target.feed_forward}.')}"


def places_of(target: ExportTarget, ours: str, num_experts: int) -> tuple[str, ...]:
    """The target's names, from the layer, of all that a tensor of a sparse block is made of."""
    halved = ours == _SHARED_DOWN and target.shared and target.shared.gate  # by a gate of zeros
    gate = (halved,) if halved else ()
    return (target.router_name, *gate, *_places(target, num_experts).get(ours, ()))


class Place(NamedTuple):
    """Where a weight of ours is in the target: its names there, and by what it is multiplied."""

    names: tuple[str, ...]
    factor: int = 1


def target_places(target: ExportTarget, model: SparseMoePreTrainedModel) -> dict[str, Place]:
    """The place of each weight of a mixture that has one."""
    blocks = [path for path, module in model.named_modules() if isinstance(module, SparseMoeBlock)]
    inside = tuple(f"{path}." for path in blocks)
    outside = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    places = {name: Place((*part_to_target(target, "", {name: tensor}, {}),)) for name, tensor in outside.items()}
    for path in blocks:
        for ours, theirs in _places(target, model.config.num_experts).items():
            doubled = bool(target.shared and target.shared.gate and ours == _SHARED_DOWN)
            places[f"{path}.{ours}"] = Place(tuple(f"{layer_of(path)}.{name}" for name in theirs), 1 + doubled)
    return places


def _places(target: ExportTarget, num_experts: int) -> dict[str, tuple[str, ...]]:
    """Our names in a sparse block, each with the target's, from the layer; several where it keeps parts apart."""
    up = "experts.gate_up_proj" if target.gated else "experts.up_proj"
    places: dict[str, tuple[str, ...]] = {"gate.weight": (target.router_name,)}
    for number, ours in enumerate((up, "experts.down_proj")):
        if target.expert_modules:
            places[ours] = tuple(map(target.expert_modules[number].format, range(num_experts)))
        else:
            places[ours] = (f"{target.experts_name}.{ours.removeprefix('experts.')}",)
    if target.score_bias_name:
        places[SCORE_BIAS] = (target.score_bias_name,)
    if target.shared:
        places |= {_SHARED_UP: target.shared.weights[:-1], _SHARED_DOWN: target.shared.weights[-1:]}
        places |= {_SHARED_GATE: (target.shared.gate,)} if target.shared.gate else {}
    return places


def _block_to_target(
    target: ExportTarget, block: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> Tensors:
    """
    One sparse block in the target's names, from the layer that holds it. Names that have no place keep theirs. What
    `shapes` asks for and we have not is written as zeros: a score bias, shared experts and their gate.
    """
    left, result = dict(block), Tensors()
    for ours, theirs in _places(target, len(block["gate.weight"])).items():
        if ours in left and (ours != SCORE_BIAS or theirs[0] in shapes):
            tensor = left.pop(ours)
            if target.expert_modules and ours.startswith("experts."):
                parts: Any = tensor.unbind()
            else:
                parts = tensor.chunk(len(theirs))
            result |= dict(zip(theirs, parts, strict=True))
    bias, gate = target.score_bias_name or "", (target.shared.gate if target.shared else None) or ""
    if bias in result:
        result[bias] = result[bias].reshape(shapes[bias])
    elif (ours_bias := left.pop(SCORE_BIAS, None)) is not None and not ours_bias.is_meta and ours_bias.any():
        raise ValueError(
            f"The selection bias (`{SCORE_BIAS}`) is trained, and {target.model_type} has none. Set it to zeros to "
            "export without it."
        )
    if target.shared and gate and gate not in result and (down := target.shared.weights[-1]) in result:
        result[down] = result[down] * 2
    like = block["experts.down_proj"]
    zeros = {bias, gate, *(target.shared.weights if target.shared else ())} & shapes.keys() - result.keys()
    for name in sorted(zeros):
        dtype = torch.float32 if name == bias else like.dtype
        result[name] = torch.zeros(shapes[name], dtype=dtype, device=like.device)
    return result | left


def block_from_target(
    target: ExportTarget, layer: Mapping[str, torch.Tensor], num_shared_experts: int, shared_expert_gate: bool
) -> tuple[Tensors, Tensors]:
    """
    The way back: the block's tensors in our names, and what is left of the layer. Shared experts of a mixture without
    any are zeros and left out, and so is a gate of zeros, which halves them.
    """
    left, block = dict(layer), Tensors()
    for ours, theirs in _places(target, len(layer[target.router_name])).items():
        if theirs[0] in left:
            parts = [left.pop(name) for name in theirs]
            if target.expert_modules and ours.startswith("experts."):
                block[ours] = torch.stack(parts)
            else:
                block[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if SCORE_BIAS in block:
        block[SCORE_BIAS] = block[SCORE_BIAS].flatten()
    if not shared_expert_gate and block.pop(_SHARED_GATE, None) is not None:
        block[_SHARED_DOWN] = block[_SHARED_DOWN] / 2
    if not num_shared_experts:
        block = {name: tensor for name, tensor in block.items() if name not in (_SHARED_UP, _SHARED_DOWN)}
    return block, left
