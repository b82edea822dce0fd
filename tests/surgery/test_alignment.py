"""Experts are matched unit by unit, whatever the order of their units, and means of equal ones are the one."""

from dataclasses import replace

import pytest
import torch

from hf_sparse_moe.surgery.alignment import aligned, blended
from hf_sparse_moe.upcycling.initialization import FeedForwardWeights


UNITS, HIDDEN = 12, 8


def expert(gated: bool, biased: bool, dtype=torch.float32) -> FeedForwardWeights:
    rows = 2 * UNITS if gated else UNITS
    biases = (torch.randn(rows, dtype=dtype), torch.randn(HIDDEN, dtype=dtype)) if biased else (None, None)
    return FeedForwardWeights(
        torch.randn(rows, HIDDEN, dtype=dtype), torch.randn(HIDDEN, UNITS, dtype=dtype), *biases, gated
    )


def whole(weights: FeedForwardWeights) -> dict[str, torch.Tensor]:
    return {name: matrix[0 : matrix.shape[0]] for name, matrix in weights.matrices.items()}


def shuffled(weights: FeedForwardWeights) -> FeedForwardWeights:
    return replace(weights, **whole(weights.take(torch.randperm(UNITS))))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_permuted_copy_comes_back(gated, biased):
    first = expert(gated, biased)
    permuted = shuffled(first)
    merged = whole(blended([first, aligned(permuted, first)], [0.3, 0.7]))
    for name, matrix in whole(first).items():
        assert torch.equal(merged[name], matrix), name
    assert not torch.equal(whole(blended([first, permuted], [0.3, 0.7]))["up"], first.up)


def test_every_projection_tells_units_apart():
    """Units that are alike in one projection are told by the others, biases too."""
    first = expert(gated=True, biased=True)
    first.up[:] = 1.0
    first.down[:] = 1.0
    permuted = shuffled(first)
    assert torch.equal(whole(aligned(permuted, first))["up_bias"], first.up_bias)


def test_noise_on_a_copy_is_matched_too():
    first = expert(gated=True, biased=False)
    order = torch.randperm(UNITS)
    noisy = first.up.view(2, UNITS, HIDDEN)[:, order] + 0.1 * torch.randn(2, UNITS, HIDDEN)
    permuted = replace(first, up=noisy.reshape(-1, HIDDEN), down=first.down[:, order])
    assert torch.equal(whole(aligned(permuted, first))["down"], first.down)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_blends_are_weighted_means(dtype):
    experts = [expert(gated=False, biased=True, dtype=dtype) for _ in range(3)]
    weights = [0.2, 0.3, 0.5]
    made = whole(blended(experts, weights))
    for name in made:
        expected = sum(w * each.matrices[name].double() for w, each in zip(weights, experts, strict=True))
        torch.testing.assert_close(made[name], expected.to(dtype))
