"""Where a dense model keeps its feed-forwards, told by their structure, never by the architecture's name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from .feed_forward_layouts import FEED_FORWARD_LAYOUTS, FeedForwardLayout, list_feed_forward_layouts


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward found in a model. H hidden, I intermediate."""

    path: str  # of the owner
    layout: FeedForwardLayout
    owner: nn.Module

    def part(self, name: str) -> nn.Module:
        return _part(self.owner, name)

    @property
    def block_path(self) -> str:
        """Where the sparse block goes."""
        if not self.layout.inline:
            return self.path
        return f"{self.path}.{self.activation_name if self.activates_in_code else self.layout.up[0]}"

    @property
    def hidden_size(self) -> int:
        return _features(self.part(self.layout.down))[1]

    @property
    def intermediate_size(self) -> int:
        return _features(self.part(self.layout.down))[0]

    @property
    def biased(self) -> bool:
        return self.part(self.layout.down).bias is not None

    @property
    def activation_name(self) -> str:
        return next(name for name in self.layout.activations if _part(self.owner, name) is not None)

    @property
    def activation(self) -> Callable[[torch.Tensor], torch.Tensor]:
        activation = self.part(self.activation_name)
        return _hollow(activation, self.layout, self.activation_name) if self.activates_in_code else activation

    @property
    def activates_in_code(self) -> bool:
        return _is_in_code(self.layout, self.activation_name)

    @property
    def inner_dropout(self) -> float:
        return self._dropout(self.layout.inner_dropout)

    @property
    def outer_dropout(self) -> float:
        return self._dropout(self.layout.outer_dropout)

    def _dropout(self, names: tuple[str, ...]) -> float:
        name = _first(self.owner, names)
        dropout: Any = 0.0 if name is None else self.part(name)
        return dropout.p if isinstance(dropout, nn.Dropout) else float(dropout)

    def parameter_names(self, kind: str) -> tuple[list[str], str]:
        """Names, from the owner, of the `"weight"` or `"bias"` of the first projections and of the second."""
        return [f"{up}.{kind}" for up in self.layout.up], f"{self.layout.down}.{kind}"

    @property
    def transposed(self) -> bool:
        """Whether weights are stored (in, out), as GPT-2's `Conv1D` does."""
        return isinstance(self.part(self.layout.down), Conv1D)


def find_feed_forwards(dense: nn.Module) -> list[FeedForward]:
    """
    The feed-forwards of a dense model, in the order of its modules.

    Raises:
        ValueError: the model is a mixture already, has no feed-forward of a known layout, or one that computes more.
    """
    found = list(_matches(dense))
    obstacle = _obstacle(dense, found)
    if obstacle is not None:
        raise ValueError(obstacle)
    if not found:
        raise ValueError(
            f"`{type(dense).__name__}` has no feed-forward of a known layout. Known are "
            f"{', '.join(list_feed_forward_layouts())}; architectures without feed-forward layers (Mamba, RWKV, ...) "
            "cannot become a mixture. `explain_layouts` tells how close the model comes; for another naming, add a "
            "row to `FEED_FORWARD_LAYOUTS` in feed_forward_layouts.py."
        )
    return found


def _obstacle(dense: nn.Module, found: list[FeedForward]) -> str | None:
    """Why a model with known feed-forwards cannot become a mixture all the same."""
    name = type(dense).__name__
    sparse = next((path for path, _ in dense.named_modules() if path.rpartition(".")[2] == "experts"), None)
    if sparse is not None:
        return f"`{name}` is a mixture of experts already (`{sparse}`). Pass a dense model."
    tied = getattr(dense, "all_tied_weights_keys", {})
    tied = {*tied, *tied.values()}
    for feed_forward in found:
        if f"{feed_forward.path}.{feed_forward.layout.down}.weight" in tied:
            return (
                f"`{feed_forward.path}` of `{name}` is tied to the feed-forward of another layer. Pass a model whose "
                "layers have feed-forwards of their own, or share the whole module."
            )
        if "patcher" in feed_forward.path.split("."):
            return (
                f"`{feed_forward.path}` of `{name}` is part of a model that cuts bytes into patches without "
                "gradients, where experts could not learn. Pass a model of tokens."
            )
        for attribute in feed_forward.layout.forbidden:
            if getattr(feed_forward.owner, attribute, None):
                return (
                    f"`{feed_forward.path}.{attribute}` of `{name}` makes the feed-forward compute what experts do "
                    "not. Pass a model without it."
                )
    return None


