"""`torch.compile(fullgraph=True)`: one graph, the same numbers, routing and losses included."""

import pytest
import torch
from tiny_models import BACKBONES, FAMILIES, tiny_inputs, tiny_sparse


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: torch.nn.Module, backend: str) -> torch.nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", BACKBONES)
def test_evaluation(name, implementation):
    model = tiny_sparse(name)
    model.set_experts_implementation(implementation)
    inputs = tiny_inputs(model, pads=2)
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True)
        outputs = compiled(model, "eager")(**inputs, output_router_logits=True)
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
    for logits, wanted in zip(outputs.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(logits, wanted)


def assert_training_step_is_the_same(name: str, backend: str) -> None:
    # Compiled code draws other dropout masks, so none is drawn.
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate")
    fields = {field: 0.0 for field in dropouts if name in ("bert", "t5")}
    model = tiny_sparse(name, dense_fields=fields, router_z_loss_coef=0.1).train()
    inputs = tiny_inputs(model, pads=2)
    results = []
    for forward in (model, compiled(model, backend)):
        model.zero_grad()
        outputs = forward(**inputs, num_items_in_batch=torch.tensor(20))
        outputs.loss.backward()
        results.append((outputs.loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    scale = max(gradient.abs().max().item() for gradient in results[0][1])
    for gradient, wanted in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_training_step(name):
    assert_training_step_is_the_same(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_training_step_with_generated_code(name):
    assert_training_step_is_the_same(name, "inductor")


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_no_state_leaks_from_one_call_to_the_next(name):
    model = tiny_sparse(name)
    forward = compiled(model, "eager")
    for seed in range(3):
        inputs = tiny_inputs(model, seed=seed)
        with torch.no_grad():
            outputs, expected = forward(**inputs, output_router_logits=True), model(**inputs, output_router_logits=True)
        assert len(outputs.router_logits) == len(model.sparse_blocks)
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
