"""Which experts a token gets, with what weight, in what precision: every router against its formula, and bad input."""

import re

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from hf_sparse_moe.models.masks import SideTokens
from hf_sparse_moe.models.routers import (
    SparseMoeExpertChoiceRouter,
    SparseMoeTopKRouter,
    router_probabilities,
    router_scores,
)
from hf_sparse_moe.models.routing import Routing
from models.oracle import block_oracle
from models.router_kinds import HIDDEN, ROUTERS, known_tokens, routed_block
from pairwise import pairwise
from tiny_models import tiny_config, tiny_sparse


TOKENS = 50
BACKENDS = ["eager", "batched_mm", "grouped_mm", "sparse_moe"]


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


@pytest.mark.parametrize("k", [2, 6])
def test_the_short_way_says_what_the_formula_says(tokens, k):
    found = []
    for router in (make_router(num_experts_per_tok=k), make_router(num_experts_per_tok=k, routed_scaling_factor=2.0)):
        torch.nn.init.normal_(router.weight, std=0.3, generator=torch.Generator().manual_seed(0))
        routing = router(tokens)
        (routing.top_k_weights / router.routed_scaling_factor).square().sum().backward()
        found.append((router, routing, router.weight.grad))
    (short, routing, grad), (formula, other, other_grad) = found
    assert (short.is_short, formula.is_short) == (True, False)
    assert torch.equal(routing.top_k_index, other.top_k_index)
    torch.testing.assert_close(routing.top_k_weights, other.top_k_weights / 2)
    torch.testing.assert_close(grad, other_grad, rtol=1e-4, atol=1e-5)


def test_a_capacity_changes_neither_the_choice_nor_the_weights_that_it_keeps():
    router = make_router(num_experts_per_tok=2, num_experts=3, capacity_factor=0.6)
    router.weight.data = 1000 * torch.eye(3, HIDDEN)  # all scores but one are 0: a tie, which the logits are not
    tokens = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0))
    free, limited = router.eval()(tokens), router.train()(tokens)
    assert torch.equal(limited.top_k_index, free.top_k_index)
    assert 0 < limited.kept.sum() < limited.kept.numel()
    assert torch.equal(limited.top_k_weights, free.top_k_weights.masked_fill(~limited.kept, 0.0))
    again = router.follow(limited, limited.router_logits)  # the second pass of gradient checkpointing
    assert torch.equal(again.top_k_weights, limited.top_k_weights)


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