@dataclass(frozen=True)
class LayoutReport:
    """
    What [`explain_layouts`] found.

    Args:
        model (`str`): The class of the model.
        matches (`dict[str, list[str]]`): Layout names to the paths of the feed-forwards that have it.
        obstacle (`str`, *optional*): Why the model cannot become a mixture, whatever matches.
        nearest (`list[tuple[str, str, list[str]]]`):
            Where nothing matches: path, layout and differences of the modules that come closest, one of each class.
    """

    model: str
    matches: dict[str, list[str]]
    obstacle: str | None
    nearest: list[tuple[str, str, list[str]]]

    @property
    def supported(self) -> bool:
        """Whether the model can become a mixture."""
        return bool(self.matches) and self.obstacle is None

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, for JSON."""
        return asdict(self) | {"supported": self.supported}

    def __str__(self) -> str:
        lines = [f"{self.model}: {'can' if self.supported else 'cannot'} become a mixture of experts"]
        if self.obstacle is not None:
            lines.append(f"  {self.obstacle}")
        for layout, paths in self.matches.items():
            lines.append(f"  layout {layout}: {len(paths)} feed-forwards, {paths[0]} to {paths[-1]}")
        for path, layout, differences in self.nearest:
            lines.append(f"  nearest: `{path}` is not {layout}, because {' and '.join(differences)}")
        if not self.matches and not self.nearest:
            lines.append("  no module has projections of a known name")
        return "\n".join(lines)


def explain_layouts(model_or_config: PreTrainedModel | PreTrainedConfig) -> LayoutReport:
    """
    Tell where which layout matches, and where none does, which comes nearest and what differs.

    Args:
        model_or_config (`PreTrainedModel` or `PreTrainedConfig`):
            A dense model; of a config the language model, or else the bare model, is built without storage.

    Example:
        ```python
        print(explain_layouts(AutoConfig.from_pretrained("gpt2")))
        ```
    """
    dense = model_or_config if isinstance(model_or_config, nn.Module) else _build_without_storage(model_or_config)
    matches: dict[str, list[str]] = {}
    found = list(_matches(dense))
    for feed_forward in found:
        matches.setdefault(feed_forward.layout.name, []).append(feed_forward.path)
    nearest = [] if matches else _nearest(dense)
    return LayoutReport(type(dense).__name__, matches, _obstacle(dense, found), nearest)


def _build_without_storage(config: PreTrainedConfig) -> PreTrainedModel:
    mappings = ((AutoModelForSeq2SeqLM, config.is_encoder_decoder), (AutoModelForMaskedLM, True))
    heads = [auto for auto, wanted in (*mappings, (AutoModelForCausalLM, True)) if wanted]
    auto_class = next((auto for auto in heads if type(config) in auto._model_mapping), AutoModel)
    with torch.device("meta"):
        return auto_class.from_config(config)


def _nearest(dense: nn.Module) -> list[tuple[str, str, list[str]]]:
    """The modules that have the most projections of a layout, at least half of them, one of each class."""
    found: dict[type, tuple[float, str, str, list[str]]] = {}
    for path, module in dense.named_modules():
        if isinstance(module, nn.ModuleList):
            continue
        for layout in FEED_FORWARD_LAYOUTS:
            names = (*layout.up, layout.down)
            share = sum(isinstance(_part(module, name), nn.Module) for name in names) / len(names)
            if share >= 0.5 and share > found.get(type(module), (0.0,))[0]:
                found[type(module)] = (share, path, layout.name, list(_differences(module, layout)))
    best = max((entry[0] for entry in found.values()), default=0.0)
    return [(path, layout, differences) for share, path, layout, differences in found.values() if share == best]


def feed_forward_side(dense: PreTrainedModel, feed_forward: FeedForward, family_side: str) -> str:
    """`"encoder"` or `"decoder"`: for an encoder-decoder told by the module tree, else `family_side`."""
    if not dense.config.is_encoder_decoder:
        return family_side
    encoder_modules = {id(module) for module in dense.get_encoder().modules()}
    return "encoder" if id(feed_forward.owner) in encoder_modules else "decoder"


def _matches(dense: nn.Module) -> Iterator[FeedForward]:
    for path, module in dense.named_modules():
        for layout in FEED_FORWARD_LAYOUTS:
            if layout.up[0].partition(".")[0] not in module._modules:
                continue  # most modules have no projection at all
            if next(_differences(module, layout), None) is None:
                yield FeedForward(path, layout, module)
                break


def _differences(module: nn.Module, layout: FeedForwardLayout) -> Iterator[str]:
    """In what a module is not of a layout, the coarsest first; nothing where it is."""
    parts = {name: _part(module, name) for name in (*layout.up, layout.down)}
    wrong = {name: part for name, part in parts.items() if not isinstance(part, (nn.Linear, Conv1D))}
    for name, part in wrong.items():
        yield f"it has no `{name}`" if part is None else f"`{name}` is no linear layer but `{type(part).__name__}`"
    activation = _first(module, layout.activations)
    if activation is None or isinstance(_part(module, activation), nn.Linear):
        activation = None
        yield f"its activation is none of {', '.join(f'`{name}`' for name in layout.activations)}"
    if wrong or activation is None:
        return
    *ups, down = parts.values()
    intermediate, hidden = _features(down)
    rows = 2 * intermediate if layout.packed else intermediate
    if any(_features(up) != (hidden, rows) for up in ups):
        yield f"its projections are not {hidden} to {rows} and {intermediate} to {hidden} features"
    if len({part.bias is None for part in parts.values()}) > 1:
        yield "only some of its projections have a bias"
    yield from (f"it also has `{name}`" for name in _lost_parts(module, layout, activation))
    arguments = inspect.signature(module.forward).parameters.values()
    required = [a for a in arguments if a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD]
    if not layout.inline and len(required) != 1:  # none at all: a list of modules
        names = ", ".join(f"`{argument.name}`" for argument in arguments)
        yield f"it is called with {names} instead of the hidden states alone"


def _lost_parts(module: nn.Module, layout: FeedForwardLayout, activation: str) -> Iterator[str]:
    """Names of what takes part in the feed-forward beside what the layout knows, and would be lost."""
    in_code = _is_in_code(layout, activation)
    known = [*layout.up, layout.down, *layout.inner_dropout, *layout.outer_dropout, *([] if in_code else [activation])]

    def is_known(name: str) -> bool:
        return any(f"{name}.".startswith(f"{part}.") for part in known)

    if layout.inline and not in_code:  # the rest of the layer stays, but a norm between the projections cannot
        intermediate, hidden = _features(_part(module, layout.down))
        for holder in dict.fromkeys(name.rpartition(".")[0] for name in (layout.up[0], layout.down)):
            for name, child in module.get_submodule(holder).named_children():
                shapes = {_shape(parameter) for parameter in child.parameters()}
                if (
                    shapes == {(intermediate,)}
                    and intermediate != hidden
                    and not is_known(f"{holder}.{name}".strip("."))
                ):
                    yield f"{holder}.{name}".strip(".")
        return
    prefix = f"{activation}." if layout.inline else ""
    for name, child in module.named_modules():
        if name.startswith(prefix) and next(child.children(), None) is None and not is_known(name):
            yield name
    yield from (name for name in module._parameters if not layout.inline)


def _is_in_code(layout: FeedForwardLayout, activation: str) -> bool:
    """Whether the activation is a function in the code of the module that holds the first projection."""
    return activation == "" or layout.up[0].startswith(f"{activation}.")


class _Ones(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(hidden_states)


def _hollow(module: nn.Module, layout: FeedForwardLayout, path: str) -> nn.Module:
    """
    A copy of `module`, `path` of the owner, that computes the activation alone: its projections pass on what they get,
    and the one beside the gate gives ones.
    """
    hollow = copy.copy(module)
    hollow._modules = dict(module._modules)
    gate, *beside = layout.up
    for name, child in [(gate, nn.Identity()), *((name, _Ones()) for name in beside), (layout.down, nn.Identity())]:
        name = name.removeprefix(f"{path}.")
        if name in hollow._modules:
            hollow._modules[name] = child
    return hollow


def _shape(parameter: Any) -> torch.Size:
    """Also where DeepSpeed's ZeRO-3 has emptied the parameter, as it does while a model is built."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _features(projection: nn.Module) -> tuple[int, int]:
    rows, columns = _shape(projection.weight)
    return (rows, columns) if isinstance(projection, Conv1D) else (columns, rows)


def _part(module: nn.Module, name: str) -> Any:
    part: Any = module
    for attribute in filter(None, name.split(".")):
        part = getattr(part, attribute, None)
    return part


def _first(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if _part(module, name) is not None), None)
