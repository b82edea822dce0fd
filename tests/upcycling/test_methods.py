"""Each upcycling method has the property that defines it, for the three families."""

import logging

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_sparse_moe import expert_lora_config, export, upcycle
from hf_sparse_moe.models.feed_forward import find_feed_forwards
from hf_sparse_moe.surgery import expand
from hf_sparse_moe.upcycling.initialization import balanced_k_means
from hf_sparse_moe.upcycling.recipe import layer_types
from pairwise import pairwise
from tiny_models import FAMILIES, tiny_dense, tiny_inputs, tiny_sparse


EXACT = 1e-5
UNITS = 48


def difference(model):
    return model.receipt["equality"]["max_abs_difference"]


def layers_of(dense, sparse):
    """Per layer: dense up (gate first where gated), dense down, and the block."""
    for feed_forward, block in zip(find_feed_forwards(dense), sparse.sparse_blocks, strict=True):
        ups = [feed_forward.part(name).weight for name in feed_forward.layout.up]
        down = feed_forward.part(feed_forward.layout.down).weight
        if feed_forward.transposed:
            ups, down = [weight.T for weight in ups], down.T
        yield torch.cat(ups).detach(), down.detach(), block


def up_of(block):
    return getattr(block.experts, block.experts.up_name).detach()


def unit_rows(up, units):
    """Whether a feed-forward's first projection, reshaped to (parts, units, H), is gated or not."""
    return up.reshape(-1, units, up.shape[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_repeats_the_dense_feed_forward(family):
    dense = tiny_dense(family)
    sparse = upcycle(dense, num_experts=4)
    assert difference(sparse) <= EXACT
    for up, down, block in layers_of(dense, sparse):
        assert all(torch.equal(expert, up) for expert in up_of(block))
        assert all(torch.equal(expert, down) for expert in block.experts.down_proj)
        assert block.gate.weight.std() < 0.1
        assert block.gate.weight.abs().min(dim=1).values.max() > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fields", [{"scoring_func": "softmax"}, {"scoring_func": "sigmoid", "num_experts_per_tok": 3}]
)
def test_copy_is_near_without_normalised_weights(family, fields):
    dense = tiny_dense(family)
    sparse = upcycle(dense, num_experts=4, norm_topk_prob=False, **fields)
    # every block gives the dense output times (sum of the token's weights) * E / k, or 2 / k for a sigmoid
    hidden = torch.randn(5, dense.config.hidden_size)
    for (_, _, block), feed_forward in zip(layers_of(dense, sparse), find_feed_forwards(dense), strict=True):
        if feed_forward.layout.inline:
            continue
        weights = block.gate(hidden).top_k_weights
        even = 0.25 * sparse.config.num_experts_per_tok if fields["scoring_func"] == "softmax" else 0.5 * 3
        expected = feed_forward.owner.eval()(hidden) * weights.sum(-1, keepdim=True) / even
        torch.testing.assert_close(block(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"capacity_factor": 1.0}, {"routed_scaling_factor": 2.5}])
