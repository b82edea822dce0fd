"""`merge_experts`: several experts become one. E experts before, N after, I units, H hidden."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_sparse_moe.insight.losses import Evaluation
from hf_sparse_moe.models.quantized_weight import QuantizedWeight
from hf_sparse_moe.routing.mixture_layers import MixtureLayer
from hf_sparse_moe.stock.tensors import Tensors

from .alignment import matching_units, mean, require_scipy
from .expert_axes import ExpertRows
from .measurements import ExpertMeasurements
from .mixture import Mixture, router_tensors
from .pruning import check_rest, count_of, layer_at, router_groups
from .rewriting import Plan, require_numbers, rewrite


METHODS = ("hc", "m-smoe", "ream")
_SECOND = re.compile(r"\b(down_proj|w2|wo|fc2|output_linear)")  # of an expert's projections, the one back to H
Groups = list[list[int]]  # the experts of each new one, the dominant one first


def merge_experts(
    source: PreTrainedModel | str | Path,
    measured: ExpertMeasurements | str | Path,
    into: int | float | Mapping[int, int | float],
    method: str = "hc",
    align: bool = True,
    output: str | Path | None = None,
    *,
    evaluation: Evaluation | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
) -> Any:
    """
    Make a mixture with fewer experts, each the mean of some of a mixture of this package or of transformers.

    A group's most salient expert dominates it: the new expert has its router row and selection bias, and the others'
    hidden units are put in the order of its own before the mean, which is weighted by salience. Every layer's groups
    come from `measured`; they are not measured again after the layers before were merged.

    Args:
        source (`PreTrainedModel`, `str` or `Path`): A mixture, which is left as it is, or the folder or Hub id of one.
        measured ([`ExpertMeasurements`], `str` or `Path`): What [`measure_experts`] found, or its file.
        into (`int`, `float` or `dict`): How many experts of a layer there will be, or which share of them, such as
            0.75; a `dict` says so for some layers, by their places from 0.
        method (`str`, defaults to `"hc"`): `"hc"`: average-linkage clusters of the mean outputs (HC-SMoE, arXiv
            2410.08589), weighted by REAP; `"m-smoe"`: the most frequent experts, each with those whose router logits
            are most like its own, weighted by frequency (arXiv 2310.01334); `"ream"`: the most salient experts by
            REAP, each with those whose outputs are most like its own, weighted by REAP (arXiv 2604.04356).
        align (`bool`, defaults to `True`): Whether hidden units are matched; needs scipy, as `"hc"` does.
        output (`str` or `Path`, *optional*): A folder that does not exist yet, or is empty, to write the mixture to,
            layer by layer where `source` is a folder or Hub id.
        evaluation (`tuple`, *optional*): Batches and the group of each of their sequences, as for [`measure_experts`],
            on which the receipt tells the loss before and after. Both models are loaded for it.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights, with `output`.
        resume (`bool`, defaults to `False`): With `output`, continue an interrupted call from its finished shards.
        show_progress (`bool`, defaults to `False`): With `output`, a bar with rate and time left, on stderr.

    Returns:
        `PreTrainedModel`: The merged model, in evaluation mode; with `output`, a [`SurgeryReport`].

    Raises:
        ValueError: not a mixture, quantised experts, hash routing, measurements of another model, more experts a token
            than there will be, or numbers that the architecture cannot hold.
        OSError: `output` is taken, or its disk is too small.

    Example:
        ```python
        measured = measure_experts(model, batches)
        merged = merge_experts(model, measured, into=0.75)
        ```
    """
    if method not in METHODS:
        raise ValueError(f"`method={method!r}` is not allowed: it must be one of {METHODS}.")

    def merge(mixture: Mixture) -> Plan:
        found = _groups_by_layer(mixture, measured, into, method)
        rows = {
            place: ExpertRows(groups, partial(_merge, mixture, place, groups, weights, align))
            for place, (groups, weights) in found.items()
        }
        names = {mixture.layers[place].name: groups for place, (groups, _) in found.items()}
        return Plan(rows, {"method": method, "align": align, "groups": names})

    settings = (max_shard_size, resume, show_progress)
    return rewrite("merged", merge, source, output, evaluation, revision, token, *settings)


def _groups_by_layer(
    mixture: Mixture, measured: Any, into: Any, method: str
) -> dict[int, tuple[Groups, list[list[float]]]]:
    """For each layer that loses experts the groups, in the order of their dominant experts, and their weights."""
    layers, measured = mixture.layers, ExpertMeasurements.of(measured)
    measured.check_text(mixture.folder)
    wanted = into if isinstance(into, Mapping) else dict.fromkeys(range(len(layers)), into)
    found = {}
    for place, count in wanted.items():
        layer = layer_at(layers, place, "into")
        count = count_of(layer, place, count, "into")
        if router_groups(layer)[0] > 1:
            raise ValueError(f"The router of layer {place} limits the groups of experts, which merging would break.")
        check_rest(layer, place, list(range(count)))
        if count < layer.num_experts:
            facts = measured.check(layer, router_tensors(mixture, layer))
            salience = facts.frequency if method == "m-smoe" else facts.reap
            if method == "hc":
                groups = _clusters(facts.found("mean_outputs"), count)
            else:
                alike = _alike(facts.found("logits")) if method == "m-smoe" else facts.found("similarity")
                groups = _around(salience, alike, count)
            groups = sorted(sorted(group, key=lambda e: -salience[e]) for group in groups)
            weights = [salience[group].clamp(min=1e-12) for group in groups]
            found[place] = (groups, [(each / each.sum()).tolist() for each in weights])
    return found


def _alike(logits_SE: torch.Tensor) -> torch.Tensor:
    """`(E, E)`: the cosines of the experts' logits over the tokens."""
    unit_SE = torch.nn.functional.normalize(logits_SE, dim=0)
    return unit_SE.T @ unit_SE


