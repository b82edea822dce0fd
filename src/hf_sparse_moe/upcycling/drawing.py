"""Normal numbers that depend on the seed and their position alone, so that any thread can draw any of them."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
import torch

from .rows import Rows


def _quantiles() -> torch.Tensor:
    """The 65,536 equally likely values that stand for the standard normal distribution, mean 0 and deviation 1."""
    centres = (torch.arange(2**16, dtype=torch.float64, device="cpu") + 0.5) / 2**16
    quantiles = torch.special.ndtri(centres)
    return (quantiles / quantiles.square().mean().sqrt()).float()


QUANTILES = _quantiles()
DRAWS_IN_A_WORD = 4  # 16 random bits choose a quantile


@lru_cache(maxsize=64)
def _scaled_quantiles(mean: float, std: float, dtype: torch.dtype) -> torch.Tensor:
    return (QUANTILES * std + mean).to(dtype)


def normal_rows(shape: torch.Size, dtype: torch.dtype, mean: float, std: float, seed: int) -> Rows:
    """
    A matrix of normal numbers. Sixteen bits of a PCG64 stream choose one of 65,536 quantiles. That is several times as
    fast as `torch.Tensor.normal_`; up to 3.5 deviations the quantiles lie closer than bfloat16 numbers do, and the
    last is at 4.3.

    Args:
        shape, dtype: Of the matrix. Another dtype is another rounding of the same numbers.
        mean, std (`float`): Of the distribution.
        seed (`int`): At least 0. Element i of the matrix is draw i of the seed's stream.
    """
    values, width = _scaled_quantiles(mean, std, dtype), prod(shape[1:])

    def draw(rows: slice) -> torch.Tensor:
        begin, end = rows.start * width, rows.stop * width
        word, skipped = divmod(begin, DRAWS_IN_A_WORD)
        words = np.random.PCG64(seed).advance(word).random_raw(-(-end // DRAWS_IN_A_WORD) - word)
        chosen = words.view(np.uint16)[skipped : skipped + end - begin].astype(np.int32)
        return values.index_select(0, torch.from_numpy(chosen)).reshape(rows.stop - rows.start, *shape[1:])

    return Rows(shape, dtype, draw)
