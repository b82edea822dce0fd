"""Where a dense model keeps its feed-forwards, told by their structure, never by the architecture's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
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
        activations (`tuple[str, ...]`): Where the activation may be.
        packed (`bool`): Whether one first projection holds gate and up, the gate's rows first.
        inner_dropout (`tuple[str, ...]`): Dropout between activation and `down`: a module, or a probability.
        outer_dropout (`tuple[str, ...]`): Dropout after `down`, inside the owner.
        inline (`bool`):
            Whether the owner is the whole layer. Then the block takes the place of the first projection, and
            activation and `down` become identities, so that the layer's own dropout and residual stay in place.
            Else the owner is nothing but the feed-forward, and the block takes its place.
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
        example="Llama, Qwen, Mistral, Gemma, OLMo, SmolLM3, EuroBERT, T5Gemma",
    ),
    FeedForwardLayout("w1_w3_w2", ("w1", "w3"), "w2", ("act_fn", "activation_fn", "act"), example="LFM2"),
    FeedForwardLayout("wi_0_wi_1_wo", ("wi_0", "wi_1"), "wo", ("act",), inner_dropout=("dropout",), example="T5 v1.1"),
    FeedForwardLayout(
        "packed_gate_up", ("gate_up_proj",), "down_proj", ("activation_fn", "act_fn"), packed=True, example="Phi-3"
    ),
    FeedForwardLayout(
        "packed_wi_wo", ("Wi",), "Wo", ("act",), packed=True, inner_dropout=("drop",), example="ModernBERT"
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
        return attrgetter(name)(self.owner)

    @property
    def block_path(self) -> str:
        """Where the sparse block goes."""
        return f"{self.path}.{self.layout.up[0]}" if self.layout.inline else self.path

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
        return self.part(self.activation_name)

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
            if _is_match(module, layout):
                yield FeedForward(path, layout, module)
                break


def _is_match(module: nn.Module, layout: FeedForwardLayout) -> bool:
    activation = _first(module, layout.activations)
    projections = [_part(module, name) for name in (*layout.up, layout.down)]
    if activation is None or not all(isinstance(part, (nn.Linear, Conv1D)) for part in projections):
        return False
    if not layout.inline:  # the owner must hold nothing that the block would lose
        known = {*layout.up, layout.down, activation, *layout.inner_dropout, *layout.outer_dropout}
        if any(name not in known for name, _ in module.named_children()):
            return False
    *ups, down = projections
    intermediate, hidden = _features(down)
    rows = 2 * intermediate if layout.packed else intermediate
    same_bias = len({part.bias is None for part in projections}) == 1
    return same_bias and all(_features(up) == (hidden, rows) for up in ups)


def _features(projection: nn.Module) -> tuple[int, int]:
    rows, columns = projection.weight.shape
    return (rows, columns) if isinstance(projection, Conv1D) else (columns, rows)


def _part(module: nn.Module, name: str) -> Any:
    part: Any = module
    for attribute in name.split("."):
        part = getattr(part, attribute, None)
    return part


def _first(module: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if _part(module, name) is not None), None)
