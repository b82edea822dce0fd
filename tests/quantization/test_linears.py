"""Experts as linears: the same outputs, every expert seen by what hooks linears, and what is changed goes back."""

import copy

import pytest
import torch
from torch import nn

from adapted_models import STOCK, adapted, logits_of, stock_mixture
from hf_sparse_moe import experts_as_linears
from hf_sparse_moe.quantization import quantize_experts
from tiny_models import FAMILIES, tiny_dense, tiny_inputs, tiny_sparse, without_dropout


def mixture(name):
    return without_dropout(stock_mixture(name) if name in STOCK else tiny_sparse(name))


def linears_of_experts(model):
    return {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and ".experts." in name
    }


@pytest.mark.parametrize("name", [*FAMILIES, *STOCK, "gpt2", "bert"])
def test_outputs_are_equal_and_every_expert_is_a_linear_for_a_while(name):
    model = mixture(name)
    inputs = tiny_inputs(model, labels=False)
    expected, state = logits_of(model, inputs), copy.deepcopy(model.state_dict())
    seen = {}
    with experts_as_linears(model) as tokens:
        linears = linears_of_experts(model)
        for key, linear in linears.items():
            linear.register_forward_hook(lambda _, args, __, key=key: seen.update({key: len(args[0])}))
        torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-4, atol=1e-4)
    for module, counts in tokens.items():
        assert counts.sum() > 0
        for number, count in enumerate(counts.tolist()):
            down = f"{module}.{number}.down_proj"
            assert down in linears
            assert seen.get(down, 0) == count
    assert not linears_of_experts(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits_of(model, inputs), expected)


def halve_in_place(linear):
    linear.weight.data.mul_(0.5)


def halve_as_new_data(linear):
    linear.weight.data = linear.weight.data * 0.5


def halve_as_a_new_parameter(linear):
    linear.weight = nn.Parameter(linear.weight * 0.5)


@pytest.mark.parametrize("halve", [halve_in_place, halve_as_new_data, halve_as_a_new_parameter])
@pytest.mark.parametrize("name", ["decoder", "gpt_oss", "gpt2"])
def test_changed_weights_go_back(name, halve):
    model = mixture(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    with experts_as_linears(model):
        for linear in linears_of_experts(model).values():
            halve(linear)
    for key, value in model.named_parameters():
        halved = ".experts." in key and value.dim() == 3
        assert torch.equal(value, before[key] * 0.5 if halved else before[key]), key


def test_a_rounding_tool_that_walks_linears_reaches_every_expert():
    """As GPTQ does it: inputs gathered by hooks, a weight of each linear written from them."""
    model = mixture("decoder")
    inputs, gram = tiny_inputs(model, labels=False), {}
    with experts_as_linears(model) as tokens:
        hooks = [
            linear.register_forward_hook(lambda module, args, _: gram.update({module: args[0].mT @ args[0]}))
            for linear in linears_of_experts(model).values()
        ]
        logits_of(model, inputs)
        for hook in hooks:
            hook.remove()
        for linear, hessian in gram.items():
            step = linear.weight.abs().max() / 7
            assert hessian.shape == (linear.in_features, linear.in_features)
            linear.weight.data = (linear.weight / step).round() * step
        expected = logits_of(model, inputs)
    assert len(gram) == 3 * sum(int((count > 0).sum()) for count in tokens.values())
    torch.testing.assert_close(logits_of(model, inputs), expected, rtol=1e-4, atol=1e-4)


def replace_a_linear(model):
    with experts_as_linears(model):
        experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
        first = experts.get_submodule("0")["down_proj"]
        first.weight = nn.Parameter(torch.zeros_like(first.weight))
        experts.get_submodule("1")["down_proj"] = type("Packed", (nn.Identity,), {})()


def test_what_does_not_go_back_is_told_and_nothing_is_changed():
    model = mixture("decoder")
    expected = logits_of(model, inputs := tiny_inputs(model, labels=False))
    with pytest.raises(ValueError, match=r"experts\.1\.down_proj` is a Packed now"):
        replace_a_linear(model)
    assert torch.equal(logits_of(model, inputs), expected)


def test_other_models_are_refused():
    pytest.importorskip("bitsandbytes")
    for model, reason in (
        (tiny_dense("llama"), "has no experts"),
        (quantize_experts(mixture("decoder"), 4), "not a plain float tensor"),
        (adapted(mixture("decoder")), "with adapters do not become linears"),
    ):
        with pytest.raises(ValueError, match=reason), experts_as_linears(model):
            pass
