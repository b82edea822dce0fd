"""Where a dense model keeps its feed-forwards, told by their structure, never by the architecture's name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class FeedForwardLayout:
    """
    One way of naming the parts of a feed-forward. Names are attributes of its owner; dots descend.

    A layout is data: to support a new one, add a row to `FEED_FORWARD_LAYOUTS`.

    Args:
        name (`str`): How `list_feed_forward_layouts` calls it.
        up (`tuple[str, ...]`): The first projection; two where gate and up are apart, the gate first.
        down (`str`): The second projection.
        activations (`tuple[str, ...]`):
            Where the activation may be. Where it is a function in the code of the module that holds the first
            projection: that module, `""` for the owner.
        packed (`bool`): Whether one first projection holds gate and up, the gate's rows first.
        inner_dropout (`tuple[str, ...]`): Dropout between activation and `down`: a module, or a probability.
        outer_dropout (`tuple[str, ...]`): Dropout after `down`, inside the owner.
        inline (`bool`):
            Whether the owner is the whole layer. Then the block takes the place of the first projection, and
            activation and `down` become identities, so that the layer's own dropout and residual stay in place.
            Else the owner is nothing but the feed-forward, and the block takes its place.
        forbidden (`tuple[str, ...]`):
            Attributes that, where they are set, make the owner compute more than `down(act(up(x)))`.
        example (`str`): Architectures that use it.
    """

    name: str
    up: tuple[str, ...]
    down: str
    activations: tuple[str, ...]
    packed: bool = False
    inner_dropout: tuple[str, ...] = ()
    outer_dropout: tuple[str, ...] = ()
    inline: bool = False
    forbidden: tuple[str, ...] = ()
    example: str = ""

    @property
    def gated(self) -> bool:
        return self.packed or len(self.up) == 2


FEED_FORWARD_LAYOUTS = (
    FeedForwardLayout(
        "gate_up_down",
        ("gate_proj", "up_proj"),
        "down_proj",
        ("act_fn", "activation_fn", "act"),
        inner_dropout=("dropout",),
        forbidden=("activation_sparsity",),
        example="Llama, Qwen, Mistral, Gemma, OLMo, SmolLM3, EuroBERT, T5Gemma",
    ),
    FeedForwardLayout("w1_w3_w2", ("w1", "w3"), "w2", ("act_fn", "activation_fn", "act", ""), example="LFM2"),
    FeedForwardLayout(
        "w_0_w_1_w_out",
        ("w_in.w_0", "w_in.w_1"),
        "w_out",
        ("w_in.act",),
        inner_dropout=("dropout",),
        example="CPM-Ant",
    ),
    FeedForwardLayout("wi_0_wi_1_wo", ("wi_0", "wi_1"), "wo", ("act",), inner_dropout=("dropout",), example="T5 v1.1"),
    FeedForwardLayout(
        "packed_gate_up", ("gate_up_proj",), "down_proj", ("activation_fn", "act_fn"), packed=True, example="Phi-3"
    ),
    FeedForwardLayout(
        "packed_wi_wo", ("Wi",), "Wo", ("act",), packed=True, inner_dropout=("drop",), example="ModernBERT"
    ),
    FeedForwardLayout("packed_fc1_fc2", ("fc1",), "fc2", ("activation_fn",), packed=True, example="Moshi"),
    FeedForwardLayout(
        "packed_input_output",
        ("input_linear",),
        "output_linear",
        ("activation",),
        packed=True,
        example="Granite 4.0 without experts",
    ),
    FeedForwardLayout("wi_wo", ("wi",), "wo", ("act",), inner_dropout=("dropout",), example="T5"),
    FeedForwardLayout(
        "c_fc_c_proj",
        ("c_fc",),
        "c_proj",
        ("act", "act_fn"),
        outer_dropout=("dropout", "residual_dropout"),
        example="GPT-2, StarCoder2",
    ),
    FeedForwardLayout("dense_4h", ("dense_h_to_4h",), "dense_4h_to_h", ("act", "act_fn"), example="GPT-NeoX, Falcon"),
    FeedForwardLayout("up_down", ("up_proj",), "down_proj", ("act_fn", "activation_fn", "act"), example="Nemotron"),
    FeedForwardLayout(
        "fc_in_fc_out", ("fc_in",), "fc_out", ("act",), outer_dropout=("dropout",), example="GPT-J, CodeGen"
    ),
    FeedForwardLayout(
        "lin1_lin2", ("lin1",), "lin2", ("activation", "act"), outer_dropout=("dropout",), example="DistilBERT"
    ),
    FeedForwardLayout("fc1_fc2", ("fc1",), "fc2", ("activation_fn", "act", "act_fn"), example="Phi"),
    FeedForwardLayout(
        "fc1_dropout_fc2", ("fc1",), "fc2", ("act",), inner_dropout=("dropout",), example="SeamlessM4T, dense NLLB-MoE"
    ),
    FeedForwardLayout(
        "intermediate_output",
        ("intermediate",),
        "output",
        ("activation_fn",),
        inner_dropout=("activation_dropout",),
        outer_dropout=("dropout",),
        example="ProphetNet",
    ),
    FeedForwardLayout("dense1_dense2", ("dense1",), "dense2", ("intermediate_act_fn",), example="Perceiver"),
    FeedForwardLayout("sequential", ("0",), "2", ("1",), example="CTRL"),
    FeedForwardLayout(
        "inline_fc1_fc2",
        ("fc1",),
        "fc2",
        ("activation_fn",),
        inner_dropout=("activation_dropout",),
        inline=True,
        example="BART, mBART, Marian, Pegasus, M2M-100, OPT",
    ),
    FeedForwardLayout(
        "split_intermediate_output",
        ("intermediate.dense",),
        "output.dense",
        ("intermediate.intermediate_act_fn",),
        inline=True,
        example="BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa",
    ),
    FeedForwardLayout(
        "split_activation_in_code",
        ("intermediate.dense",),
        "output.dense",
        ("intermediate",),
        inline=True,
        example="ESM",
    ),
    FeedForwardLayout(
        "split_dense_output",
        ("dense.dense",),
        "output.dense",
        ("dense.act_fn",),
        inner_dropout=("dense.dropout",),
        inline=True,
        example="Reformer",
    ),
    FeedForwardLayout(
        "inline_dense_4h", ("dense_h_to_4h",), "dense_4h_to_h", ("gelu_impl",), inline=True, example="Bloom"
    ),
    FeedForwardLayout("inline_up_down", ("up_proj",), "down_proj", ("act",), inline=True, example="MPT"),
    FeedForwardLayout("inline_ffn_output", ("ffn",), "ffn_output", ("activation",), inline=True, example="ALBERT"),
    FeedForwardLayout(
        "inline_linear_1_linear_2",
        ("linear_1",),
        "linear_2",
        ("activation_function",),
        inner_dropout=("activation_dropout",),
        inline=True,
        example="Funnel",
    ),
    # One dropout serves both places: it stays, and acts twice on the output in training.
    FeedForwardLayout(
        "inline_layer_1_layer_2", ("layer_1",), "layer_2", ("activation_function",), inline=True, example="XLNet"
    ),
)


def list_feed_forward_layouts() -> dict[str, str]:
    """The known layouts: name to the architectures that use it."""
    return {layout.name: layout.example for layout in FEED_FORWARD_LAYOUTS}


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
        ValueError: the model is a mixture already, or has no feed-forward of a known layout.
    """
    found = list(_matches(dense))
    sparse = next((name for name, _ in dense.named_modules() if name.rpartition(".")[2] == "experts"), None)
    name = type(dense).__name__
    if sparse is not None:
        raise ValueError(f"`{name}` is a mixture of experts already (`{sparse}`). Pass a dense model.")
    for feed_forward in found:
        forbidden = next((name for name in feed_forward.layout.forbidden if getattr(feed_forward.owner, name, None)), None)
        if forbidden is not None:
            raise ValueError(
                f"`{name}` cannot become a mixture: `{feed_forward.path}.{forbidden}` changes what the feed-forward "
                "computes in a way that experts cannot follow."
            )
    if not found:
        raise ValueError(
            f"`{name}` has no feed-forward of a known layout. Known are {', '.join(list_feed_forward_layouts())}; "
            "architectures without feed-forward layers (Mamba, RWKV, ...) cannot become a mixture. For another "
            "naming, add a row to `FEED_FORWARD_LAYOUTS` in feed_forward.py."
        )
    return found


