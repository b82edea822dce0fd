"""Asking for huge pages changes neither the tensor nor what lies around it."""

import pytest
import torch

from hf_sparse_moe.backends.huge_pages import HUGE_PAGE, empty_like_in_huge_pages


@pytest.mark.parametrize("numel", [0, 5, HUGE_PAGE // 4, 5 * HUGE_PAGE // 4 + 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_is_an_empty_like_that_can_be_written(numel, transposed):
    like = torch.ones(numel, 2).T if transposed else torch.ones(numel, 2)
    found = empty_like_in_huge_pages(like)
    assert (found.shape, found.dtype, found.stride()) == (like.shape, like.dtype, like.stride())
    found.fill_(3)
    assert (found == 3).all()
    assert (like == 1).all()
