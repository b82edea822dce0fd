"""The bias moves by its formula, once an optimizer step, and comes back as it was."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_sparse_moe.routing import RoutingMonitor, SelectionBiasCallback, find_mixture_layers
from monitored_training import biases, make_model, make_rows, make_trainer


SPEED = 0.01
SIGMOID = {"scoring_func": "sigmoid", "router_aux_loss_coef": 0.0}
MIXTURES = [("decoder", SIGMOID), ("encoder_decoder", SIGMOID), ("deepseek_v3", {})]


def trained(family, fields, folder, speed=SPEED, **arguments):
    model = make_model(family, **fields)
    callbacks = [SelectionBiasCallback(speed)]
    trainer = make_trainer(model, folder, make_rows(model), callbacks, **{"max_steps": 2, **arguments})
    trainer.train()
    return model


def move_by_hand(model, rows):
    """One step of the formula, from the choices of one row at a time."""
    layers = find_mixture_layers(model)
    chosen = [[] for _ in layers]
    handles = [
        layer.experts.register_forward_pre_hook(lambda m, args, place=place: chosen[place].append(args[1]))
        for place, layer in enumerate(layers)
    ]
    loads = [[0] * layer.num_experts for layer in layers]
    model.eval()
    with torch.no_grad():
        for row in rows:
            model(**{name: value[None] for name, value in row.items()})
            for load, layer, index in zip(loads, layers, chosen, strict=True):
                in_decoder = model.config.is_encoder_decoder and ".decoder." in layer.name
                counts = row["labels"] != -100 if in_decoder else row["attention_mask"] == 1
                for token in counts.nonzero().flatten().tolist():
                    for expert in index[-1][token].tolist():
                        load[expert] += 1
    for handle in handles:
        handle.remove()
    for load, layer in zip(loads, layers, strict=True):
        mean = sum(load) / len(load)
        for expert, count in enumerate(load):
            layer.selection_bias[expert] += SPEED * ((mean > count) - (mean < count))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize(("family", "fields"), MIXTURES)
def test_the_bias_follows_the_formula_once_a_step_on_every_split(family, fields, batch_size, accumulation, tmp_path):
    split = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    moved = biases(trained(family, fields, tmp_path, **split))
    model = make_model(family, **fields)
    rows = make_rows(model)
    move_by_hand(model, rows[:8])
    move_by_hand(model, rows[8:])
    for bias, by_hand in zip(moved, biases(model), strict=True):
        assert torch.equal(bias, by_hand)
        assert len(bias.unique()) > 1


@pytest.mark.parametrize(("family", "fields"), [MIXTURES[0], MIXTURES[2]])
def test_two_ranks_move_the_bias_as_one_does(family, fields, tmp_path, train_on_two_ranks):
    one = [bias.tolist() for bias in biases(trained(family, fields, tmp_path, per_device_train_batch_size=8))]
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    first, second = train_on_two_ranks(family, fields, bias=True, max_steps=2, **split)["biases"]
    assert first == second == one


def test_gradient_checkpointing_counts_once(tmp_path):
    plain = biases(trained("decoder", SIGMOID, tmp_path))
    for reentrant in (True, False):
        again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        assert all(map(torch.equal, plain, biases(trained("decoder", SIGMOID, tmp_path, **again))))


# Trainer's resume loses the experts of stock mixtures (transformers issue 48805), so that theirs do not learn here.
@pytest.mark.parametrize(("family", "fields", "rate"), [("decoder", SIGMOID, 1e-2), ("deepseek_v3", {}, 0.0)])
def test_a_resumed_training_ends_with_the_same_bits(family, fields, rate, tmp_path):
    arguments = {"learning_rate": rate, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(family, fields, tmp_path, **arguments)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    half = [value for name, value in sorted(saved.items()) if name.endswith("e_score_correction_bias")]
    assert half
    assert all(len(bias.unique()) > 1 for bias in half)
    resumed = make_model(family, **fields)
    trainer = make_trainer(resumed, tmp_path, make_rows(resumed), [SelectionBiasCallback(SPEED)], **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, value), again in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, again), name
    assert not all(map(torch.equal, half, biases(resumed)))


def test_the_bias_is_saved_and_loaded(tmp_path):
    model = trained("decoder", SIGMOID, tmp_path)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for bias, again in zip(biases(model), biases(loaded), strict=True):
        assert again.dtype == torch.float32
        assert torch.equal(bias, again)


def test_evaluation_leaves_the_bias(tmp_path):
    model = make_model("decoder", **SIGMOID)
    rows = make_rows(model)
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen.append(biases(model))

        def on_step_end(self, args, state, control, **kwargs):
            seen.append(biases(model))

    callbacks = [SelectionBiasCallback(SPEED), Watch()]
    trainer = make_trainer(model, tmp_path, rows, callbacks, eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer.train()
    step, evaluation, next_step, _ = seen
    assert all(map(torch.equal, step, evaluation))
    assert not all(map(torch.equal, evaluation, next_step))
    # What an evaluation routes is no load of the step after it either.
    assert all(map(torch.equal, next_step, biases(trained("decoder", SIGMOID, tmp_path))))
    trainer.evaluate()
    assert all(map(torch.equal, next_step, biases(model)))


def test_a_skipped_optimizer_step_leaves_the_bias_and_its_load_is_forgotten(tmp_path):
    class Overflow(TrainerCallback):
        """As a gradient scaler does at an overflow, which the CPU never has."""

        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            optimizer._is_overflow = state.global_step == 0

    model = make_model("decoder", **SIGMOID)
    rows = make_rows(model)
    callbacks = [Overflow(), SelectionBiasCallback(SPEED)]
    make_trainer(model, tmp_path, rows, callbacks, per_device_train_batch_size=8, max_steps=2).train()
    by_hand = make_model("decoder", **SIGMOID)
    move_by_hand(by_hand, rows[8:])
    assert all(map(torch.equal, biases(model), biases(by_hand)))


@pytest.mark.parametrize("family", ["decoder", "deepseek_v3"])
def test_the_load_of_a_skewed_router_evens_out(family, tmp_path):
    def violations(callbacks):
        model = make_model(family, **(SIGMOID if family == "decoder" else {}))
        with torch.no_grad():
            for layer in find_mixture_layers(model):
                layer.selection_bias[0] = 0.6  # the first choice of nearly every token
        monitor = RoutingMonitor()
        steps = {"max_steps": 60, "logging_steps": 4, "learning_rate": 1e-3}
        trainer = make_trainer(model, tmp_path, make_rows(model), callbacks, monitor, **steps)
        trainer.train()
        return [log["router/max_violation"] for log in trainer.state.log_history if "loss" in log]

    still, moving = violations([]), violations([SelectionBiasCallback(0.03)])
    assert moving[0] > 0.5
    assert moving[-1] < 0.5 * moving[0]
    assert moving[-1] < 0.5 * still[-1]


@pytest.mark.parametrize("family", ["decoder", "deepseek_v3"])
def test_a_bias_in_low_precision_is_kept_in_float32(family, tmp_path, warnings_of_ours):
    """In bfloat16 a step of 1e-3 from 0.5 is no step."""
    model = make_model(family, **(SIGMOID if family == "decoder" else {})).to(torch.bfloat16)
    with torch.no_grad():
        for layer in find_mixture_layers(model):
            layer.selection_bias.fill_(0.5)
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(model, tmp_path, make_rows(model), [SelectionBiasCallback(1e-3)], **arguments)
    trainer.train()
    assert len([message for message in warnings_of_ours() if "float32" in message]) <= 1
    for bias in biases(model):
        assert bias.dtype == torch.float32
        assert (bias - 0.5).abs().max() > 1e-3
    # A checkpoint is loaded into the wide buffer.
    again = make_model(family, **(SIGMOID if family == "decoder" else {})).to(torch.bfloat16)
    trainer = make_trainer(again, tmp_path, make_rows(again), [SelectionBiasCallback(1e-3)], **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(map(torch.equal, biases(model), biases(again)))


def test_the_speed_is_the_config_s(tmp_path):
    fields = {**SIGMOID, "router_bias_update_speed": 0.02}
    for bias in biases(trained("decoder", fields, tmp_path, speed=None, max_steps=1)):
        assert bias.abs().max() == torch.tensor(0.02)
    for bias in biases(trained("deepseek_v3", {}, tmp_path, speed=None, max_steps=1)):
        assert bias.abs().max() == torch.tensor(0.001)  # its config has no such field


@pytest.mark.parametrize("speed", [0.0, -0.1, float("nan"), float("inf")])
def test_a_speed_that_moves_nothing_is_refused(speed):
    with pytest.raises(ValueError, match="update_speed"):
        SelectionBiasCallback(speed)


def test_a_config_without_speed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="router_bias_update_speed"):
        trained("decoder", SIGMOID, tmp_path, speed=None)


@pytest.mark.parametrize("family", ["decoder", "mixtral"])
def test_a_softmax_router_is_refused_with_the_remedy(family, tmp_path):
    with pytest.raises(ValueError, match=r"no selection bias.*sigmoid.*router_aux_loss_coef"):
        trained(family, {}, tmp_path)