def pads_and_ids(batch: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = mask[1, :3] = 0  # on the right and on the left
    return mask, torch.randint(0, 90, (batch, length))


def sequences(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randn(batch, length, HIDDEN, requires_grad=True)


def run(block, hidden_states, mask=None, ids=None) -> torch.Tensor:
    with known_tokens(hidden_states, mask, ids):
        return block(hidden_states)


def route(block, hidden_states, mask=None, ids=None) -> Routing:
    with known_tokens(hidden_states, mask, ids) as record:
        tokens = hidden_states.reshape(-1, HIDDEN)
        return block.gate(tokens, record.context("encoder", len(tokens)))


def assert_same_with_gradients(block, x: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The output, and the gradients of the tokens, the router and the experts."""
    parameters = dict(block.named_parameters())
    direction = torch.randn(x.shape)
    results = []
    for output in (actual, expected):
        gradients = torch.autograd.grad((output * direction).sum(), [x, *parameters.values()], allow_unused=True)
        results.append([output, *gradients])
    for name, value, wanted in zip(["output", "tokens", *parameters], *results, strict=True):
        assert (value is None) == (wanted is None), name
        if wanted is not None:
            assert wanted.abs().max() > 0, name
            atol = 1e-5 * wanted.abs().max().item()
            torch.testing.assert_close(
                value.double(), wanted.double(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


@pairwise("kind,backend,training", ROUTERS, BACKENDS, [False, True])
def test_every_router_on_every_backend_equals_its_formula(kind, backend, training):
    block, x, (mask, ids) = routed_block(kind, backend).train(training), sequences(), pads_and_ids()
    assert_same_with_gradients(block, x, run(block, x, mask, ids), block_oracle(block, x, mask, ids))


@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if "hash" not in kind])
def test_jitter_shakes_what_the_router_sees_and_nothing_else(kind):
    block, x, (mask, ids) = routed_block(kind, router_jitter_noise=0.3).train(), sequences(), pads_and_ids()
    jitter = torch.empty(x.numel() // HIDDEN, HIDDEN)
    torch.manual_seed(5)
    jitter.uniform_(0.7, 1.3)
    torch.manual_seed(5)
    actual = run(block, x, mask, ids)
    assert_same_with_gradients(block, x, actual, block_oracle(block, x, mask, ids, jitter))


def test_the_temperature_of_a_cosine_router_stays_above_its_floor():
    block, x = routed_block("cosine"), sequences()
    with torch.no_grad():
        block.gate.temperature.fill_(-3.0)
    logits = route(block, x).router_logits
    assert logits.abs().max() <= 100 * (1 + 1e-6)  # a cosine over 0.01
    torch.testing.assert_close(run(block, x).double(), block_oracle(block, x), rtol=0, atol=1e-4)


def test_groups_are_those_of_deepseek():
    block = routed_block("groups by their best two", norm_topk_prob=True)
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        routed_scaling_factor=1.0, norm_topk_prob=True,
    )  # fmt: skip
    stock = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        stock.weight.copy_(block.gate.weight)
        block.gate.e_score_correction_bias.abs_()  # older stock code prefers masked experts to negative scores
        stock.e_score_correction_bias.copy_(block.gate.e_score_correction_bias)
    x = torch.randn(TOKENS, HIDDEN)
    _, weights, index = stock(x)
    routing = block.gate(x)
    order, stock_order = routing.top_k_index.argsort(-1), index.argsort(-1)
    assert torch.equal(routing.top_k_index.gather(-1, order), index.gather(-1, stock_order))
    torch.testing.assert_close(routing.top_k_weights.gather(-1, order), weights.gather(-1, stock_order))


@pytest.mark.parametrize("kind", ["capacity", "capacity, sigmoid"])
def test_capacity_drops_in_training_alone_and_says_what(kind):
    block, x, (mask, ids) = routed_block(kind), sequences(), pads_and_ids()
    assert route(block, x, mask, ids).kept is None
    routing = route(block.train(), x, mask, ids)
    assert not routing.kept[mask.flatten() == 0].any()
    assert torch.equal(routing.top_k_weights > 0, routing.kept)
    assert 0 < routing.kept.sum() < 2 * mask.sum()
    # whoever was dropped scored below all whom the expert kept
    scores = router_scores(routing.router_logits, block.config.scoring_func).gather(-1, routing.top_k_index)
    real = mask.flatten().bool()[:, None]
    for expert in range(4):
        wanted = (routing.top_k_index == expert) & real
        if (wanted & ~routing.kept).any():
            assert scores[wanted & routing.kept].min() > scores[wanted & ~routing.kept].max()


def test_a_dropped_token_passes_by_the_routed_experts():
    block, x = routed_block("capacity", num_experts_per_tok=1, capacity_factor=0.1).train(), sequences()
    dropped = ~route(block, x).kept.any(-1)
    assert 0 < dropped.sum() < len(dropped)
    assert run(block, x).reshape(-1, HIDDEN)[dropped].eq(0).all()


@pytest.mark.parametrize("kind", ["capacity", "expert choice"])
def test_the_smallest_capacity_is_one_token(kind):
    block, x = routed_block(kind, capacity_factor=1e-6).train(), sequences(batch=1)
    routing = route(block, x)
    load = routing.top_k_index[routing.kept].bincount(minlength=4)
    chosen = routing.top_k_index.unique() if kind == "capacity" else torch.arange(4)
    assert load[chosen].eq(1).all()
    assert load.sum() == len(chosen)


@pytest.mark.parametrize("kind", ["expert choice", "expert choice, capacity"])
def test_experts_choose_within_a_sequence(kind):
    """A sequence gets the same output alone, in a batch, and with pads."""
    block, x = routed_block(kind), sequences(batch=3, length=6).detach()
    alone = torch.cat([run(block, row[None]) for row in x])
    torch.testing.assert_close(run(block, x), alone)
    padded = torch.cat([x, 10 * torch.randn(3, 3, HIDDEN)], dim=1)
    mask = torch.ones(3, 9).index_fill(1, torch.tensor([6, 7, 8]), 0)
    routing = route(block, padded, mask)
    assert not routing.kept[mask.flatten()[routing.token_index] == 0].any()
    torch.testing.assert_close(run(block, padded, mask)[:, :6], alone)


def test_hash_depends_on_the_id_alone_and_spreads_the_ids():
    block = routed_block("hash", num_experts=8)
    ids = torch.arange(8000).reshape(2, 4000)
    first, second = (route(block, torch.randn(2, 4000, HIDDEN), ids=ids) for _ in range(2))
    assert torch.equal(first.top_k_index, second.top_k_index)
    load = first.top_k_index.flatten().bincount(minlength=8)
    assert load.min() > 0.9 * load.float().mean()


def test_hash_with_ids_of_other_tokens_is_refused():
    tokens = SideTokens(ids=torch.zeros(2, 5, dtype=torch.long), num_sequences=2)
    with pytest.raises(ValueError, match="sees 12 tokens cannot tell which of this call's 10 ids are theirs"):
        routed_block("hash").gate(torch.zeros(12, HIDDEN), tokens.context(12))


def test_hash_without_ids_is_refused():
    with pytest.raises(ValueError, match="Pass `input_ids`"):
        run(routed_block("hash"), sequences())


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 1, 5, 5), (2, 1, 1, 5)])
def test_a_mask_of_pairs_is_no_mask_of_tokens(shape):
    """Attention may be given such a mask; which tokens are pads it does not say."""
    block, x = routed_block("expert choice"), sequences(2, 5)
    torch.testing.assert_close(run(block, x, torch.zeros(shape)), run(block, x))


# ---- bad input ------------------------------------------------------------------------------------------------


@pairwise("kind,backend,bad", ROUTERS, BACKENDS, [float("nan"), float("inf"), -float("inf")])
def test_one_bad_token_spoils_itself_alone(kind, backend, bad):
    block, x = routed_block(kind, backend), sequences().detach()
    ids = pads_and_ids()[1]
    spoilt = x.clone()
    spoilt[1, 2, 3] = bad
    routing = route(block, spoilt, ids=ids)
    assert routing.router_logits.isfinite().all()
    assert routing.top_k_weights.isfinite().all()
    bad_row = 1 * 7 + 2
    assert routing.router_logits[bad_row].eq(0).all()
    assert routing.non_finite.nonzero().flatten().tolist() == ([] if kind == "hash" else [bad_row])
    others = torch.arange(21) != bad_row
    expected, actual = (run(block, tokens, ids=ids).reshape(-1, HIDDEN) for tokens in (x, spoilt))
    assert torch.isfinite(actual[others]).all()
    if "expert choice" not in kind:  # where experts choose, a token's place may go to another one of its sequence
        torch.testing.assert_close(actual[others], expected[others])
    else:
        elsewhere = torch.arange(21) // 7 != 1
        torch.testing.assert_close(actual[elsewhere], expected[elsewhere])


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_batch_of_pads(kind, training):
    block, x, (_, ids) = routed_block(kind).train(training), sequences(), pads_and_ids()
    mask = torch.zeros(3, 7)
    routing = route(block, x, mask, ids)
    assert routing.top_k_weights.isfinite().all()
    if routing.kept is not None:
        assert not routing.kept.any()
    output = run(block, x, mask, ids)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm", "sparse_moe"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_few_tokens_or_none(kind, backend):
    block = routed_block(kind, backend, num_experts=16)
    for shape in ((1, 1), (3, 1), (2, 0), (0, 4)):
        x, ids = sequences(*shape), torch.zeros(shape, dtype=torch.long)
        for training in (False, True):
            output = run(block.train(training), x, ids=ids)
            assert output.shape == x.shape
            if output.requires_grad:  # of the eager backend, where an expert ran
                output.sum().backward()
            if x.numel():
                torch.testing.assert_close(output.double(), block_oracle(block, x, ids=ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("kind", [kind for kind in ROUTERS if "group" not in kind])
def test_all_experts_for_every_token(kind, experts):
    block = routed_block(kind, num_experts=experts, num_experts_per_tok=experts)
    x, (mask, ids) = sequences(), pads_and_ids()
    torch.testing.assert_close(run(block, x, mask, ids).double(), block_oracle(block, x, mask, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity_factor": 0}, "`capacity_factor=0` is not allowed"),
        ({"capacity_factor": -1.0}, "`capacity_factor=-1.0` is not allowed"),
        ({"capacity_factor": float("nan")}, "`capacity_factor=nan` is not allowed"),
        ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef=-0.1` is not allowed"),
        ({"router_z_loss_coef": -1}, "`router_z_loss_coef=-1` is not allowed"),
        ({"router_bias_update_speed": 1e-3}, "`scoring_func='sigmoid'`"),
        ({"num_experts_per_tok": 5}, "between 1 and `num_experts=4`"),
        ({"n_group": 3}, "a divisor of `num_experts`"),
        ({"n_group": 2, "topk_group": 3}, "between 1 and `n_group=2`"),
        ({"n_group": 4, "topk_group": 1}, "at most 1, those of `topk_group=1` groups"),
        ({"router_type": "hash", "scoring_func": "cosine"}, "'softmax' unless"),
        ({"router_type": "random"}, "`router_type='random'` is not allowed"),
        ({"router_jitter_noise": 1.0}, "at least 0 and below 1"),
    ],
    ids=str,
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_config("encoder", **fields)


def test_experts_that_choose_are_refused_in_a_causal_decoder():
    with pytest.raises(ValueError, match="sees those that follow"):
        tiny_config("decoder", router_type="expert_choice")
    with pytest.raises(ValueError, match="sees those that follow"):
        tiny_config("bert", {"is_decoder": True}, router_type="expert_choice")


def test_in_an_encoder_decoder_experts_choose_on_the_encoders_side():
    model = tiny_sparse("t5", router_type="expert_choice")
    choosers = {block.side: isinstance(block.gate, SparseMoeExpertChoiceRouter) for block in model.sparse_blocks}
    assert choosers == {"encoder": True, "decoder": False}
