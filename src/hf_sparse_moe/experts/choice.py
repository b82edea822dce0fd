"""In which dtype and by which products the experts compute, where nothing says so."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .products import suits_grouped


logger = logging.get_logger(__name__)

# Rows an expert, on average, below which a forward pass outside of training is faster with `grouped_mm`, whose loop
# over the experts is not in Python. Found with `python benchmarks/experts.py`.
FEW_ROWS = 32
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
    flags = _cpu_flags()
    return not flags or dtype not in _HARDWARE or not flags.isdisjoint(_HARDWARE[dtype])


@cache
def _cpu_flags() -> frozenset[str]:
    """Those of /proc/cpuinfo; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split()[2:])


def chooses_grouped(
    experts: Any, up: torch.Tensor, down: torch.Tensor, top_k_index: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether all segments go into one product: for few rows an expert outside of training."""
    if torch.is_grad_enabled() or experts.training or not 0 < top_k_index.numel() < FEW_ROWS * experts.num_experts:
        return False
    # What a quantised weight would compute for all experts at each access is left to the loop.
    plain = all(type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype == dtype for weight in (up, down))
    return plain and suits_grouped(*up.shape[1:], *down.shape[1:], dtype=dtype)
