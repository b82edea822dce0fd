"""In which dtype and by which products the experts compute, where nothing says so."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .few import FEW_PAIRS
from .products import suits_grouped
from .tuning import Turn, choose, cpu_flags


logger = logging.get_logger(__name__)

# The ways to compute the same: a product for each expert, torch's `grouped_mm` for all of a batch, transformers'
# function of that name, and, for the tokens of a decoding step, a product for each expert with the least beside it.
LOOP, GROUPED, STOCK, FEW = "loop", "grouped products", "grouped_mm", "few rows"
_PLAIN = (nn.Parameter, torch.Tensor)
FEW_ROWS = 32  # rows an expert, below which what a call keeps is little beside the weights
# What a processor must say of itself to multiply in half precision: x86, and ARM. Without, oneDNN converts every
# operand, and products take 3 to 5 times those of float32.
_HARDWARE = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "fphp"},
}


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """
    What autocast would choose for a product with this weight: it leaves float64 alone. On a CPU that has no
    instructions for that dtype, the weight's own.
    """
    device = weight.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return weight.dtype
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and weight.dtype == torch.float32 and not has_hardware(dtype):
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"This CPU has no instructions for {dtype}: experts under autocast compute in float32."
            )
        return weight.dtype
    return dtype


def has_hardware(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies in `dtype`; also where it does not tell."""
    flags = cpu_flags()
    return not flags or dtype not in _HARDWARE or not flags.isdisjoint(_HARDWARE[dtype])


def choose_way(
    experts: Any, up: torch.Tensor, down: torch.Tensor, top_k_index: torch.Tensor, dtype: torch.dtype,
    *, learns: bool, adapted: bool, recompute: bool,
) -> Turn:  # fmt: skip
    """
    The way to compute this call on a CPU: what [`tuning`] measured to be the fastest, and where it does not measure,
    for few rows without gradient the leanest or grouped products, and else the loop.
    """
    rows, shape = top_k_index.numel(), (*up.shape, *down.shape[1:])
    # What a weight of another kind or dtype would compute for all experts at each access is left to the loop.
    plain = up.dtype == down.dtype == dtype and type(up) in _PLAIN and type(down) in _PLAIN
    keeps, autocast = learns or experts.training, torch.is_autocast_enabled("cpu")
    ours_only = keeps or adapted or experts._is_expert_parallel
    fewest = plain and not autocast and not ours_only and 0 < rows <= FEW_PAIRS
    ways = _ways(plain, dtype, shape, rows.bit_length(), keeps, ours_only, fewest)
    kind = (up.dtype, dtype, autocast, *shape, top_k_index.shape[1], rows.bit_length(), learns, experts.training)
    layout = (adapted, recompute, experts.has_gate, experts.has_bias, experts.is_transposed)
    return choose((*kind, *layout, torch.get_num_threads(), *ways), ways, rows)


@lru_cache(1024)
def _ways(
    plain: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    rows_bits: int,
    keeps: bool,
    ours_only: bool,
    fewest: bool,
) -> tuple[str, ...]:
    E, *sizes = shape
    if not (plain and rows_bits and suits_grouped(*sizes, dtype=dtype)):
        return (FEW if fewest else LOOP,)
    if fewest:
        return (FEW, GROUPED, STOCK)
    few = 1 << rows_bits <= FEW_ROWS * E
    ways = (LOOP, GROUPED) if keeps or not few else (GROUPED, LOOP)
    # transformers' keeps all that it computes until it ends, and draws a dropout's numbers in another order.
    return (*ways, STOCK) if few and not ours_only else ways
