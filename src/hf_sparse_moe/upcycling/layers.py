"""Which layers become sparse: a short word for the config's lists of layer types."""

from __future__ import annotations

import re
from collections.abc import Sequence


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
    positions = range(num_layers)
    if isinstance(layers, str):
        sparse = _named(layers, num_layers)
    else:
        missing = [position for position in layers if not -num_layers <= position < num_layers]
        if missing:
            raise ValueError(f"`layers` names layer {missing[0]}, but there are {num_layers}, counted from 0.")
        sparse = {position % num_layers for position in layers}
    return ["sparse" if position in sparse else "dense" for position in positions]


def _named(word: str, num_layers: int) -> set[int]:
    positions = list(range(num_layers))
    if word == "all":
        return set(positions)
    if word == "none":
        return set()
    match = re.fullmatch(r"(every|last|first)_([1-9]\d*)", word)
    if match is None:
        raise ValueError(
            f'`layers={word!r}` is not allowed: it must be "all", "none", "every_N", "first_N", "last_N" or positions.'
        )
    kind, count = match[1], int(match[2])
    if count > num_layers:
        raise ValueError(f"`layers={word!r}` is not allowed: there are {num_layers} layers.")
    return set({"every": positions[count - 1 :: count], "last": positions[-count:], "first": positions[:count]}[kind])
