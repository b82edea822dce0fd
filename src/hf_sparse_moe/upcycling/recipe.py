"""What an upcycling was asked for: the method and its options, the mixture's config, and which layers are sparse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.feed_forward import FeedForward, feed_forward_side, find_feed_forwards
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .initialization import INITIALIZATION_METHODS, InitializationMethod


Layers = str | Sequence[int] | dict[str, str | Sequence[int]]


@dataclass(frozen=True)
class Recipe:
    """How the experts start: the method, its options with their defaults filled in, and the seed."""

    method: str
    seed: int
    options: dict[str, Any]

    @property
    def initialization(self) -> InitializationMethod:
        return INITIALIZATION_METHODS[self.method]


def make_recipe(method: str, seed: int, options_and_fields: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """Separate a method's options from config fields, and fill in the defaults."""
    if method not in INITIALIZATION_METHODS:
        raise ValueError(f"`method={method!r}` is not allowed: it must be one of {sorted(INITIALIZATION_METHODS)}.")
    defaults = INITIALIZATION_METHODS[method].options
    options = {name: options_and_fields.get(name, default) for name, default in defaults.items()}
    fields = {name: value for name, value in options_and_fields.items() if name not in defaults}
    return Recipe(method, seed, options), fields


def feed_forwards_by_side(dense: PreTrainedModel, family_side: str) -> dict[str, list[FeedForward]]:
    """The feed-forwards of a dense model, which may be without storage, of each side."""
    sides: dict[str, list[FeedForward]] = {}
    for feed_forward in find_feed_forwards(dense):
        sides.setdefault(feed_forward_side(dense, feed_forward, family_side), []).append(feed_forward)
    return sides


def mixture_config(
    dense: PreTrainedModel,
    target: type[SparseMoePreTrainedModel],
    recipe: Recipe,
    fields: dict[str, Any],
    layers: Layers,
    sides: dict[str, list[FeedForward]] | None = None,
) -> SparseMoeConfig:
    """
    The config of the mixture that `dense` becomes; completes `fields`.

    Args:
        dense (`PreTrainedModel`): The dense model, which may be without storage.
        target (`type`): The mixture's class.
        recipe ([`Recipe`]): How the experts start.
        fields (`dict`): The config's fields that were asked for.
        layers (`str`, `list[int]` or `dict`): Which layers become sparse.
        sides (`dict`, *optional*): Of [`feed_forwards_by_side`], where they are known already.

    Raises:
        ValueError: an unknown field, a value that is not allowed, or sizes that do not fit the method.
    """
    config_class = target.config_class
    unknown = sorted(set(fields) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is neither a field of `{config_class.__name__}` nor an option of "
            f"`method={recipe.method!r}`."
        )
    config = config_class.from_dense(dense.config, **fields)  # reports wrong fields before anything else
    asked_for = dict(fields)
    sides = feed_forwards_by_side(dense, target.family_side) if sides is None else sides
    for name, side in config_class._layer_type_fields.items():
        chosen = layers.get(side, "all") if isinstance(layers, dict) else layers
        if chosen != "all":
            fields[name] = layer_types(chosen, len(sides.get(side, [])))
    units = {feed_forward.intermediate_size for found in sides.values() for feed_forward in found}
    decided = recipe.initialization.fields(fields, max(units), recipe.options)
    if decided.get("moe_intermediate_size") and len(units) > 1:
        raise ValueError(
            f"`method={recipe.method!r}` needs feed-forwards of one size, but `{type(dense).__name__}` has sizes "
            f"{sorted(units)}."
        )
    fields |= decided
    return config if fields == asked_for else config_class.from_dense(dense.config, **fields)


def layer_types(layers: str | Sequence[int], num_layers: int) -> list[str]:
    """
    Layer types, one a layer.

    Args:
        layers (`str` or `Sequence[int]`): `"all"`, `"none"`, `"every_N"` (the N-th, 2N-th, ... layer), `"last_N"`,
            `"first_N"`, or positions from 0; negative ones count from the end.
        num_layers (`int`): How many layers there are.

    Returns:
        `list[str]`: `"dense"` or `"sparse"`.

    Raises:
        ValueError: another word, or a position that does not exist.
    """
    if isinstance(layers, str):
        sparse = set(_named_positions(layers, list(range(num_layers))))
    else:
        missing = [position for position in layers if not -num_layers <= position < num_layers]
        if missing:
            raise ValueError(f"`layers` names layer {missing[0]}, but there are {num_layers}, counted from 0.")
        sparse = {position % num_layers for position in layers}
    return ["sparse" if position in sparse else "dense" for position in range(num_layers)]


def _named_positions(word: str, positions: list[int]) -> list[int]:
    if word in ("all", "none"):
        return positions if word == "all" else []
    match = re.fullmatch(r"(every|last|first)_([1-9]\d*)", word)
    if match is None:
        raise ValueError(
            f'`layers={word!r}` is not allowed: it must be "all", "none", "every_N", "first_N", "last_N" or positions.'
        )
    kind, count = match[1], int(match[2])
    if count > len(positions):
        raise ValueError(f"`layers={word!r}` is not allowed: there are {len(positions)} layers.")
    return {"every": positions[count - 1 :: count], "last": positions[-count:], "first": positions[:count]}[kind]
