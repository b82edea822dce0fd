"""The balance losses against their formulas, written out token by token."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_sparse_moe.models.balancing import (
    expert_counts,
    load_balancing_loss,
    router_z_loss,
    sequence_balancing_loss,
    sequence_counts,
)
from hf_sparse_moe.models.masks import tokens_by_side
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse, without_dropout


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


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_sequence_scope_equals_the_formula_of_each_sequence(sequences, length, experts, k, seed, masked):
    k = min(k, experts)
    logits, _, index = routed(sequences * length, experts, k, seed)
    probabilities = logits.double().softmax(-1)
    mask = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    losses, all_counts = [], []
    for sequence in range(sequences):
        tokens = range(sequence * length, (sequence + 1) * length)
        real = [t for t in tokens if mask is None or mask[t]]
        counts = [sum(int(index[t, slot] == e) for t in real for slot in range(k)) for e in range(experts)]
        all_counts.append(counts)
        if real:
            means = [sum(probabilities[t, e].item() for t in real) / len(real) for e in range(experts)]
            losses.append(experts * sum(c / (len(real) * k) * p for c, p in zip(counts, means, strict=True)))
    assert sequence_counts(index, experts, sequences, mask).tolist() == all_counts
    expected = sum(losses) / max(len(losses), 1)
    assert sequence_balancing_loss(probabilities, index, sequences, mask).item() == pytest.approx(expected, abs=1e-6)


def test_sequence_scope_punishes_sequences_that_are_even_only_together():
    """Each of 4 sequences sends all its tokens to an expert of its own."""
    index = torch.arange(4).repeat_interleave(6)[:, None]
    probabilities = torch.eye(4)[index[:, 0]]
    assert load_balancing_loss(probabilities, index).item() == pytest.approx(1.0)
    assert sequence_balancing_loss(probabilities, index, 4).item() == pytest.approx(4.0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_layers_that_collapse_onto_different_experts_are_not_balanced(k, capsys):
    """Each layer on its own k of eight experts, so that all are used: transformers' pooled loss calls that perfect."""
    layers = []
    for layer in range(8 // k):
        logits = torch.full((16, 8), -50.0)
        logits[:, k * layer : k * (layer + 1)] = 0.0
        layers.append(logits)
    ours = torch.stack([load_balancing_loss(x.softmax(-1), x.topk(k, dim=-1).indices) for x in layers]).mean()
    stock = load_balancing_loss_func(tuple(layers), num_experts=8, top_k=k)
    even = load_balancing_loss_func(tuple(torch.eye(8).repeat(2, 1) for _ in layers), num_experts=8, top_k=8) / 8 * k
    with capsys.disabled():
        print(f"\nlayers of 8 experts collapsed onto {k}: ours {ours:.4f} (even: 1), stock {stock:.4f} ({even:.4f})")
    assert ours.item() == pytest.approx(8 / k)
    assert stock.item() == pytest.approx(even.item())


def test_a_model_whose_layers_collapse_scores_the_number_of_experts():
    """Layer l sends every token to expert l."""
    model = tiny_sparse("decoder", dense_fields={"num_hidden_layers": 4}, num_experts_per_tok=1).eval()
    for number, block in enumerate(model.sparse_blocks):
        with torch.no_grad():
            block.gate.weight.fill_(-1.0)[number] = 1.0
        block.gate.register_forward_pre_hook(lambda gate, args: (torch.ones_like(args[0]),))
    outputs = model(**tiny_inputs(model), output_router_logits=True)
    assert outputs.aux_loss.item() == pytest.approx(4.0)
    assert load_balancing_loss_func(outputs.router_logits, num_experts=4, top_k=1).item() == pytest.approx(1.0)


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


class Operations(TorchDispatchMode):
    """The operations that torch runs while it is entered."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations(model, step):
    with Operations() as counted:
        step().backward()
    model.zero_grad()  # else the next backward pass adds to the gradients
    return counted.names


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_of_zero_cost_nothing(family, capsys):
    """Forward and backward run the operations of the dense model and its task loss, and none of their own."""
    model = without_dropout(tiny_sparse(family, router_aux_loss_coef=0.0)).train()
    inputs = tiny_inputs(model)
    labels = inputs["labels"]
    dense_inputs = {name: value for name, value in inputs.items() if name != "labels"}
    dense = copy.deepcopy(model.dense)
    for module in dense.modules():  # run by itself, a part asks which tokens count
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()

    def dense_alone():
        if model.config.is_encoder_decoder:
            dense_inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        tokens_by_side(model, {**dense_inputs, "labels": labels})  # the tokens that count, which some routers ask for
        return model.compute_task_loss(dense(**dense_inputs), labels, None)

    with_zero = operations(model, lambda: model(**inputs).loss)
    outputs = model(**inputs)
    assert outputs.aux_loss is None
    assert outputs.router_logits is None
    alone = operations(model, dense_alone)
    model.config.router_aux_loss_coef = 0.1
    balanced = operations(model, lambda: model(**inputs).loss)
    with capsys.disabled():
        counts = [len(alone), len(with_zero), len(balanced)]
        print(f"\n{family}, operations: dense model and task loss, coefficient 0, coefficient 0.1:", *counts)
    assert Counter(with_zero) <= Counter(alone)  # the dense model alone works out which tokens count once more
    assert len(balanced) > len(with_zero)


def test_all_pads_give_zero_and_finite_gradients():
    logits = torch.randn(5, 4, requires_grad=True)
    mask = torch.zeros(5)
    loss = load_balancing_loss(logits.softmax(-1), logits.topk(2, dim=-1).indices, mask) + router_z_loss(logits, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().max() == 0
