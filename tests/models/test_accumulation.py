"""
The gradient of one logical batch does not depend on how it is split over micro-batches.

With the stock `Trainer`, on 8 sequences as 8 x 1, 4 x 2, 2 x 4 and 1 x 8. Identical sequences route alike in each
micro-batch; different ones give the same gradient where a loss is one of each sequence. Stock mixtures add a mean
balance loss to a cross entropy that is divided by the step's label count already, so their router's gradient grows
with the accumulation steps; `test_stock_mixtral_grows` measures that with the same harness, which shows that the
harness can tell. Over processes: test_global_batch.py.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.modeling_outputs import ModelOutput

from models.balance_worker import (
    SCOPES,
    SPLITS,
    balanced_model,
    examples,
    relative_difference,
    router_gradient,
    step_trainer,
)
from tiny_models import FAMILIES, tiny_dense, tiny_inputs, tiny_sparse, without_dropout


def ratios(gradients):
    reference = gradients[0].norm()
    return [(gradient.norm() / reference).item() for gradient in gradients]


def differences_over_splits(make_model, kind, folder):
    """Relative to the gradient of one micro-batch."""
    gradients = [router_gradient(model := make_model(), examples(model, kind), *split, folder) for split in SPLITS]
    return [relative_difference(gradient, gradients[0]) for gradient in gradients[1:]]


def show(capsys, title, numbers):
    with capsys.disabled():
        print(f"\n{title}:", *(f"{number:.1e}" for number in numbers))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_router_gradient_is_the_same_for_every_split(family, scope, tmp_path, capsys):
    differences = differences_over_splits(lambda: balanced_model(family, scope, z_loss=0.1), "identical", tmp_path)
    show(capsys, f"{family}, {scope}: 4 x 2, 2 x 4, 1 x 8 differ from 8 x 1 by", differences)
    assert max(differences) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sequence_scope_is_the_same_on_different_sequences(family, tmp_path, capsys):
    """Of equal numbers of labels, by which a micro-batch weighs; the other scopes' load is that of several."""
    differences = differences_over_splits(lambda: balanced_model(family, "sequence", 0.1), "equal labels", tmp_path)
    show(capsys, f"{family}, sequence, different sequences: 4 x 2, 2 x 4, 1 x 8 differ from 8 x 1 by", differences)
    assert max(differences) <= 1e-5


def test_the_micro_batch_scope_is_not_the_same_on_different_sequences(tmp_path, capsys):
    """Its load is that of the micro-batch, so the difference is no fault; it shows that these tests can fail."""
    differences = differences_over_splits(lambda: balanced_model("decoder", "micro_batch"), "equal labels", tmp_path)
    show(capsys, "decoder, micro_batch, different sequences: 4 x 2, 2 x 4, 1 x 8 differ from 8 x 1 by", differences)
    assert min(differences) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_task_gradient_is_the_same_on_different_sequences(family, tmp_path):
    def make_model():
        return without_dropout(tiny_sparse(family, router_aux_loss_coef=0.0))

    assert max(differences_over_splits(make_model, "unequal labels", tmp_path)) <= 1e-5


def test_stock_mixtral_grows(tmp_path, capsys):
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
        router_aux_loss_coef=1.0,
    )  # fmt: skip

    def model():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)

    example = {name: torch.randint(50, (7,)) for name in ("input_ids",)}
    example |= {"labels": example["input_ids"], "attention_mask": torch.ones(7, dtype=torch.long)}
    gradients = [router_gradient(model(), [example] * 8, *split, tmp_path) for split in SPLITS]
    with capsys.disabled():
        print("\nstock Mixtral: router gradient over that of 8 x 1:", *(f"{r:.3f}" for r in ratios(gradients)))
    assert ratios(gradients)[-1] > 4


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_stock_task_gradients_grow(name, tmp_path, capsys):
    """Stock heads swallow `num_items_in_batch`, so Trainer does not divide by the steps, nor do they."""

    def gradient(*split):
        model = without_dropout(tiny_dense(name))
        gradients = {}
        for key, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, key=key: gradients.__setitem__(key, p.grad.clone()))
        step_trainer(model, examples(model, "identical"), *split, tmp_path).train()
        return torch.cat([tensor.flatten() for tensor in gradients.values()]).norm()

    ratio = (gradient(2, 4) / gradient(8, 1)).item()
    with capsys.disabled():
        print(f"\nstock {name}: whole gradient of 2 x 4 over that of 8 x 1: {ratio:.3f}")
    assert ratio == pytest.approx(4.0, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_eval_loss_is_the_task_loss_alone(family):
    model = without_dropout(tiny_sparse(family, router_aux_loss_coef=1.0))
    inputs = tiny_inputs(model)
    evaluated: ModelOutput = model.eval()(**inputs)
    trained: ModelOutput = model.train()(**inputs)
    assert evaluated.aux_loss is None
    torch.testing.assert_close(trained.loss, evaluated.loss + trained.aux_loss, rtol=1e-5, atol=1e-6)
