"""Normal numbers that depend on the seed and their position alone, so that any thread can draw any of them."""

from __future__ import annotations

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


def normal_rows(
    shape: torch.Size, dtype: torch.dtype, mean: torch.Tensor | float, std: torch.Tensor | float, seed: int
) -> Rows:
    """
    A matrix of normal numbers. Sixteen bits of a PCG64 stream each choose a quantile: that is several times as fast as
    `torch.Tensor.normal_`, and finer than bfloat16 up to 3.5 deviations. None is beyond 4.4 deviations.

    Args:
        shape, dtype: Of the matrix. All is computed in float32, so that a dtype changes the rounding alone.
        mean, std (`torch.Tensor` or `float`): Of each element; they broadcast to `shape`.
        seed (`int`): At least 0. Element i is draw i of the seed's stream.
    """
    width = prod(shape[1:])
    means, stds = (torch.as_tensor(value, dtype=torch.float32).expand(shape) for value in (mean, std))

    def draw(rows: slice) -> torch.Tensor:
        begin, end = rows.start * width, rows.stop * width
        word = begin // DRAWS_IN_A_WORD
        words = np.random.PCG64(seed).advance(word).random_raw(-(-end // DRAWS_IN_A_WORD) - word)
        choices = words.view(np.uint16)[begin - word * DRAWS_IN_A_WORD :][: end - begin].astype(np.int32)
        normal = QUANTILES.index_select(0, torch.from_numpy(choices)).reshape(-1, *shape[1:])
        return normal.mul_(stds[rows]).add_(means[rows])

    return Rows(shape, dtype, draw)
