"""The balance losses against their formulas, written out token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_sparse_moe.models.balancing import expert_counts, load_balancing_loss, router_z_loss
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse


def routed(tokens, experts, k, seed):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return logits, logits.softmax(-1), logits.topk(k, dim=-1).indices


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_equals_the_formula(tokens, experts, k, seed, masked):
    k = min(k, experts)
    logits, probabilities, index = routed(tokens, experts, k, seed)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    real = [t for t in range(tokens) if mask is None or mask[t]]

    counts = [0] * experts
    for t in real:
        for slot in range(k):
            counts[index[t, slot]] += 1
    assert expert_counts(index, experts, mask).tolist() == counts
    assert sum(counts) == len(real) * k

    expected = 0.0
    for e in range(experts):
        share = counts[e] / max(len(real) * k, 1)
        mean = sum(probabilities[t, e].item() for t in real) / max(len(real), 1)
        expected += experts * share * mean
    assert load_balancing_loss(probabilities, index, mask).item() == pytest.approx(expected, abs=1e-5)

    z = sum(torch.logsumexp(logits[t], 0).item() ** 2 for t in real) / max(len(real), 1)
    assert router_z_loss(logits, mask).item() == pytest.approx(z, rel=1e-5, abs=1e-6)


def test_even_load_gives_one_and_collapse_gives_the_number_of_experts():
    even = torch.full((8, 4), 0.25)
    index = torch.tensor([[0, 1], [2, 3]] * 4)
    assert load_balancing_loss(even, index).item() == pytest.approx(1.0)
    collapsed = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert load_balancing_loss(collapsed, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4.0)


def test_layers_that_collapse_onto_different_experts_are_not_balanced():
    """Four layers, each on its own two of eight experts: transformers' pooled loss calls that perfect."""
    layers = []
    for layer in range(4):
        logits = torch.full((16, 8), -50.0)
        logits[:, 2 * layer : 2 * layer + 2] = 0.0
        layers.append(logits)
    ours = torch.stack([load_balancing_loss(x.softmax(-1), x.topk(2, dim=-1).indices) for x in layers]).mean()
    stock = load_balancing_loss_func(tuple(layers), num_experts=8, top_k=2)
    assert ours.item() == pytest.approx(4.0)  # 8 experts, an even load over 2 of them
    assert stock.item() == pytest.approx(2.0)  # what it gives for a perfectly even load


@pytest.mark.parametrize("family", FAMILIES)
def test_model_averages_its_layers_and_leaves_pads_out(family):
    model = tiny_sparse(family).eval()
    inputs = tiny_inputs(model)
    inputs["attention_mask"][:, -2:] = 0
    inputs["labels"][:, -2:] = -100
    outputs = model(**inputs, output_router_logits=True)
    expected = []
    for block, logits in zip(model.sparse_blocks, outputs.router_logits, strict=True):
        # without a decoder mask, the decoder's tokens are those with a label
        mask = inputs["attention_mask"] if block.side == "encoder" or family == "decoder" else inputs["labels"] != -100
        index = logits.topk(model.config.num_experts_per_tok, dim=-1).indices
        expected.append(load_balancing_loss(logits.softmax(-1), index, mask.reshape(-1)))
    torch.testing.assert_close(outputs.aux_loss, torch.stack(expected).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_zero_records_nothing(family):
    model = tiny_sparse(family, router_aux_loss_coef=0.0).train()
    outputs = model(**tiny_inputs(model))
    assert outputs.aux_loss is None
    assert outputs.router_logits is None


def test_all_pads_give_zero_and_finite_gradients():
    logits = torch.randn(5, 4, requires_grad=True)
    mask = torch.zeros(5)
    loss = load_balancing_loss(logits.softmax(-1), logits.topk(2, dim=-1).indices, mask) + router_z_loss(logits, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max() == 0
