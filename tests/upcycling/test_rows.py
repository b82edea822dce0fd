"""Matrices made in blocks of rows, and normal numbers by their position, are the same however they are made."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_sparse_moe.upcycling.rows import (
    BLOCK_ELEMENTS,
    blocks,
    by_rows,
    mean_and_std,
    normal_rows,
    single_threaded_workers,
    with_rows,
)


def whole(matrix):
    return matrix[slice(0, matrix.shape[0])]


@pytest.mark.parametrize("shape", [(7, 5), (100, 3), (41,), (3, BLOCK_ELEMENTS + 1), (0, 4), (5, 0)])
def test_blocks_are_all_rows_once(shape):
    rows = [row for block in blocks(torch.empty(shape)) for row in range(shape[0])[block]]
    assert rows == list(range(shape[0]))


@pytest.mark.parametrize("shape", [(40, 13), (40, 4), (77,)])
def test_a_draw_depends_on_its_position_alone(shape):
    drawn = normal_rows(torch.Size(shape), torch.float32, 1.0, 2.0, seed=3)
    pieces = [drawn[slice(begin, begin + 1)] for begin in reversed(range(shape[0]))]
    assert torch.equal(torch.cat(pieces[::-1]), whole(drawn))
    assert torch.equal(drawn[slice(5, 11)], whole(drawn)[5:11])


def test_draws_are_normal():
    count = 10**6
    drawn = whole(normal_rows(torch.Size((1000, 1000)), torch.float32, 0.0, 1.0, seed=0)).flatten().double()
    # each bound is some five deviations of what it bounds
    assert abs(drawn.mean()) < 5 / count**0.5
    assert drawn.std() == pytest.approx(1, abs=5 / (2 * count) ** 0.5)
    assert drawn.pow(3).mean() == pytest.approx(0, abs=5 * (15 / count) ** 0.5)
    assert drawn.pow(4).mean() == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    expected = torch.special.ndtr(drawn.sort().values)
    largest = (expected - torch.arange(count) / count).abs().max()  # Kolmogorov's and Smirnov's distance
    assert largest < 2.5 / count**0.5
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 5 / count**0.5
    assert abs((drawn[1000:] * drawn[:-1000]).mean()) < 5 / count**0.5


def test_mean_deviation_and_dtype_of_draws():
    shape = torch.Size((300, 200))
    drawn = whole(normal_rows(shape, torch.float32, -3.0, 0.25, seed=1))
    assert drawn.mean() == pytest.approx(-3, abs=0.01)
    assert drawn.std() == pytest.approx(0.25, rel=0.02)
    standard = whole(normal_rows(shape, torch.float32, 0.0, 1.0, seed=1))
    torch.testing.assert_close(drawn, standard * 0.25 - 3)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(whole(normal_rows(shape, dtype, -3.0, 0.25, seed=1)), drawn.to(dtype))


def test_seeds_are_streams_of_their_own():
    first, second = (whole(normal_rows(torch.Size((300, 200)), torch.float32, 0.0, 1.0, seed)) for seed in (1, 2))
    assert abs((first * second).mean()) < 5 / first.numel() ** 0.5


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_threads_does_not_matter(count):
    before, matrix = torch.get_num_threads(), torch.randn(3000, 400)
    noisy = by_rows(torch.add, matrix, normal_rows(matrix.shape, matrix.dtype, 0.0, 1.0, seed=0))
    try:
        torch.set_num_threads(count)
        made = torch.full_like(matrix, math.nan)
        with single_threaded_workers() as threads:
            for rows in blocks(noisy):
                threads.submit(made.__setitem__, rows, noisy[rows]).result()
            assert threads.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == count  # the rest of the process keeps its threads
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == count
            assert mean_and_std(noisy) == mean_and_std(made)
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made, whole(noisy))


def test_with_rows_is_an_assignment():
    matrix, new, places = torch.randn(50, 6), torch.randn(4, 6), torch.tensor([0, 7, 8, 49])
    made = with_rows(matrix, places, new)
    expected = matrix.clone()
    expected[places] = new
    assert torch.equal(whole(made), expected)
    assert torch.equal(torch.cat([made[slice(0, 8)], made[slice(8, 20)], made[slice(20, 50)]]), expected)


def test_mean_and_std_are_those_of_all_elements():
    matrix = 5 + 0.5 * torch.randn(3000, 400)
    mean, std = mean_and_std(matrix.bfloat16())
    assert mean == pytest.approx(matrix.bfloat16().double().mean().item(), rel=1e-5)
    assert std == pytest.approx(matrix.bfloat16().double().std().item(), rel=1e-3)
    assert mean_and_std(torch.zeros(7)) == (0.0, 0.0)