def _around(salience_E: torch.Tensor, likeness_EE: torch.Tensor, count: int) -> Groups:
    """The most salient experts, each with those that are more like it than like the others."""
    dominant = salience_E.argsort(descending=True, stable=True)[:count]
    nearest_E = dominant[likeness_EE[:, dominant].argmax(dim=1)]
    nearest_E[dominant] = dominant
    return [(nearest_E == each).nonzero().flatten().tolist() for each in dominant]


def _clusters(outputs_EH: torch.Tensor, count: int) -> Groups:
    hierarchy = require_scipy("cluster.hierarchy")
    labels = hierarchy.cut_tree(hierarchy.linkage(outputs_EH.double().numpy(), "average"), count).flatten()
    return [(labels == label).nonzero()[0].tolist() for label in range(count)]


def _merge(
    mixture: Mixture, place: int, groups: Groups, weights: Sequence[Sequence[float]], align: bool, tensors: Tensors
) -> Tensors:
    """A layer's tensors of the new experts."""
    layer = mixture.layers[place]
    # Granite's files have the stacked projections beside the router.
    experts = {name: tensor for name, tensor in tensors.items() if name.startswith("experts.") or tensor.dim() == 3}
    for name, tensor in experts.items():
        if not tensor.is_floating_point() or tensor.itemsize == 1 or isinstance(tensor, QuantizedWeight):
            raise ValueError(f"`{name}` of `{mixture.name}` is quantised. Merge the experts, then quantise them.")
        require_numbers(f"{layer.name}.{name}", tensor)
    axes = _UnitAxes(layer, experts, mixture.model.config.get_text_config().hidden_size)
    made = {name: tensor[[group[0] for group in groups]] for name, tensor in tensors.items()}
    for new, (group, shares) in enumerate(zip(groups, weights, strict=True)):
        members = [{name: tensor[expert] for name, tensor in experts.items()} for expert in group]
        if align:
            first, *others = members
            members = [first, *(axes.matched(other, first) for other in others)]
        for name in experts:
            made[name][new] = mean([member[name] for member in members], shares).to(made[name].dtype)
    return made


class _UnitAxes:
    """Which axis of each of an expert's tensors its I hidden units are on, and how often they are on it."""

    def __init__(self, layer: MixtureLayer, experts: Tensors, hidden: int):
        self.packed_in_turn = not getattr(layer.experts, "is_concatenated", True)
        transposed = getattr(layer.experts, "is_transposed", False)
        self.axes: dict[str, int] = {}
        sizes = {}
        for name, tensor in experts.items():
            second = bool(_SECOND.search(name))
            if tensor.dim() == 2 and second:
                continue  # the bias of the output
            ends = tensor.shape[1:]
            if tensor.dim() == 3 and len(set(ends)) > 1:  # (H, units) or the other way round
                self.axes[name] = 0 if ends[1] == hidden else 1
            else:
                self.axes[name] = 0 if tensor.dim() == 2 else int(second != transposed)
            sizes[name] = ends[self.axes[name]]
        self.units = min(sizes.values())
        self.times = {name: size // self.units for name, size in sizes.items()}

    def matched(self, expert: Tensors, to: Tensors) -> Tensors:
        """An expert's tensors with its hidden units in the order of those of `to`."""
        order = matching_units(self._by_unit(expert), self._by_unit(to))
        made = dict(expert)
        for name, axis in self.axes.items():
            places = self._places(name)[order]
            index = (places if self.packed_in_turn else places.T).flatten()
            made[name] = expert[name].index_select(axis, index.to(expert[name].device))
        return made

    def _by_unit(self, expert: Tensors) -> torch.Tensor:
        """`(I, features)`: all weights of each unit."""
        parts = (expert[name].movedim(axis, 0)[self._places(name)] for name, axis in self.axes.items())
        return torch.cat([part.flatten(1).float().cpu() for part in parts], dim=1)

    def _places(self, name: str) -> torch.Tensor:
        """`(I, times)`: where a unit's entries are."""
        every = torch.arange(self.units * self.times[name])
        return every.view(-1, self.times[name]) if self.packed_in_turn else every.view(self.times[name], -1).T