def feed_forward_side(dense: PreTrainedModel, feed_forward: FeedForward, family_side: str) -> str:
    """`"encoder"` or `"decoder"`: for an encoder-decoder told by the module tree, else `family_side`."""
    if not dense.config.is_encoder_decoder:
        return family_side
    encoder_modules = {id(module) for module in dense.get_encoder().modules()}
    return "encoder" if id(feed_forward.owner) in encoder_modules else "decoder"


def _matches(dense: nn.Module) -> Iterator[FeedForward]:
    for path, module in dense.named_modules():
        for layout in FEED_FORWARD_LAYOUTS:
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
    if activation is None:
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
    if not layout.inline and sum(argument.default is argument.empty for argument in arguments) != 1:
        names = ", ".join(f"`{argument.name}`" for argument in arguments)
        yield f"it is called with {names} instead of the hidden states alone"


def _lost_parts(module: nn.Module, layout: FeedForwardLayout, activation: str) -> Iterator[str]:
    """Names of what takes part in the feed-forward beside what the layout knows, and would be lost."""
    in_code = _is_in_code(layout, activation)
    known = [*layout.up, layout.down, *layout.inner_dropout, *layout.outer_dropout, *([] if in_code else [activation])]

    def is_known(name: str) -> bool:
        return any(f"{name}.".startswith(f"{part}.") for part in known)

    if layout.inline and not in_code:  # the rest of the layer stays; a norm between the projections cannot
        intermediate, hidden = _features(_part(module, layout.down))
        for name, parameter in module.named_parameters():
            if parameter.shape == (intermediate,) and intermediate != hidden and not is_known(name):
                yield name
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


def _features(projection: nn.Module) -> tuple[int, int]:
    rows, columns = projection.weight.shape
    return (rows, columns) if isinstance(projection, Conv1D) else (columns, rows)


def _part(module: nn.Module, name: str) -> Any:
    part: Any = module
    for attribute in filter(None, name.split(".")):
        part = getattr(part, attribute, None)
    return part


def _first(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if _part(module, name) is not None), None)
