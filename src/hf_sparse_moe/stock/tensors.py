"""The tensors of one sparse layer, in our names and in a target's. E experts, I intermediate, H hidden."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .targets import ExportTarget


Tensors = dict[str, torch.Tensor]

SCORE_BIAS = "gate.e_score_correction_bias"
# Units of a shared expert of zeros where the target names its size: enough for tensor parallelism to divide.
ZERO_EXPERT_UNITS = 64


def target_name(target: ExportTarget, name: str) -> str:
    """The target's name of a tensor outside the sparse blocks."""
    return name.removeprefix("dense.").replace(f".{target.feed_forward}.", ".mlp.")


def our_name(target: ExportTarget, name: str) -> str:
    """The way back of [`target_name`]."""
    return f"dense.{name.replace('.mlp.', f'.{target.feed_forward}.')}"


def to_target(target: ExportTarget, block: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> Tensors:
    """
    One sparse block in the target's names, from the layer that holds it. Names that have no place keep theirs.

    Args:
        target (`ExportTarget`): The row.
        block (`dict[str, torch.Tensor]`): The block's tensors, in our names from the block.
        shapes (`dict[str, torch.Size]`): Of all that the target has in the layer; what is asked for there and we have
            not is written as zeros: a score bias, the gate of shared experts, shared experts as such.

    Raises:
        ValueError: a trained selection bias without a place there.
    """
    left = dict(block)
    result: Tensors = {target.router_name: left.pop("gate.weight")}
    bias_name, bias = target.score_bias_name, left.pop(SCORE_BIAS, None)
    if bias is not None and bias_name is not None and bias_name in shapes:
        result[bias_name] = bias.reshape(shapes[bias_name])
    elif bias is not None and not bias.is_meta and bias.any():
        raise ValueError(
            f"The selection bias (`{SCORE_BIAS}`) is trained, and {target.model_type} has none. Set it to zeros to "
            "export without it."
        )
    up_name = "gate_up_proj" if target.gated else "up_proj"
    up, down = left.pop(f"experts.{up_name}"), left.pop("experts.down_proj")
    if target.expert_modules:
        for pattern, stacked in zip(target.expert_modules, (up, down), strict=True):
            result |= {pattern.format(number): tensor for number, tensor in enumerate(stacked)}
    else:
        result |= {f"{target.experts_name}.{up_name}": up, f"{target.experts_name}.down_proj": down}
    missing = {bias_name} if bias_name else set()
    if target.shared:
        missing |= {*target.shared.weights, *filter(None, [target.shared.gate])}
        if "shared_experts.up_proj.weight" in left:
            up, down = left.pop("shared_experts.up_proj.weight"), left.pop("shared_experts.down_proj.weight")
            ups = up.chunk(2) if len(target.shared.weights) == 3 else (up,)
            result |= dict(zip(target.shared.weights, (*ups, down * 2 if target.shared.gate else down), strict=True))
    for name in sorted(missing & shapes.keys() - result.keys()):
        dtype = torch.float32 if name == bias_name else down.dtype
        result[name] = torch.zeros(shapes[name], dtype=dtype, device=down.device)
    return result | left


def from_target(
    target: ExportTarget, layer: Mapping[str, torch.Tensor], num_shared_experts: int
) -> tuple[Tensors, Tensors]:
    """
    The way back: the block's tensors in our names, and what is left of the layer.

    Args:
        target (`ExportTarget`): The row.
        layer (`dict[str, torch.Tensor]`): The layer's tensors, in the target's names from the layer.
        num_shared_experts (`int`): Whether shared experts are read, or are zeros and left out.

    Raises:
        ValueError: shared experts with a trained gate, which our blocks have not.
    """
    left = dict(layer)
    block: Tensors = {"gate.weight": left.pop(target.router_name)}
    up_name = "gate_up_proj" if target.gated else "up_proj"
    if target.expert_modules:
        count = len(block["gate.weight"])
        up, down = (
            torch.stack([left.pop(name.format(number)) for number in range(count)]) for name in target.expert_modules
        )
    else:
        up, down = left.pop(f"{target.experts_name}.{up_name}"), left.pop(f"{target.experts_name}.down_proj")
    block |= {f"experts.{up_name}": up, "experts.down_proj": down}
    if target.score_bias_name in left:
        block[SCORE_BIAS] = left.pop(target.score_bias_name).flatten()
    if target.shared and target.shared.weights[0] in left:
        *ups, down = (left.pop(name) for name in target.shared.weights)
        gate = left.pop(target.shared.gate) if target.shared.gate else None
        if num_shared_experts:
            if gate is not None and gate.any():
                raise ValueError(
                    f"The gate of the shared experts (`{target.shared.gate}`) is trained, and here they have none. "
                    "Only shared experts without a gate, or with one of zeros, can be read."
                )
            block["shared_experts.up_proj.weight"] = torch.cat(ups)
            block["shared_experts.down_proj.weight"] = down if gate is None else down / 2
    return block, left
