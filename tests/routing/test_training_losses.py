"""`task_loss`, `aux_loss` and `z_loss` in the logs: what they are means of, and what they sum to."""

import pytest
import torch

from hf_sparse_moe.models.losses import batch_weight
from hf_sparse_moe.routing import RoutingMonitor, fix_balance
from monitored_training import make_model, make_rows, make_trainer
from tiny_models import FAMILIES


COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def logs_of(model, folder, **arguments):
    trainer = make_trainer(model, folder, make_rows(model), monitor=RoutingMonitor(), **arguments)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


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
    model = make_model(family, **COEFFICIENTS)
    steps = 4 // accumulation  # once over the rows
    (log,) = logs_of(model, tmp_path, gradient_accumulation_steps=accumulation, max_steps=steps, logging_steps=steps)
    task, aux = expected(make_model(family, **COEFFICIENTS).eval(), make_rows(model), 4, accumulation)
    assert log["task_loss"] == pytest.approx(task, rel=1e-5)
    assert log["aux_loss"] == pytest.approx(aux, rel=1e-5)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_parts_sum_to_the_loss(accumulation, scope, tmp_path):
    model = make_model("decoder", balance_scope=scope, **COEFFICIENTS)
    logs = logs_of(model, tmp_path, learning_rate=1e-3, gradient_accumulation_steps=accumulation)
    assert len(logs) == 2
    for log in logs:
        total = log["task_loss"] + 0.5 * log["aux_loss"] + 0.1 * log["z_loss"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)


def test_without_balance_losses_the_task_loss_is_the_loss(tmp_path):
    for log in logs_of(make_model("decoder", router_aux_loss_coef=0.0), tmp_path, gradient_accumulation_steps=2):
        assert log["task_loss"] == pytest.approx(log["loss"], rel=1e-6)
        assert not {"aux_loss", "z_loss"} & set(log)


def test_the_parts_of_a_stock_mixture_sum_to_its_loss(tmp_path):
    model = make_model("mixtral")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    for log in logs_of(model, tmp_path, learning_rate=1e-3):
        assert log["loss"] == pytest.approx(log["task_loss"] + 0.5 * log["aux_loss"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_parts_of_a_fixed_stock_mixture_sum_to_its_loss(accumulation, tmp_path):
    model = make_model("mixtral")
    with fix_balance(model, router_aux_loss_coef=0.5):
        logs = logs_of(model, tmp_path, learning_rate=1e-3, gradient_accumulation_steps=accumulation)
    for log in logs:
        assert 0.9 < log["aux_loss"] < 2
        assert log["loss"] == pytest.approx(log["task_loss"] + 0.5 * log["aux_loss"], rel=1e-5)


def test_a_loss_from_elsewhere_stays_what_it_is_and_the_balance_loss_stands_beside_it(tmp_path):
    """With label smoothing Trainer computes the loss."""
    balanced, plain = (
        logs_of(make_model("decoder", **fields), folder, learning_rate=0.0, label_smoothing_factor=0.1)
        for fields, folder in (
            (COEFFICIENTS, tmp_path / "balanced"),
            ({"router_aux_loss_coef": 0.0}, tmp_path / "plain"),
        )
    )
    assert [log["loss"] for log in balanced] == pytest.approx([log["loss"] for log in plain], rel=1e-6)
    assert all(0.9 < log["aux_loss"] < 2 and log["z_loss"] > 0 for log in balanced)
