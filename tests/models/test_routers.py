"""Which experts a token gets, with what weight, in what precision."""

import pytest
import torch

from hf_sparse_moe.models.routers import SparseMoeTopKRouter, router_probabilities
from tiny_models import tiny_config


HIDDEN, TOKENS = 16, 50


def make_router(**fields) -> SparseMoeTopKRouter:
    router = SparseMoeTopKRouter(tiny_config("encoder", **{"num_experts": 6, **fields}), HIDDEN)
    torch.nn.init.normal_(router.weight, std=0.3)
    return router.eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_best_experts_are_chosen_best_first(tokens, scoring, k):
    router = make_router(scoring_func=scoring, num_experts_per_tok=k)
    logits, weights, index = router(tokens)[:3]
    assert (weights.shape, index.shape) == ((TOKENS, k), (TOKENS, k))
    torch.testing.assert_close(logits, tokens @ router.weight.T)
    assert torch.equal(index, logits.argsort(dim=-1, descending=True)[:, :k])
    assert (weights.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_normalised_weights_sum_to_the_scaling_factor(tokens, scoring):
    router = make_router(scoring_func=scoring, routed_scaling_factor=2.5)
    torch.testing.assert_close(router(tokens)[1].sum(-1), torch.full((TOKENS,), 2.5))


def test_normalised_softmax_is_the_softmax_over_the_chosen_logits(tokens):
    routing = make_router()(tokens)
    chosen = routing.router_logits.gather(1, routing.top_k_index)
    torch.testing.assert_close(routing.top_k_weights, chosen.softmax(-1))


def test_weights_that_are_not_normalised_are_the_scores(tokens):
    routing = make_router(norm_topk_prob=False)(tokens)
    torch.testing.assert_close(routing.top_k_weights, routing.router_logits.softmax(-1).gather(1, routing.top_k_index))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_probabilities_sum_to_one(tokens, scoring):
    logits = make_router(scoring_func=scoring)(tokens)[0]
    probabilities = router_probabilities(logits, scoring)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(tokens, dtype):
    router = make_router().to(dtype)
    tokens = tokens.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = router(tokens)[:3]
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, tokens.float() @ router.weight.float().T)


def test_jitter_acts_in_training_only(tokens):
    router = make_router(router_jitter_noise=0.5)
    assert torch.equal(router(tokens)[0], router(tokens)[0])
    router.train()
    noisy = router(tokens)[0]
    assert not torch.allclose(noisy, router(tokens)[0])
    mean = torch.stack([router(tokens)[0] for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, router.eval()(tokens)[0], rtol=0, atol=0.1)


def test_a_fresh_router_starts_near_even(tokens):
    router = SparseMoeTopKRouter(tiny_config("encoder", num_experts=6), HIDDEN)
    router.reset_parameters()
    logits, _, index = router(tokens)[:3]
    assert logits.abs().max() < 0.5
    assert index.unique().numel() == 6  # no tie that sends all tokens to the first expert
