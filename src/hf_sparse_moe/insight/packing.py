"""Arrays as text for the page: whole numbers or shares in one or two bytes each, in base64."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def pack_integers(array: np.ndarray) -> dict[str, Any]:
    """Numbers from 0 up; -1 becomes the largest number that the type holds."""
    dtype = "<u1" if array.max(initial=0) < 255 else "<u2"
    return _packed(array.astype(dtype), 1.0)


def pack_shares(array: np.ndarray) -> dict[str, Any]:
    """Numbers from 0 to the largest, in 254 steps; NaN and what is below 0 become 255."""
    scale = float(np.nanmax(array, initial=0)) / 254 or 1.0
    steps = np.round(np.nan_to_num(array, nan=-scale) / scale)
    return _packed(np.where(steps < 0, 255, steps).astype("<u1"), scale)


def _packed(array: np.ndarray, scale: float) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"bytes": array.dtype.itemsize, "shape": list(array.shape), "scale": scale, "data": data}
