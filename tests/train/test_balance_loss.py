"""`task_loss` and `aux_loss` in the logs: what they are means of, who gets them, and what stays behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sparse_moe.models.task_losses import batch_weight
from hf_sparse_moe.train import BalanceLossCallback, add_leading_callback
from tiny_models import FAMILIES, tiny_dense, tiny_inputs, tiny_sparse, without_dropout


COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


class Reporter(TrainerCallback):
    """Stands where the integrations of `report_to` stand: before the callbacks that a user adds."""

    def __init__(self):
        self.received = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.received.append(dict(logs))


def sparse(family, **fields):
    return without_dropout(tiny_sparse(family, **{**COEFFICIENTS, **fields}))


def examples(model, count=16):
    """Rows with ever more pads, so that their label counts differ."""
    inputs = tiny_inputs(model, batch=count, length=9)
    for row in range(count):
        inputs["attention_mask"][row, 9 - row % 5 :] = 0
        inputs["labels"][row, 9 - row % 5 :] = -100
    return [{name: value[row] for name, value in inputs.items()} for row in range(count)]


def make_trainer(model, tmp_path, rows, **arguments):
    reporter = Reporter()
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2, "learning_rate": 0.0}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        **{**defaults, **arguments},
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[reporter])
    add_leading_callback(trainer, BalanceLossCallback())
    return trainer, reporter


def expected(model, rows, batch_size, accumulation):
    """Mean task and balance losses over all rows, from plain forward passes over the same micro-batches."""
    task = aux = 0.0
    micro = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = [{name: torch.stack([row[name] for row in batch]) for name in batch[0]} for batch in micro]
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    with torch.no_grad():
        for step in steps:
            counted = [model.counted_labels(batch["labels"]) for batch in step]
            total = sum(labels.ne(-100).sum() for labels in counted)
            for batch, labels in zip(step, counted, strict=True):
                outputs = model(**batch, num_items_in_batch=total, output_router_logits=True)
                task += outputs.loss / len(steps)
                aux += batch_weight(labels, total) * outputs.aux_loss / len(steps)
    return float(task), float(aux)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_means_over_the_labels_since_the_last_log(family, accumulation, tmp_path):
    model = sparse(family)
    rows = examples(model)
    steps = 4 // accumulation  # once over the rows
    trainer, _ = make_trainer(
        model, tmp_path, rows, gradient_accumulation_steps=accumulation, max_steps=steps, logging_steps=steps
    )
    trainer.train()
    log = trainer.state.log_history[0]
    task, aux = expected(sparse(family).eval(), rows, 4, accumulation)
    assert log["task_loss"] == pytest.approx(task, rel=1e-5)
    assert log["aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert log["loss"] > log["task_loss"] + 0.5 * log["aux_loss"]  # the z-loss is in the sum alone


def test_the_parts_sum_to_the_loss(tmp_path):
    model = sparse("decoder", router_z_loss_coef=0.0)
    trainer, _ = make_trainer(model, tmp_path, examples(model), learning_rate=1e-3, gradient_accumulation_steps=2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["task_loss"] + 0.5 * log["aux_loss"], rel=1e-5)


def test_integrations_and_history_get_the_losses_and_evaluations_do_not(tmp_path):
    model = sparse("encoder", output_router_logits=True)  # in evaluation too
    rows = examples(model)
    trainer, reporter = make_trainer(model, tmp_path, rows, eval_strategy="steps", eval_steps=2)
    trainer.train()
    for logs in (reporter.received, trainer.state.log_history):
        assert [{"task_loss", "aux_loss"} <= set(log) for log in logs if "loss" in log] == [True, True]
        assert not any({"task_loss", "aux_loss"} & set(log) for log in logs if "loss" not in log)
    # The evaluation between the two logs counts for neither.
    _, aux = expected(sparse("encoder").eval(), rows[8:], 4, 1)
    assert [log for log in trainer.state.log_history if "loss" in log][1]["aux_loss"] == pytest.approx(aux, rel=1e-5)


def test_the_mixture_is_found_inside_peft(tmp_path):
    base = sparse("decoder")
    rows = examples(base)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    trainer, _ = make_trainer(model, tmp_path, rows, max_steps=4, logging_steps=4, label_names=["labels"])
    trainer.train()
    task, aux = expected(sparse("decoder").eval(), rows, 4, 1)
    assert trainer.state.log_history[0]["task_loss"] == pytest.approx(task, rel=1e-5)
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(aux, rel=1e-5)


def test_nothing_stays_on_the_model(tmp_path):
    model = sparse("decoder")
    rows = examples(model)
    trainer, _ = make_trainer(model, tmp_path, rows)
    trainer.train()
    assert "compute_task_loss" not in vars(model)
    assert not model._forward_hooks

    class Failure(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Failure())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Failure)
    trainer.train()  # the interrupted training's hook is gone, and counts nothing twice
    assert not model._forward_hooks
    log = trainer.state.log_history[0]
    assert log["aux_loss"] == pytest.approx(expected(model.eval(), rows[:8], 4, 1)[1], rel=1e-5)


def test_a_dense_model_is_refused(tmp_path):
    model = tiny_dense("decoder")
    trainer, _ = make_trainer(model, tmp_path, examples_of_dense(model))
    with pytest.raises(ValueError, match="without a mixture"):
        trainer.train()


def examples_of_dense(model):
    inputs = tiny_inputs(model, batch=4)
    return [{name: value[row] for name, value in inputs.items()} for row in range(4)]


def test_label_smoothing_is_refused_because_it_drops_the_balance_loss(tmp_path):
    model = sparse("decoder")
    trainer, _ = make_trainer(model, tmp_path, examples(model), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()
