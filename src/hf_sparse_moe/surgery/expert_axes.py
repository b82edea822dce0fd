"""
Which tensors have an expert axis, and how they are cut or combined along it.

A tensor has one where its shape follows the number of experts: experts' weights and biases, router rows and biases,
selection biases, quantised codes and scales. On disk, experts may also be tensors of their own, by number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key
from transformers.utils import logging

from hf_sparse_moe.checkpoints.reader import NotStreamableError
from hf_sparse_moe.checkpoints.source import missing_weight
from hf_sparse_moe.routing.mixture_layers import MixtureLayer, find_mixture_layers
from hf_sparse_moe.stock.tensors import Tensors, stored_tensors

from .mixture import Mixture


logger = logging.get_logger(__name__)

Read = Callable[[str], torch.Tensor]
Part = tuple[list[str], Callable[[Read], Tensors]]  # names, and what makes these tensors, reading each source once
_EXPERTS = re.compile(r"\bexperts\.")
_NUMBER = re.compile(r"(?<=\bexperts\.)((?:expert_)?)\d+(?=\.)")


@dataclass(frozen=True)
class ExpertRows:
    """
    The new experts of one sparse layer, of E experts before and N after.

    Args:
        sources (`Sequence[Sequence[int]]`): For each new expert, the old ones that it comes from; one each in a cut.
        combine (`Callable`, *optional*): Makes the layer's tensors with an expert axis, given those of before. Their
            names start at the sparse layer (`"experts.gate_up_proj"`, `"gate.weight"`); the expert axis is the first,
            E entries long and then N. On disk experts may be apart: `"experts.w1.weight"` then is the stack of
            `"experts.0.w1.weight"` and so on. Without it each new expert is a copy of its one source.
        finish (`Callable`, *optional*): Makes of such a name and the copies, `(N, ...)`, what is kept of them.
    """

    sources: Sequence[Sequence[int]]
    combine: Callable[[Tensors], Tensors] | None = None
    finish: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, copies: copies


class Rewriting:
    """
    All of a rewriting that is known before a weight is read.

    Args:
        mixture ([`Mixture`]): As it is.
        new (`PreTrainedModel`): As it will be, without storage.
        rows (`Mapping[int, ExpertRows]`): By the place of the layer; other layers stay as they are.
        stored (`Mapping[str, torch.Tensor]`): The mixture's tensors, by their names in memory or on disk. Only their
            shapes and dtypes are read.

    Raises:
        NotStreamableError: they have other names or forms than transformers would give them.
    """

    def __init__(
        self,
        mixture: Mixture,
        new: PreTrainedModel,
        rows: Mapping[int, ExpertRows],
        stored: Mapping[str, torch.Tensor],
    ):
        _require_all(mixture, stored)
        self.outputs: Tensors = {}
        self.parts: list[Part] = []
        new_layers = find_mixture_layers(new)
        # Layers that transformers does not read, as those that predict a second token: their experts would not fit.
        known = [name for form in mixture.forms(mixture.model, stored_tensors(mixture.model)) for name in form]
        ignored = mixture.model._keys_to_ignore_on_load_unexpected or ()
        unread = [each for each in ignored if not any(re.search(each, name) for name in known)]
        left = {name: tensor for name, tensor in stored.items() if not any(re.search(each, name) for each in unread)}
        if len(left) < len(stored):
            logger.warning(f"{len(stored) - len(left)} tensors that transformers does not read are left out.")
        for place, layer_rows in rows.items():
            stacks = _expert_stacks(mixture, place, new, new_layers[place], stored, len(layer_rows.sources))
            for stack in stacks:
                self.outputs |= stack.outputs(stored)
                for name in stack.names:
                    del left[name]
            if layer_rows.combine is None:
                kept = [only for (only,) in layer_rows.sources]
                self.parts += [part for stack in stacks for part in stack.cut(kept, layer_rows.finish)]
            else:
                self.parts.append(_combined(stacks, layer_rows.combine))
        for name, tensor in left.items():
            self.outputs[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            self.parts.append(([name], partial(_as_it_is, name)))


@dataclass(frozen=True)
class _Stack:
    """
    A tensor of all experts of a layer, or those of each.

    Args:
        short (`str`): Its name from the layer, without the number of an expert.
        names (`list[str]`): Where it is stored: under one name, or expert by expert.
        dim (`int`, *optional*): The expert axis; None where the experts are apart.
        rank (`int`): How many dimensions one of these tensors has.
        before (`int`), after (`int`): The experts.
    """

    short: str
    names: list[str]
    dim: int | None
    rank: int
    before: int
    after: int

    @property
    def new_names(self) -> list[str]:
        if self.dim is not None:
            return self.names
        return [_NUMBER.sub(rf"\g<1>{number}", self.names[0], count=1) for number in range(self.after)]

    def outputs(self, stored: Mapping[str, torch.Tensor]) -> Tensors:
        shape, dtype = list(stored[self.names[0]].shape), stored[self.names[0]].dtype
        if self.dim is not None:
            shape[self.dim] = shape[self.dim] // self.before * self.after
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name in self.new_names}

    def stacked(self, read: Read) -> torch.Tensor:
        """`(E, ...)`."""
        if self.dim is None:
            return torch.stack([read(name) for name in self.names])
        tensor = read(self.names[0])
        if tensor.shape[self.dim] != self.before:  # several entries an expert
            tensor = tensor.unflatten(self.dim, (self.before, -1))
        return tensor if self.dim == 0 else tensor.movedim(self.dim, 0)

    def split(self, stacked: torch.Tensor) -> Tensors:
        """The way back of `(N, ...)`."""
        if self.dim is None:
            return dict(zip(self.new_names, stacked, strict=True))
        tensor = stacked if self.dim == 0 else stacked.movedim(0, self.dim)
        if tensor.dim() != self.rank:
            tensor = tensor.flatten(self.dim, self.dim + 1)
        return {self.names[0]: tensor.contiguous()}

    def cut(self, kept: list[int], finish: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[Part]:
        if self.dim is None:
            for name, old in zip(self.new_names, kept, strict=True):
                yield [name], partial(_as_it_is, self.names[old], called=name)
        else:
            yield self.names, partial(self._cut_whole, kept, finish)

    def _cut_whole(
        self,
        kept: list[int],
        finish: Callable[[str, torch.Tensor], torch.Tensor],
        read: Read,
    ) -> Tensors:
        stacked = self.stacked(read)
        copies = stacked.index_select(0, torch.tensor(kept, device=stacked.device))
        return self.split(finish(self.short, copies))


def _as_it_is(name: str, read: Read, called: str | None = None) -> Tensors:
    return {called or name: read(name)}


def _combined(stacks: list[_Stack], combine: Callable[[Tensors], Tensors]) -> Part:
    def make(read: Read) -> Tensors:
        made = combine({stack.short: stack.stacked(read) for stack in stacks})
        parts = [stack.split(made[stack.short]) for stack in stacks]
        return {name: tensor for part in parts for name, tensor in part.items()}

    return [name for stack in stacks for name in stack.new_names], make


def _require_all(mixture: Mixture, stored: Mapping[str, torch.Tensor]) -> None:
    """What is stored must be in one of the two forms; where it is quantised, it has tensors of its own."""
    if getattr(mixture.model.config, "quantization_config", None) is not None:
        return
    forms = mixture.forms(mixture.model, stored_tensors(mixture.model))
    missing = [sorted(form.keys() - stored.keys()) for form in forms]
    if all(missing):
        fewest = min(missing, key=len)
        if 2 * len(fewest) < len(forms[0]):
            raise missing_weight(mixture.name, mixture.model, fewest[0])
        raise NotStreamableError(f"it lacks `{missing[-1][0]}`, or has it under another name")
    for name, tensor in forms[missing.index([])].items():
        if stored[name].shape != tensor.shape:
            raise ValueError(
                f"`{name}` of `{mixture.name}` has the shape {list(stored[name].shape)}, but its config asks for "
                f"{list(tensor.shape)}. Save the model again."
            )


def _expert_stacks(
    mixture: Mixture,
    place: int,
    new: PreTrainedModel,
    new_layer: MixtureLayer,
    stored: Mapping[str, torch.Tensor],
    after: int,
) -> list[_Stack]:
    layer = mixture.layers[place]
    before = layer.num_experts
    dims: dict[str, int | None] = {}
    known: set[str] = set()
    forms = (mixture.forms(model, _state(at)) for model, at in ((mixture.model, layer), (new, new_layer)))
    for form, new_form in zip(*forms, strict=True):
        known |= form.keys()
        for name, tensor in form.items():
            if _NUMBER.search(name):
                dims[name] = None
            elif tensor.shape != new_form[name].shape:
                pairs = enumerate(zip(tensor.shape, new_form[name].shape, strict=True))
                dims[name] = dim = next(dim for dim, (old, other) in pairs if old != other)
                if tensor.shape[dim] % before:
                    raise ValueError(
                        f"`{name}` of `{mixture.name}` has {tensor.shape[dim]} rows for {before} experts: its router "
                        "also chooses among other things than experts, which this package does not cut."
                    )
    inside = {name[: found.end()] for name in known if (found := _EXPERTS.search(name))}
    for name, tensor in stored.items():  # codes and scales of quantised experts
        if name not in known and name.startswith(tuple(inside)):
            if not _NUMBER.search(name) and (tensor.dim() == 0 or tensor.shape[0] != before):
                raise ValueError(f"`{name}` of `{mixture.name}` is no tensor of {before} experts, and cannot be cut.")
            dims[name] = None if _NUMBER.search(name) else 0
    stacks: dict[str, _Stack] = {}
    for name in sorted(dims.keys() & stored.keys(), key=dot_natural_key):
        short = _short(name, layer, inside)
        stacks.setdefault(short, _Stack(short, [], dims[name], stored[name].dim(), before, after)).names.append(name)
    for stack in stacks.values():
        if stack.dim is None and len(stack.names) != before:
            raise ValueError(f"`{mixture.name}` has `{stack.names[0]}` of {len(stack.names)} of its {before} experts.")
    if not stacks:
        raise NotStreamableError(f"it has no experts for `{layer.name}`")
    return list(stacks.values())


def _state(layer: MixtureLayer) -> Tensors:
    return {f"{layer.name}.{name}": tensor for name, tensor in layer.block.state_dict().items()}


def _short(name: str, layer: MixtureLayer, inside: set[str]) -> str:
    """The name from the layer, whatever that is called on disk."""
    bare = _NUMBER.sub("", name, count=1).replace("experts..", "experts.")
    for prefix in inside:
        if name.startswith(prefix):
            return f"experts.{bare[len(prefix) :]}"
        owner = prefix.removesuffix("experts.")
        if name.startswith(owner):
            return bare[len(owner) :]
    return bare.removeprefix(f"{layer.name}.")