def test_the_decoder_of_experts_that_choose_is_not_scaled_as_the_encoder(fields):
    dense = tiny_dense("encoder_decoder")
    exact, chooses = upcycle(dense, 4), upcycle(dense, 4, router_type="expert_choice", **fields)
    hidden = torch.randn(5, 32)
    for one, other in zip(exact.sparse_blocks, chooses.sparse_blocks, strict=True):
        if one.side == "decoder":
            torch.testing.assert_close(other(hidden), one(hidden))


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_scaling_factor_is_undone(family):
    assert difference(upcycle(tiny_dense(family), num_experts=4, routed_scaling_factor=2.5)) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_has_the_asked_deviation_on_each_matrix(family):
    dense = tiny_dense(family)
    sparse = upcycle(dense, num_experts=4, method="noise", noise_std=0.1)
    assert difference(sparse) > EXACT
    for up, down, block in layers_of(dense, sparse):
        for experts, matrix in ((up_of(block), up), (block.experts.down_proj.detach(), down)):
            noise = experts - matrix
            assert noise.std() / matrix.square().mean().sqrt() == pytest.approx(0.1, rel=0.1)
            assert abs(noise.mean()) < 0.1 * noise.std()
            assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_drop_redraws_the_same_units_in_every_projection(family):
    dense = tiny_dense(family)
    sparse = upcycle(dense, num_experts=4, method="drop", drop_ratio=0.25)
    redrawn_sets = []
    for up, down, block in layers_of(dense, sparse):
        for expert in range(4):
            parts = unit_rows(up_of(block)[expert], UNITS) != unit_rows(up, UNITS)
            changed_in_up = parts.any(dim=-1)
            changed_in_down = (block.experts.down_proj[expert] != down).any(dim=0)
            assert all(torch.equal(part, changed_in_down) for part in changed_in_up)
            assert changed_in_down.sum() == round(0.25 * UNITS)
            redrawn_sets.append(tuple(changed_in_down.nonzero().flatten().tolist()))
            new = block.experts.down_proj[expert][:, changed_in_down].detach()
            assert new.std() == pytest.approx(down.std().item(), rel=0.25)
            assert new.mean() == pytest.approx(down.mean().item(), abs=0.06)
    assert len(set(redrawn_sets)) > len(redrawn_sets) // 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", [2, 4])
