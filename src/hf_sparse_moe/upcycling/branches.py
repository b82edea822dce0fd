"""Several dense checkpoints as the experts of one mixture (Branch-Train-MiX, arXiv 2403.07816)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .conversion import SparseLayer
from .measuring import hidden_states


TRUNKS = ("average", "base")


def check_branches(branches: Sequence[PreTrainedModel], names: Sequence[str]) -> None:
    """
    Raise a `ValueError` unless the branches can be mixed: at least two, of one class, with the same tensors.

    Args:
        branches (`Sequence[PreTrainedModel]`): The dense models.
        names (`Sequence[str]`): What to call them.
    """
    if len(branches) < 2:
        raise ValueError('`sources` must name at least 2 dense checkpoints for `method="branches"`.')
    first = branches[0].state_dict()
    for branch, name in zip(branches[1:], names[1:], strict=True):
        if type(branch) is not type(branches[0]):
            raise ValueError(f"`{name}` is a {type(branch).__name__}, `{names[0]}` a {type(branches[0]).__name__}.")
        state = branch.state_dict()
        different = sorted(key for key in first.keys() | state.keys() if _shape(first, key) != _shape(state, key))
        if different:
            key = different[0]
            raise ValueError(
                f"`{key}` has the shape {_shape(state, key)} in `{name}` and {_shape(first, key)} in `{names[0]}`. "
                "Branches must be fine-tuned from one checkpoint, with one vocabulary."
            )


def make_trunk(branches: Sequence[PreTrainedModel], base: PreTrainedModel | None, trunk: str) -> PreTrainedModel:
    """
    The dense model that gives all but the experts.

    Args:
        branches (`Sequence[PreTrainedModel]`): The dense models that become experts.
        base (`PreTrainedModel`, *optional*): The model they were fine-tuned from.
        trunk (`str`): `"average"` of the branches, or the `"base"`.
    """
    if trunk not in TRUNKS:
        raise ValueError(f"`trunk={trunk!r}` is not allowed: it must be one of {TRUNKS}.")
    if trunk == "base":
        if base is None:
            raise ValueError('`trunk="base"` needs the base model as the first argument of `upcycle`.')
        return base
    average = copy.deepcopy(branches[0])
    states = [branch.state_dict() for branch in branches]
    with torch.no_grad():
        for key, tensor in average.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([state[key].float() for state in states]).mean(dim=0))
    return average


def router_centroids(
    trunk: PreTrainedModel, layers: list[SparseLayer], prompts: Sequence[Iterable[Any]]
) -> list[torch.Tensor]:
    """
    Router rows that point to each branch's own text: per layer (E, H).

    A row is the mean hidden state of the branch's text less that of all, with unit length, divided by the deviation of
    the logits it gives, so that these vary by about 1.

    Args:
        trunk (`PreTrainedModel`): The dense model whose hidden states the routers will see.
        layers (`list[SparseLayer]`): The layers that become sparse.
        prompts (`Sequence[Iterable]`): For each branch, batches of its own text, see [`hidden_states`].
    """
    by_branch = [hidden_states(trunk, layers, batches) for batches in prompts]
    rows = []
    for states in zip(*by_branch, strict=True):
        means = torch.stack([state.mean(dim=0) for state in states])
        directions = torch.nn.functional.normalize(means - means.mean(dim=0), dim=-1)
        deviation = (torch.cat(states) @ directions.T).std(dim=0, keepdim=True).T
        rows.append(directions / deviation.clamp(min=torch.finfo(torch.float32).eps))
    return rows


def _shape(state: dict[str, torch.Tensor], key: str) -> list[int] | None:
    return list(state[key].shape) if key in state else None
