"""What holds of every routing, whatever the shapes, the dtype and the values. E experts, K experts a token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_moe.models.balancing import expert_counts
from hf_sparse_moe.models.routers import make_router, router_scores
from models.router_kinds import HIDDEN, known_tokens, settle
from tiny_models import tiny_config


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def drawn(draw, **fixed):
    """A router, hidden states `(B, S, H)`, a mask and ids."""
    groups = draw(st.integers(1, 3))
    size = draw(st.integers(1, 4))
    fields = {"num_experts": groups * size, "n_group": 1, "topk_group": 1, **fixed}
    fields.setdefault("scoring_func", draw(st.sampled_from(["softmax", "sigmoid", "cosine"])))
    if fixed.get("router_type", "top_k") == "top_k" and draw(st.booleans()):
        fields |= {"n_group": groups, "topk_group": draw(st.integers(1, groups))}
    within = fields["num_experts"] * fields["topk_group"] // fields["n_group"]
    fields["num_experts_per_tok"] = draw(st.integers(1, within))
    fields["norm_topk_prob"] = draw(st.booleans())
    fields["routed_scaling_factor"] = draw(st.sampled_from([1.0, 2.5]))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    router = make_router(tiny_config("encoder", **fields), HIDDEN, "encoder")
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    settle(torch.nn.ModuleDict({"gate": router}))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([0.0, 1.0, 300.0]))  # ties, the usual, logits that leave one expert
    x = (scale * torch.randn(batch, length, HIDDEN, generator=generator)).to(dtype)
    mask = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    ids = torch.randint(0, 2**20, (batch, length), generator=generator)
    return router.to(dtype).eval(), x, mask, ids


def route(router, x, mask, ids):
    with known_tokens(x, mask, ids) as record:
        return router(x.reshape(-1, HIDDEN), record.context("encoder", mask.numel()))


def normal(**fixed):
    return settings(max_examples=60, deadline=None)(given(drawn(**fixed)))


def assert_defined(router, routing, tokens: int) -> None:
    assert routing.router_logits.shape == (tokens, router.num_experts)
    assert routing.router_logits.dtype == routing.top_k_weights.dtype == torch.float32
    assert routing.router_logits.isfinite().all()
    assert routing.top_k_weights.isfinite().all()
    assert (routing.top_k_weights >= 0).all()
    assert ((routing.top_k_index >= 0) & (routing.top_k_index < router.num_experts)).all()


@normal()
def test_token_choice(case):
    router, x, mask, ids = case
    tokens = mask.numel()
    routing = route(router, x, mask, ids)
    assert_defined(router, routing, tokens)
    assert routing.top_k_index.shape == (tokens, router.top_k)
    assert all(len(set(row)) == router.top_k for row in routing.top_k_index.tolist())
    assert expert_counts(routing.top_k_index, router.num_experts).sum() == tokens * router.top_k
    assert expert_counts(routing.top_k_index, router.num_experts, mask.flatten()).sum() == mask.sum() * router.top_k
    size = router.num_experts // router.n_group
    assert all(len({e // size for e in row}) <= router.topk_group for row in routing.top_k_index.tolist())
    total = routing.top_k_weights.sum(-1)
    if router.norm_topk_prob:
        scores = router_scores(routing.router_logits, router.scoring_func).gather(-1, routing.top_k_index)
        expected = torch.full_like(total, router.routed_scaling_factor).masked_fill(scores.sum(-1) == 0, 0.0)
        torch.testing.assert_close(total, expected)
    else:
        largest = router.top_k if router.scoring_func == "sigmoid" else 1
        assert (total <= router.routed_scaling_factor * largest * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(drawn(), st.sampled_from([0.01, 0.3, 1.0, 1.7, 100.0]))
def test_capacity(case, factor):
    router, x, mask, ids = case
    free = route(router, x, mask, ids)
    router.capacity_factor = factor
    routing = route(router.train(), x, mask, ids)
    assert_defined(router, routing, mask.numel())
    assert torch.equal(routing.top_k_index, free.top_k_index)
    real = mask.flatten()
    load = expert_counts(routing.top_k_index[routing.kept][:, None], router.num_experts)
    wanted = expert_counts(routing.top_k_index, router.num_experts, real)
    capacity = math.ceil(round(factor * int(real.sum()) * router.top_k / router.num_experts, 6))
    assert torch.equal(load, wanted.clamp(max=capacity))  # never above, and full before one is dropped
    assert not routing.kept[~real].any()
    assert routing.top_k_weights[~routing.kept].eq(0).all()
    assert torch.equal(routing.top_k_weights[routing.kept], free.top_k_weights[routing.kept])


@settings(max_examples=60, deadline=None)
@given(drawn(router_type="expert_choice", scoring_func="softmax"), st.sampled_from([None, 0.01, 0.5, 1.0, 2.3, 50.0]))
def test_expert_choice(case, factor):
    router, x, mask, ids = case
    router.capacity_factor = factor
    batch, length = mask.shape
    routing = route(router, x, mask, ids)
    assert_defined(router, routing, mask.numel())
    kept = routing.kept.flatten()
    tokens, experts = routing.token_index[kept], routing.top_k_index.flatten()[kept]
    assert mask.flatten()[tokens].all()
    assert len(set(zip(tokens.tolist(), experts.tolist(), strict=True))) == len(tokens)  # no token twice
    load = torch.zeros(batch, router.num_experts, dtype=torch.long)
    load.index_put_((tokens // length, experts), torch.ones_like(tokens), accumulate=True)
    for row, real in zip(load, mask.sum(1).tolist(), strict=True):
        wanted = (router.top_k if factor is None else factor) * real / router.num_experts
        assert set(row.tolist()) == {min(real, math.ceil(round(wanted, 6)))}  # exactly even, in each sequence
    scores = router_scores(routing.router_logits, "softmax")[tokens, experts]
    torch.testing.assert_close(routing.top_k_weights.flatten()[kept], scores * router.routed_scaling_factor)
    assert routing.top_k_weights[~routing.kept].eq(0).all()


@normal(router_type="hash", scoring_func="softmax")
def test_hash(case):
    router, x, mask, ids = case
    routing = route(router, x, mask, ids)
    assert_defined(router, routing, mask.numel())
    assert all(len(set(row)) == router.top_k for row in routing.top_k_index.tolist())
    torch.testing.assert_close(
        routing.top_k_weights.sum(-1), torch.full((mask.numel(),), router.routed_scaling_factor)
    )
    assert torch.equal(route(router, -x, ~mask, ids).top_k_index, routing.top_k_index)


@settings(max_examples=60, deadline=None)
@given(drawn(n_group=1), st.randoms(use_true_random=False))
def test_no_token_on_a_disabled_expert(case, random):
    router, x, mask, ids = case
    router.n_group = router.topk_group = 1
    disabled = random.sample(range(router.num_experts), random.randint(0, router.num_experts - router.top_k))
    router.disabled_experts = torch.zeros(router.num_experts, dtype=torch.bool)
    router.disabled_experts[disabled] = True
    routing = route(router, x, mask, ids)
    assert_defined(router, routing, mask.numel())
    assert not torch.isin(routing.top_k_index, torch.tensor(disabled)).any()


@settings(max_examples=30, deadline=None)
@given(drawn(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 10**6))
def test_a_bad_value_stays_where_it_is(case, bad, place):
    router, x, mask, ids = case
    expected = route(router, x, mask, ids)
    token = place % mask.numel()
    spoilt = x.clone()
    spoilt.view(-1, HIDDEN)[token, place % HIDDEN] = bad
    routing = route(router, spoilt, mask, ids)
    assert_defined(router, routing, mask.numel())
    others = torch.arange(mask.numel()) != token
    assert torch.equal(routing.top_k_index[others], expected.top_k_index[others])
    torch.testing.assert_close(routing.top_k_weights[others], expected.top_k_weights[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_are_broken_the_same_way_each_time(dtype):
    router = make_router(tiny_config("encoder"), HIDDEN, "encoder").to(dtype)
    torch.nn.init.zeros_(router.weight)
    x = torch.randn(20, HIDDEN).to(dtype)
    assert torch.equal(router(x).top_k_index, router(x).top_k_index)
    torch.testing.assert_close(router(x).top_k_weights, torch.full((20, 2), 0.5))
