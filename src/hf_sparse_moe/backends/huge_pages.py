"""Memory for what is large and fresh in every training step: the gradients of the experts."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch


HUGE_PAGE = 2**21
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_MADVISE = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" and _ADVICE is not None else None


def empty_like_in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """
    `torch.empty_like` on the CPU, after asking Linux for huge pages where the tensor spans some.

    `zero_grad()` gives gradients back to the system, so that each step meets every page for the first time; with pages
    of 4 KiB that takes as long as the products of experts with few rows (benchmarks/experts.py). The system may
    refuse, which changes nothing but the time. With `THP_MEM_ALLOC_ENABLE=1` torch does the same for all tensors.
    """
    empty = torch.empty_like(tensor)
    start = -(-empty.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    stop = (empty.data_ptr() + empty.nbytes) // HUGE_PAGE * HUGE_PAGE
    if _MADVISE is not None and stop > start:
        _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _ADVICE)
    return empty
