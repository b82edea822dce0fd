"""What an upcycling was asked for: the method and its options, the mixture's config, and which layers are sparse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.moe_block import sparse_feed_forwards
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .initialization import INITIALIZATION_METHODS, InitializationMethod, has_constant_weights


logger = logging.get_logger(__name__)
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
    check_argument("method", method, *INITIALIZATION_METHODS)
    check_argument("seed", seed, 0, -(2**64))
    known = INITIALIZATION_METHODS[method].options
    options = {name: options_and_fields.get(name, allowed[0]) for name, allowed in known.items()}
    for name, value in options.items():
        check_argument(name, value, *known[name])
    return Recipe(method, seed, options), {
        name: value for name, value in options_and_fields.items() if name not in known
    }


def check_argument(name: str, value: Any, default: Any, *others: Any) -> None:
    """Raise a `ValueError` unless `value` is one of some words, or a number in bounds, whole if `default` is."""
    if isinstance(default, str):
        fine, allowed = value in (default, *others), f"one of {sorted((default, *others))}"
    else:
        kind: Any = Integral if isinstance(default, int) else Real
        least, *most = others
        fine = isinstance(value, kind) and not isinstance(value, bool) and least <= value <= (*most, value)[0]
        allowed = f"a {'whole ' if kind is Integral else ''}number of at least {least}"
        allowed += f" and at most {most[0]}" if most else ""
    if not fine:
        raise ValueError(f"`{name}={value!r}` is not allowed: it must be {allowed}.")


def check_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The floating-point dtype of torch that is meant; None for `"auto"`."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return None
    if not (isinstance(chosen, torch.dtype) and chosen.is_floating_point):
        raise ValueError(f'`dtype={dtype!r}` is not allowed: it must be "auto" or a floating-point dtype of torch.')
    return chosen


def mixture_config(
    dense: PreTrainedModel,
    target: type[SparseMoePreTrainedModel],
    recipe: Recipe,
    fields: dict[str, Any],
    layers: Layers,
) -> SparseMoeConfig:
    """
    The config of the mixture of class `target` that `dense` becomes, which may be without storage; completes the
    `fields` that were asked for. Raises a `ValueError` for an unknown field, a value that is not allowed, or sizes
    that do not fit the method.
    """
    config_class, method, row = target.config_class, recipe.method, recipe.initialization
    unknown = sorted(set(fields) - set(config_class.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"`{unknown[0]}` is neither a field of `{config_class.__name__}` nor an option of `method={method!r}`."
        )
    for name in ("num_experts", "num_experts_per_tok"):
        check_argument(name, fields.get(name, 1), 1, 1)
    others = {name: value for name, value in fields.items() if name not in config_class._layer_type_fields}
    try:
        everything = config_class.around(dense.config, **others)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from None
    found = sparse_feed_forwards(dense, everything, target.family_side)
    sides = list(config_class._layer_type_fields.values())
    if isinstance(layers, dict) and not set(layers) <= set(sides):
        raise ValueError(f"`layers` names the sides {sorted(layers)}, but `{config_class.__name__}` has {sides}.")
    for name, side in config_class._layer_type_fields.items():
        chosen = layers.get(side, "all") if isinstance(layers, dict) else layers
        if chosen != "all":
            fields[name] = layer_types(chosen, sum(where == side for _, where in found))
    units = {feed_forward.intermediate_size for feed_forward, _ in found}
    makes_parts = method == "partition" or recipe.options.get("granularity", 1) > 1
    # The hash takes experts that follow each other, as the parts of copies do; those of branches are of one each.
    makes_whole = ["top_k", "hash"] if method == "split" else ["top_k"]
    if makes_parts and everything.router_type not in makes_whole:
        raise ValueError(
            f"`router_type={everything.router_type!r}` is not allowed with `method={method!r}`, whose experts are "
            f"parts of the dense feed-forward that a token's experts make whole together: it must be one of "
            f"{makes_whole}."
        )
    if fields.get("shared_expert_gate"):
        raise ValueError("`shared_expert_gate=True` is not allowed: no dense model has weights for it.")
    if fields.get("num_shared_experts") and not row.makes_shared_experts:
        raise ValueError(
            f"`num_shared_experts={fields['num_shared_experts']}` is not allowed with `method={method!r}`, which "
            'makes none. Use "graft", or "partition" with `shared_units`.'
        )
    decided = row.sizes(fields, max(units), recipe.options)
    if decided.get("moe_intermediate_size") and len(units) > 1:
        raise ValueError(
            f"`method={method!r}` needs feed-forwards of one size, but `{type(dense).__name__}` has {sorted(units)}."
        )
    fields |= decided
    config = config_class.around(dense.config, **fields)
    by_default = config.num_experts_per_tok == 1 and "norm_topk_prob" not in fields
    if by_default and row.is_exact is has_constant_weights and not row.is_exact(config):
        logger.warning(
            "`num_experts_per_tok=1` leaves the weights unnormalised, so that the router learns. They differ from "
            f"token to token: `method={method!r}` starts near the dense model, `method='graft'` at it."
        )
    return config


def layer_types(layers: str | Sequence[int], num_layers: int) -> list[str]:
    """
    `"dense"` or `"sparse"` for each layer: `layers` is `"all"`, `"none"`, `"every_N"` (the N-th, 2N-th, ... layer),
    `"last_N"`, `"first_N"`, or positions from 0, of which negative ones count from the end.
    """
    positions = list(range(num_layers))
    if isinstance(layers, str):
        match = re.fullmatch(r"(all|none)|(?:(every|last|first)_([1-9]\d*))", layers)
        if match is None:
            raise ValueError(
                f'`layers={layers!r}` is not allowed: it must be "all", "none", "every_N", "first_N", "last_N" or '
                "positions."
            )
        count = int(match[3] or num_layers)
        if count > num_layers:
            raise ValueError(f"`layers={layers!r}` is not allowed: there are {num_layers} layers.")
        words = {"all": positions, "none": [], "last": positions[-count:], "first": positions[:count]}
        sparse = set(positions[count - 1 :: count] if match[2] == "every" else words[match[1] or match[2]])
    else:
        if not isinstance(layers, Sequence) or not all(isinstance(each, int) for each in layers):
            raise ValueError(f"`layers={layers!r}` is not allowed: it must be a word or a list of whole numbers.")
        missing = [position for position in layers if not -num_layers <= int(position) < num_layers]
        if missing:
            raise ValueError(f"`layers` names layer {missing[0]}, but there are {num_layers}, counted from 0.")
        sparse = {int(position) % num_layers for position in layers}
    return ["sparse" if position in sparse else "dense" for position in positions]
