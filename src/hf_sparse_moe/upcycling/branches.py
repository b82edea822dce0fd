"""Several dense checkpoints as the experts of one mixture (Branch-Train-MiX, arXiv 2403.07816)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def check_branches(branches: Sequence[PreTrainedModel], names: Sequence[str]) -> None:
    """Raise a `ValueError` unless the branches can be mixed: at least two, of one class, with the same tensors."""
    if len(branches) < 2:
        raise ValueError('`sources` must name at least 2 dense checkpoints for `method="branches"`.')
    first = {key: list(tensor.shape) for key, tensor in branches[0].state_dict().items()}
    for branch, name in zip(branches[1:], names[1:], strict=True):
        if type(branch) is not type(branches[0]):
            raise ValueError(f"`{name}` is a {type(branch).__name__}, `{names[0]}` a {type(branches[0]).__name__}.")
        shapes = {key: list(tensor.shape) for key, tensor in branch.state_dict().items()}
        different = sorted(key for key in first | shapes if first.get(key) != shapes.get(key))
        if different:
            key = different[0]
            raise ValueError(
                f"`{key}` has the shape {shapes.get(key)} in `{name}` and {first.get(key)} in `{names[0]}`. "
                "Branches must be fine-tuned from one checkpoint, with one vocabulary."
            )


def make_trunk(branches: Sequence[PreTrainedModel], base: PreTrainedModel | None, trunk: str) -> PreTrainedModel:
    """The dense model that gives all but the experts: the `"average"` of the branches, or the `"base"`."""
    if trunk == "base":
        if base is None:
            raise ValueError('`trunk="base"` needs the base model as the first argument of `upcycle`.')
        return base
    average, states = copy.deepcopy(branches[0]), [branch.state_dict() for branch in branches]
    with torch.no_grad():
        for key, tensor in average.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([state[key].float() for state in states]).mean(dim=0))
    return average


def router_rows(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Router rows (E, H) that point to each branch's own text, given the hidden states (tokens, H) of each one's: the
    mean less that of all, with unit length, divided by the deviation of the logits it gives, which then vary by about
    1.
    """
    means = torch.stack([state.mean(dim=0) for state in states])
    directions = torch.nn.functional.normalize(means - means.mean(dim=0), dim=-1)
    deviation = (torch.cat(list(states)) @ directions.T).std(dim=0, keepdim=True).T
    return directions / deviation.clamp(min=torch.finfo(torch.float32).eps)
