"""
The gradient of one logical batch does not depend on how it is split over micro-batches.

With the stock `Trainer`, on 8 identical sequences (so that each micro-batch routes alike), as 8 x 1, 4 x 2, 2 x 4 and
1 x 8. Stock mixtures add a mean balance loss to a cross entropy that is divided by the step's label count already, so
their router's gradient grows with the accumulation steps; `test_stock_mixtral_grows` measures that with the same
harness, which shows that the harness can tell.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from tiny_models import FAMILIES, tiny_dense, tiny_inputs, tiny_sparse, without_dropout


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


class RouterGradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "gate.weight" in name])


def train(model, examples, batch_size, accumulation, tmp_path, callbacks=()):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=examples, callbacks=list(callbacks)).train()


def router_gradient(model, examples, batch_size, accumulation, tmp_path):
    callback = RouterGradient()
    train(model, examples, batch_size, accumulation, tmp_path, [callback])
    return callback.gradient


def one_batch(model, identical):
    """8 examples, the last tokens of each padded out."""
    inputs = tiny_inputs(model, batch=1 if identical else 8)
    inputs["attention_mask"][:, -2:] = 0
    inputs["labels"][:, -2:] = -100
    return [{name: value[0 if identical else row] for name, value in inputs.items()} for row in range(8)]


def ratios(gradients):
    reference = gradients[0].norm()
    return [(gradient.norm() / reference).item() for gradient in gradients]


@pytest.mark.parametrize("family", FAMILIES)
def test_router_gradient_is_the_same_for_every_split(family, tmp_path, capsys):
    def model():
        return without_dropout(tiny_sparse(family, router_aux_loss_coef=1.0, router_z_loss_coef=0.1))

    examples = one_batch(model(), identical=True)
    gradients = [router_gradient(model(), examples, *split, tmp_path) for split in SPLITS]
    with capsys.disabled():
        print(f"\n{family}: router gradient over that of 8 x 1:", *(f"{ratio:.6f}" for ratio in ratios(gradients)))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_task_gradient_is_the_same_on_different_sequences(family, tmp_path):
    def model():
        return without_dropout(tiny_sparse(family, router_aux_loss_coef=0.0))

    examples = one_batch(model(), identical=False)
    gradients = [router_gradient(model(), examples, *split, tmp_path) for split in SPLITS]
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


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
        train(model, one_batch(model, identical=True), *split, tmp_path)
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
