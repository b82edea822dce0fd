"""How alike the experts of a layer are: by what they make of the same tokens, and by their weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from hf_sparse_moe.routing.mixture_layers import MixtureLayer, RoutingObservation

from .texts import Array


COMPARED_TOKENS = 64  # on which the outputs of experts are compared
COMPARED_UNITS = 64  # of each expert, whose best match in another expert is looked for
MOST_PRODUCTS = 2e11  # for one layer's comparison of weights; beyond, it is left out


def keep_inputs(layers: list[MixtureLayer], inputs: dict[str, torch.Tensor]) -> RoutingObservation:
    """Keep some of the tokens (S, H) of each layer's first call, where its experts are called with an index."""

    def keep(layer: MixtureLayer, module: nn.Module, args: tuple, kwargs: dict) -> None:
        states, choice = [*args, *kwargs.values()][:2]
        is_index = choice.dim() == 2 and not choice.is_floating_point() and choice.dtype != torch.bool
        if layer.name not in inputs and is_index:
            flat = states.detach().flatten(0, -2)
            rows = torch.linspace(0, len(flat) - 1, min(COMPARED_TOKENS, len(flat))).long()
            inputs[layer.name] = flat[rows.to(flat.device)]

    return RoutingObservation(
        layer.experts.register_forward_pre_hook(partial(keep, layer), with_kwargs=True)
        for layer in layers
        if layer.experts is not layer.block
    )


def compare_outputs(layer: MixtureLayer, inputs_SH: torch.Tensor | None) -> Array | None:
    """`(E, E)`: the mean cosine of two experts' outputs, NaN for classes without weights; None without inputs."""
    if inputs_SH is None:
        return None
    stacked = [parameter.shape[0] for parameter in layer.experts.parameters() if parameter.dim() == 3]
    ones = torch.ones(len(inputs_SH), 1, dtype=inputs_SH.dtype, device=inputs_SH.device)
    outputs = [
        layer.experts(inputs_SH, torch.full_like(ones, expert, dtype=torch.long), ones)
        for expert in range(min([layer.num_experts, *stacked]))
    ]
    outputs_ESH = nn.functional.normalize(torch.stack(outputs).float(), dim=-1)
    cosine = torch.einsum("ish,jsh->ij", outputs_ESH, outputs_ESH) / len(inputs_SH)
    missing = layer.num_experts - len(outputs)
    return np.pad(cosine.cpu().numpy(), (0, missing), constant_values=np.nan)


def compare_weights(experts: nn.Module, num_experts: int) -> Array | None:
    """
    `(E, E)`: the mean cosine of each hidden unit's output vector to its best match; None where the weights are not
    fused, or too many to compare.
    """
    down = getattr(experts, "down_proj", None)
    if not isinstance(down, torch.Tensor) or down.dim() != 3 or len(down) != num_experts:
        return None
    units = down.detach() if getattr(experts, "is_transposed", False) else down.detach().transpose(1, 2)  # (E, I, H)
    _, width, size = units.shape
    compared = min(width, COMPARED_UNITS)
    if not units.is_floating_point() or num_experts**2 * compared * width * size > MOST_PRODUCTS:
        return None
    units = nn.functional.normalize(units.float(), dim=-1)
    some = units[:, torch.linspace(0, width - 1, compared).long()]
    best = torch.stack([(some @ other.T).amax(dim=-1).mean(dim=-1) for other in units], dim=1)
    return ((best + best.T) / 2).cpu().numpy()