def test_split_keeps_the_function_with_finer_experts(family, granularity):
    dense = tiny_dense(family)
    sparse = upcycle(dense, 8, 4, method="split", granularity=granularity)
    assert difference(sparse) <= EXACT
    for up, down, block in layers_of(dense, sparse):
        assert block.experts.intermediate_dim == UNITS // granularity
        for group in torch.arange(8).split(granularity):
            rows = torch.cat([unit_rows(up_of(block)[expert], UNITS // granularity) for expert in group], dim=1)
            assert torch.equal(rows, unit_rows(up, UNITS))  # every unit once a group
            columns = torch.cat([block.experts.down_proj[expert] for expert in group], dim=1)
            torch.testing.assert_close(columns, down * granularity)
            assert all(torch.equal(block.gate.weight[expert], block.gate.weight[group[0]]) for expert in group)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", [2, 4])
def test_the_hash_takes_every_part_of_a_split_feed_forward(family, granularity):
    sparse = upcycle(tiny_dense(family), 8, 4, method="split", granularity=granularity, router_type="hash")
    assert difference(sparse) <= EXACT
    found = []
    sparse.sparse_blocks[0].gate.register_forward_hook(lambda gate, given, routing: found.append(routing.top_k_index))
    sparse(**tiny_inputs(sparse, labels=False))
    parts = (found[0] % granularity).sort().values
    assert parts.unique(dim=0).tolist() == [sorted([*range(granularity)] * (4 // granularity))]
    assert found[0].unique().numel() == 8


@pytest.mark.parametrize(
    ("name", "fields", "degree"),
    [
        ("llama", {}, 1), ("bert", {"hidden_act": "relu"}, 1), ("bert", {"hidden_act": "relu2"}, 2),
        ("bert", {"hidden_act": "gelu"}, 0), ("t5_gated", {}, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("method", "experts", "top_k", "granularity"),
    [("split", 8, 4, 2), ("split", 16, 4, 4), ("copy", 4, 1, 1), ("copy", 4, 2, 1)],
)
def test_without_normalised_weights_the_start_is_off_by_the_sum_of_the_probabilities(
    name, fields, degree, method, experts, top_k, granularity
):
    """
    A block gives the dense output times E / k times the sum of the token's probabilities, which is between 1 and
    exp(range of its logits); the factor E G^2 / k on the weights (E groups) is shared out over the projections.
    """
    dense = tiny_dense(name, **fields)
    options = {"granularity": granularity} if method == "split" else {}
    sparse = upcycle(dense, experts, top_k, method=method, norm_topk_prob=False, **options)
    assert not sparse.receipt["arguments"]["norm_topk_prob"]
    factor = (experts * granularity / top_k) ** (1 / (1 + degree))
    hidden = torch.randn(20, 32)
    for exact, (up, down, block) in zip(upcycle(dense, 4).sparse_blocks, layers_of(dense, sparse), strict=True):
        routing = block.gate(hidden)
        ratio = routing.top_k_weights.sum(-1, keepdim=True) * experts / top_k
        torch.testing.assert_close(block(hidden), exact(hidden) * ratio, rtol=1e-4, atol=1e-5)
        spread = routing.router_logits.max(-1).values - routing.router_logits.min(-1).values
        assert (ratio[:, 0] >= 1 - 1e-6).all()
        assert (ratio[:, 0] <= spread.exp() + 1e-6).all()
        size = UNITS // granularity
        torch.testing.assert_close(block.experts.down_proj[0], down[:, :size] * factor)
        own, dense_rows = unit_rows(up_of(block)[0], size), unit_rows(up, UNITS)[:, :size]
        torch.testing.assert_close(own[-1], dense_rows[-1] * (factor if degree else 1.0))
        assert torch.equal(own[:-1], dense_rows[:-1])  # the gate, where there is one


@pytest.mark.parametrize("method", ["copy", "split"])
def test_probabilities_of_all_experts_sum_to_1(method):
    sparse = upcycle(tiny_dense("decoder"), 4, 4, method=method, norm_topk_prob=False)
    assert difference(sparse) <= EXACT
    with pytest.raises(AssertionError):
        assert difference(upcycle(tiny_dense("decoder"), 4, 2, method=method, norm_topk_prob=False)) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["copy", "graft", "noise", "branches"])
def test_one_expert_a_token_has_a_weight_that_trains_its_router(family, method, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    dense = tiny_dense(family)
    sources = {"sources": [dense] * 4} if method == "branches" else {}
    model = upcycle(
        None if sources else dense, 4, num_experts_per_tok=1, method=method, router_aux_loss_coef=0.0, **sources
    )
    assert model.config.norm_topk_prob is False
    assert ("starts near the dense model" in caplog.text) == (method == "copy")
    if method == "graft":
        assert difference(model) <= EXACT
        for block in model.sparse_blocks:
            torch.nn.init.normal_(block.experts.down_proj, std=0.1)
    from tiny_models import tiny_inputs

    model(**tiny_inputs(model)).loss.backward()
    assert all(block.gate.weight.grad.norm() > 1e-4 for block in model.sparse_blocks)


def owners(up, block):
    """For each expert, which dense unit each of its units is."""
    units, size = UNITS, block.experts.intermediate_dim
    dense = unit_rows(up, units)[0]
    return [
        [(dense == row).all(dim=-1).nonzero().item() for row in unit_rows(expert, size)[0]] for expert in up_of(block)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("partition", ["contiguous", "random", "k_means", "activation"])
def test_partition_gives_every_unit_to_exactly_one_expert(family, partition):
    dense = tiny_dense(family)
    data = [torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(0))]
    sparse = upcycle(dense, 4, 2, method="partition", partition=partition, data=data)
    for up, down, block in layers_of(dense, sparse):
        groups = owners(up, block)
        assert sorted(unit for group in groups for unit in group) == list(range(UNITS))
        assert {len(group) for group in groups} == {UNITS // 4}
        if partition == "contiguous":
            assert groups[0] == list(range(UNITS // 4))
        for expert, group in enumerate(groups):
            torch.testing.assert_close(block.experts.down_proj[expert], down[:, group] * 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_partition_is_exact_when_every_token_uses_all_experts(family):
    assert difference(upcycle(tiny_dense(family), 4, 4, method="partition")) <= EXACT
    shared = upcycle(tiny_dense(family), 3, 3, method="partition", shared_units=12)
    assert shared.config.num_shared_experts == 1
    assert difference(shared) <= EXACT


def test_partition_puts_the_most_active_units_into_the_shared_expert():
    dense = tiny_dense("decoder")
    feed_forward = find_feed_forwards(dense)[0]
    busy = torch.tensor([3, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43])
    feed_forward.part("up_proj").weight.data[busy] *= 50
    data = [torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(0))]
    sparse = upcycle(dense, 3, 1, method="partition", partition="activation", shared_units=12, data=data)
    block = sparse.sparse_blocks[0]
    shared = unit_rows(block.shared_experts.up_proj.weight.detach(), 12)[1]
    assert torch.equal(shared, feed_forward.part("up_proj").weight[busy])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [None, 12])
def test_graft_keeps_the_function_in_a_shared_expert(family, size):
    dense = tiny_dense(family)
    sparse = upcycle(dense, 4, method="graft", moe_intermediate_size=size)
    assert difference(sparse) <= EXACT
    for up, down, block in layers_of(dense, sparse):
        assert torch.equal(block.shared_experts.up_proj.weight, up)
        assert torch.equal(block.shared_experts.down_proj.weight, down)
        assert block.experts.down_proj.abs().max() == 0
        assert block.experts.intermediate_dim == (size or UNITS)
        assert not torch.equal(up_of(block)[0], up_of(block)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_graft_of_a_rank_is_a_low_rank_expert_and_streams_trains_adapts_and_exports(family, tmp_path):
    dense = tiny_dense(family)
    dense.save_pretrained(tmp_path / "dense")
    sparse = upcycle(dense, 4, method="graft", rank=4)
    assert difference(sparse) <= EXACT
    assert sparse.receipt["arguments"]["rank"] == 4
    for block in sparse.sparse_blocks:
        assert block.experts.down_proj.shape == (4, 32, 4)
        torch.nn.init.normal_(block.experts.down_proj)
        if not block.experts.biased:
            gate_up = up_of(block)[0]
            hidden = torch.randn(64, 32)
            inner = torch.nn.functional.linear(hidden, gate_up)
            inner = block.experts._apply_gate(inner) if block.experts.gated else block.experts.act_fn(inner)
            assert torch.linalg.matrix_rank(inner @ block.experts.down_proj[0].T) <= 4
    upcycle(tmp_path / "dense", 4, method="graft", rank=4, output=tmp_path / "streamed")
    streamed = type(sparse).from_pretrained(tmp_path / "streamed").state_dict()
    fresh = upcycle(dense, 4, method="graft", rank=4).state_dict()
    assert all(torch.equal(streamed[key], tensor) for key, tensor in fresh.items())
    adapted = get_peft_model(sparse, expert_lora_config(sparse, r=2))
    from tiny_models import tiny_inputs

    adapted(**tiny_inputs(sparse)).loss.backward()
    assert any(parameter.grad.any() for name, parameter in adapted.named_parameters() if "lora_B" in name)


def test_a_mixture_of_a_rank_exports(tmp_path):
    sparse = upcycle(tiny_dense("qwen2"), 4, method="graft", rank=4)
    for block in sparse.sparse_blocks:
        torch.nn.init.normal_(block.experts.down_proj)
    report = export(sparse, tmp_path / "stock")
    ids = torch.randint(5, 90, (2, 8))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ == "Qwen2MoeForCausalLM", report
    torch.testing.assert_close(stock(ids).logits, sparse(ids).logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="`num_shared_experts=12`: mixtral has no shared experts"):
        export(upcycle(tiny_dense("llama"), 4, method="graft", rank=4), tmp_path / "other", architecture="mixtral")


@pytest.mark.parametrize("name", ["bert", "bart", "gpt2"])
@pytest.mark.parametrize(
    ("method", "experts", "top_k", "options"),
    [("split", 4, 2, {}), ("graft", 4, 2, {}), ("graft", 4, 2, {"rank": 4}), ("partition", 4, 4, {})],
)
def test_biases_are_added_once(name, method, experts, top_k, options):
    assert difference(upcycle(tiny_dense(name), experts, top_k, method=method, **options)) <= EXACT


@pytest.mark.parametrize("method", ["copy", "noise", "drop", "split", "partition", "graft"])
def test_the_same_seed_gives_the_same_bits(method):
    dense = tiny_dense("decoder")
    first, second, other = (upcycle(dense, 4, 2, method=method, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_seeds_above_32_bits_and_below_zero_are_seeds_of_their_own():
    dense = tiny_dense("decoder")
    routers = [upcycle(dense, 4, seed=seed).sparse_blocks[0].gate.weight for seed in (0, 2**16, 2**32, -1)]
    assert not any(torch.equal(routers[i], routers[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("method", ["noise", "drop", "graft"])
def test_the_number_of_threads_does_not_change_the_bits(method):
    dense, before = tiny_dense("decoder"), torch.get_num_threads()
    states = []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            states.append(upcycle(dense, 4, method=method).state_dict())
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pairwise("method,family", ["copy", "noise", "drop", "split", "partition", "graft"], FAMILIES, strength=1)
def test_every_method_trains(method, family):
    model = upcycle(tiny_dense(family), 4, 2, method=method).train()
    from tiny_models import tiny_inputs

    loss = model(**tiny_inputs(model)).loss
    loss.backward()
    assert torch.isfinite(loss)
    for block in model.sparse_blocks:
        assert block.experts.down_proj.grad.abs().max() > 0
        assert torch.isfinite(block.gate.weight.grad).all()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", "sss"), ("none", "ddd"), ("every_1", "sss"), ("every_2", "dsd"), ("last_1", "dds"), ("first_2", "ssd"),
        ([0, -1], "sds"), ((1,), "dsd"), ([], "ddd"),
    ],
)  # fmt: skip
def test_layer_words(layers, expected):
    assert "".join(kind[0] for kind in layer_types(layers, 3)) == expected


@pytest.mark.parametrize("layers", ["some", "every_0", "last_4", [3], [-4]])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match="layer"):
        layer_types(layers, 3)


def test_layers_of_a_model():
    decoder = upcycle(tiny_dense("decoder"), 4, layers="last_1")
    assert decoder.config.mlp_layer_types == ["dense", "sparse"]
    assert difference(decoder) <= EXACT
    both = upcycle(tiny_dense("encoder_decoder"), 4, layers={"encoder": "none", "decoder": [0]})
    assert [block.side for block in both.sparse_blocks] == ["decoder"]
    assert difference(both) <= EXACT


def test_balanced_k_means_finds_the_groups():
    centres = 10 * torch.eye(4)
    points = (centres.repeat_interleave(6, dim=0) + 0.1 * torch.randn(24, 4))[torch.randperm(24)]
    labels = balanced_k_means(points, 4, torch.Generator().manual_seed(3))
    assert labels.bincount().tolist() == [6, 6, 6, 6]
    assert points.argmax(dim=1).unique().numel() == 4
    inertia = sum((points[labels == c] - points[labels == c].mean(0)).square().sum() for c in range(4))
    assert inertia < 24 * 4 * 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "clone"}, "`method='clone'` is not allowed"),
        ({"method": "split", "granularity": 3}, "`num_experts=4` is not a multiple"),
        ({"method": "partition", "router_type": "hash"}, "`router_type='hash'` is not allowed"),
        ({"method": "partition", "num_experts": 5}, "48 intermediate units cannot be divided by `num_experts=5`"),
        ({"method": "partition", "partition": "alphabetical"}, "`partition='alphabetical'`"),
        ({"method": "partition", "partition": "activation"}, "needs `data`"),
        ({"method": "partition", "shared_units": 48}, "`shared_units=48`"),
        ({"method": "graft", "moe_intermediate_size": 13}, "cannot be divided"),
        ({"method": "copy", "moe_intermediate_size": 13}, "`moe_intermediate_size=13`"),
        ({"method": "graft", "rank": 13}, "cannot be divided by `rank=13`"),
        ({"method": "graft", "rank": 12, "moe_intermediate_size": 24}, "exclude each other"),
        ({"method": "graft", "rank": -1}, "`rank=-1` is not allowed"),
        ({"method": "split", "moe_intermediate_size": 48}, "`moe_intermediate_size=48` is not allowed"),
        ({"method": "copy", "drop_ratio": 0.5}, "`drop_ratio` is neither a field"),
        ({"num_experts_per_tok": 5}, "`num_experts_per_tok=5`"),
        ({"data": [], "method": "partition", "partition": "activation"}, "`data` or `prompts` have no token"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_dense("decoder"), **{"num_experts": 4, **arguments})


def test_a_mixture_is_refused():
    with pytest.raises(ValueError, match="mixture already"):
        upcycle(tiny_sparse("decoder"))


def branches_of(family, count=3):
    """Dense models of one shape and other weights."""
    from tiny_models import enlarge_weights

    return [enlarge_weights(tiny_dense(family), seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_become_the_experts(family):
    branches = branches_of(family)
    sparse = upcycle(method="branches", sources=branches)
    assert sparse.config.num_experts == 3
    for branch_number, branch in enumerate(branches):
        for up, down, block in layers_of(branch, sparse):
            assert torch.equal(up_of(block)[branch_number], up)
            assert torch.equal(block.experts.down_proj[branch_number], down)
    embeddings = [branch.get_input_embeddings().weight for branch in branches]
    torch.testing.assert_close(sparse.get_input_embeddings().weight, torch.stack(embeddings).mean(0))
    assert len(sparse.receipt["branches"]) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_branches_keep_the_function(family):
    dense = tiny_dense(family)
    assert difference(upcycle(method="branches", sources=[dense, dense])) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_of_finer_experts(family):
    """A group of experts is one branch, and its equal router rows choose it whole."""
    branches = branches_of(family)
    whole = upcycle(method="branches", sources=branches, seed=1)
    fine = upcycle(method="branches", sources=branches, num_experts_per_tok=4, granularity=2, seed=1)
    assert (fine.config.num_experts, fine.config.moe_intermediate_size) == (6, UNITS // 2)
    inputs = {"input_ids": torch.randint(5, 90, (2, 8))}
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if family == "encoder_decoder" else {}
    torch.testing.assert_close(fine(**inputs).logits, whole(**inputs).logits, rtol=0, atol=1e-4)
    dense = tiny_dense(family)
    for prompts in (None, [[torch.randint(5, 90, (2, 8))], [torch.randint(5, 90, (2, 8))]]):
        equal = upcycle(method="branches", sources=[dense] * 2, granularity=2, num_experts_per_tok=2, prompts=prompts)
        assert difference(equal) <= EXACT
        assert all(torch.equal(block.gate.weight[0], block.gate.weight[1]) for block in equal.sparse_blocks)


def test_the_trunk_may_be_the_base():
    base, branches = tiny_dense("decoder"), branches_of("decoder")
    sparse = upcycle(base, method="branches", sources=branches, trunk="base")
    assert torch.equal(sparse.get_input_embeddings().weight, base.get_input_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_start_from_each_branch_s_own_text(family):
    dense = tiny_dense(family)
    generator = torch.Generator().manual_seed(0)
    # three "domains" with a vocabulary of their own
    prompts = [[torch.randint(low, low + 10, (8, 16), generator=generator)] for low in (10, 40, 70)]
    sparse = upcycle(method="branches", sources=[dense] * 3, prompts=prompts, num_experts_per_tok=1)
    held_out = [torch.randint(low, low + 10, (8, 16), generator=generator) for low in (10, 40, 70)]
    first_layer = []
    for ids in held_out:
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "encoder_decoder" else {})
        first_layer.append(sparse(**inputs, output_router_logits=True).router_logits[0].argmax(-1))
    agreement = torch.stack([(chosen == domain).float().mean() for domain, chosen in enumerate(first_layer)])
    assert agreement.mean() > 0.6  # a random router would give a third


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "at least 2"),
        ({"sources": ["llama", "qwen3"]}, "is a Qwen3ForCausalLM"),
        ({"sources": ["llama", "wide"]}, "the shape"),
        ({"sources": ["llama", "llama"], "num_experts": 3}, "`num_experts=3`"),
        ({"sources": ["llama"] * 2, "granularity": 2, "num_experts": 2, "num_experts_per_tok": 2}, "`granularity=2`"),
        ({"sources": ["llama"] * 2, "granularity": 2}, "`num_experts_per_tok=1` is not a multiple"),
        (
            {"sources": ["llama"] * 2, "granularity": 5, "num_experts_per_tok": 5},
            "divided by `granularity=5`",
        ),
        ({"sources": ["llama", "llama"], "trunk": "base"}, "needs the base model"),
        ({"sources": ["llama", "llama"], "trunk": "root"}, "`trunk='root'`"),
        ({"sources": ["llama", "llama"], "prompts": [[]]}, "`prompts` has 1 entries"),
        (
            {"sources": ["llama"] * 2, "prompts": [[], []], "router_type": "hash"},
            "`prompts` start the rows",
        ),
        (  # the hash would join halves of different branches
            {"sources": ["llama"] * 2, "granularity": 2, "num_experts_per_tok": 2, "router_type": "hash"},
            r"it must be one of \['top_k'\]",
        ),
    ],
)
def test_branches_that_do_not_fit_are_refused(arguments, message):
    models = {"llama": tiny_dense("llama"), "qwen3": tiny_dense("qwen3"), "wide": tiny_dense("llama", vocab_size=99)}
    arguments["sources"] = [models[name] for name in arguments["sources"]]
    with pytest.raises(ValueError, match=message):
        upcycle(method="branches", **{"num_experts_per_tok": 1} | arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_expand_repeats_experts_and_keeps_the_function(family):
    from tiny_models import tiny_inputs

    model = tiny_sparse(family)
    inputs = tiny_inputs(model)
    larger = expand(model, 3, router_noise=0.0)
    assert (larger.config.num_experts, larger.config.num_experts_per_tok) == (12, 6)
    torch.testing.assert_close(larger(**inputs).logits, model(**inputs).logits, rtol=0, atol=EXACT)
    for block, small in zip(larger.sparse_blocks, model.sparse_blocks, strict=True):
        assert torch.equal(up_of(block), torch.cat([up_of(small)] * 3))
    noisy = expand(model, 2, router_noise=0.5)
    rows = noisy.sparse_blocks[0].gate.weight.detach()
    assert torch.equal(rows[:4], model.sparse_blocks[0].gate.weight)
    assert not torch.equal(rows[4:], rows[:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_receipt_holds_the_loss_before_and_after(family):
    dense = tiny_dense(family)
    text = [torch.randint(5, 90, (2, 16)) for _ in range(2)]
    exact = upcycle(dense, 4, evaluation=text).receipt["loss"]
    assert exact["labels"] == 64
    assert exact["mixture"] == pytest.approx(exact["dense"], rel=1e-5)
    with torch.no_grad():
        expected = sum(dense(input_ids=ids, labels=ids).loss.item() for ids in text) / 2
    assert exact["dense"] == pytest.approx(expected, rel=1e-5)
    noisy = upcycle(dense, 4, method="drop", evaluation=text).receipt["loss"]
    assert noisy["dense"] == exact["dense"] != noisy["mixture"]
    with pytest.raises(ValueError, match="no batch with a label"):
        upcycle(dense, 4, evaluation=[])
