"""Recomputing activations changes no gradient, the balance loss's gradient of the routers included."""

import pytest
import torch

from tiny_models import BACKBONES, FAMILIES, tiny_inputs, tiny_sparse


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]
KINDS = [{"use_reentrant": True}, {"use_reentrant": False}]


def gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)  # the same dropout each time
    outputs = model(**tiny_inputs(model, pads=2))
    outputs.loss.backward()
    return outputs.loss.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: tuple, expected: tuple) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    assert actual[1].keys() == expected[1].keys()
    # Gradients that are zero but for rounding (a bias of attention keys) are compared on the others' scale.
    atol = 1e-6 * max(wanted.abs().max().item() for wanted in expected[1].values())
    for key, wanted in expected[1].items():
        torch.testing.assert_close(actual[1][key], wanted, rtol=1e-5, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("kind", KINDS, ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_are_the_same(name, kind):
    model = tiny_sparse(name, router_aux_loss_coef=0.5, router_z_loss_coef=0.1).train()
    if kind["use_reentrant"]:
        model.enable_input_require_grads()  # a reentrant checkpoint needs an input with a gradient
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    assert model.is_gradient_checkpointing
    assert_same(gradients(model), expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("kind", KINDS, ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_the_balance_loss_alone_reaches_every_router(name, kind):
    """A reentrant checkpoint runs its layers without gradients first: logits kept from that run would have none."""
    model = tiny_sparse(name).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
    model(**tiny_inputs(model)).aux_loss.backward()
    for block in model.sparse_blocks:
        assert block.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_router_logits_come_out_once_a_layer(name):
    model = tiny_sparse(name).train()
    inputs = tiny_inputs(model)
    torch.manual_seed(0)
    expected = model(**inputs, output_router_logits=True).router_logits
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    router_logits = model(**inputs, output_router_logits=True).router_logits
    for logits, wanted in zip(router_logits, expected, strict=True):
        torch.testing.assert_close(logits, wanted)
