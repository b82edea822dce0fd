"""`torch.compile(fullgraph=True)`: one graph, the same numbers, routing and losses included."""

import pytest
import torch

from tiny_models import BACKBONES, FAMILIES, tiny_inputs, tiny_sparse


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]
# One layer, since tracing takes seconds a layer; no dropout, since compiled code draws other masks.
SMALL = {
    "bert": {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {"num_hidden_layers": 1},
    "llama": {"num_hidden_layers": 1},
    "gpt2": {"n_layer": 1},
    "qwen3": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "dropout_rate": 0.0},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "t5_gated": {"num_layers": 1, "dropout_rate": 0.0},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_evaluation_is_the_same(name: str, implementation: str) -> None:
    model = tiny_sparse(name, dense_fields=SMALL[name])
    model.set_experts_implementation(implementation)
    forward = torch.compile(model, fullgraph=True, backend="eager")
    for seed in range(2):  # the second call must not find routing of the first
        inputs = tiny_inputs(model, pads=2, seed=seed)
        with torch.no_grad():
            expected = model(**inputs, output_router_logits=True)
            outputs = forward(**inputs, output_router_logits=True)
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close(outputs.logits, expected.logits)
        torch.testing.assert_close(outputs.aux_loss, expected.aux_loss)
        for logits, wanted in zip(outputs.router_logits, expected.router_logits, strict=True):
            torch.testing.assert_close(logits, wanted)


def assert_training_step_is_the_same(name: str, backend: str) -> None:
    model = tiny_sparse(name, dense_fields=SMALL[name], router_z_loss_coef=0.1).train()
    inputs = tiny_inputs(model, pads=2)
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        outputs = forward(**inputs, num_items_in_batch=torch.tensor(20))
        outputs.loss.backward()
        results.append((outputs.loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    scale = max(gradient.abs().max().item() for gradient in results[0][1])
    for gradient, wanted in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * scale)


# The graph of a training step holds that of an evaluation: one family is evaluated here, the others take a step.
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("bert", "grouped_mm"),
        *(
            pytest.param(name, implementation, marks=pytest.mark.conformance)
            for implementation, names in (("grouped_mm", BACKBONES), ("batched_mm", ONE_A_FAMILY))
            for name in names
            if (name, implementation) != ("bert", "grouped_mm")
        ),
    ],
)
def test_evaluation(name, implementation):
    assert_evaluation_is_the_same(name, implementation)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.conformance) if name == "bert" else name for name in ONE_A_FAMILY]
)
def test_training_step(name):
    assert_training_step_is_the_same(name, "aot_eager")


@pytest.mark.conformance  # a minute for a C++ compiler
def test_training_step_with_generated_code():
    assert_training_step_is_the_same("llama", "inductor")
