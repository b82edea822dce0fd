"""The load of the global batch: over ranks, over the micro-batches of a step, and nothing else."""

import logging

import pytest
import torch
import transformers as hf
from transformers import TrainerCallback

from hf_sparse_moe.models.balancing import OptimizerStep
from hf_sparse_moe.models.optimizer_steps import OptimizerStepCallback
from models.balance_worker import (
    CASES,
    SCOPES,
    SEQUENCES,
    balanced_model,
    case_gradient,
    collate,
    examples,
    gradients_of_a_rank,
    step_trainer,
)
from models.balance_worker import relative_difference as difference
from processes import in_processes
from tiny_models import FAMILIES, tiny_inputs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The routers' gradients of two gloo processes, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    out = folder / "gradients.pt"
    assert in_processes(2, gradients_of_a_rank, out) == [0, 0]
    saved = torch.load(out)
    assert saved["world_size"] == 2
    assert saved["wrapper"] == "DistributedDataParallel"
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_have_the_router_gradient_of_one(case, two_processes, tmp_path, capsys):
    reference = case_gradient(case, SEQUENCES, 1, tmp_path)
    relative = difference(two_processes["gradients"][tuple(case)], reference)
    micro = f"2 processes, {SEQUENCES // 2 // case.accumulation} x {case.accumulation}"
    with capsys.disabled():
        print(
            f"\n{case.family}, {case.scope}, {case.kind}, z {case.z_loss}: {micro} differ from 8 x 1 by {relative:.1e}"
        )
    assert relative <= 1e-5


def micro_batches(model, number=2):
    rows = examples(model, "unequal labels")
    size = len(rows) // number
    return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]


def per_token_aux_loss(model, batches):
    """
    Of the last of `batches`, in float64: E sum_e f_e P_e a layer, f from the tokens of all of them, P from its own.
    """
    with torch.no_grad():
        outputs = [model(**batch, output_router_logits=True) for batch in batches]
    layers = []
    for layer, block in enumerate(model.sparse_blocks):
        experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
        counts, sums, tokens = [0.0] * experts, [0.0] * experts, 0
        for number, (batch, output) in enumerate(zip(batches, outputs, strict=True)):
            encodes = block.side == "encoder" or not model.config.is_encoder_decoder
            mask = batch["attention_mask"] if encodes else batch["labels"] != -100
            for logits, real in zip(output.router_logits[layer].double(), mask.flatten(), strict=True):
                if real:
                    for expert in logits.argsort(descending=True)[:top_k]:
                        counts[expert] += 1
                    if number == len(batches) - 1:
                        tokens += 1
                        sums = [total + p.item() for total, p in zip(sums, logits.softmax(-1), strict=True)]
        layers.append(experts * sum(c / sum(counts) * s / tokens for c, s in zip(counts, sums, strict=True)))
    return sum(layers) / len(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_is_that_of_the_step_so_far_token_by_token(family):
    model = balanced_model(family, "global_batch").train()
    batches = micro_batches(model, number=4)
    expected = [per_token_aux_loss(model, batches[: number + 1]) for number in range(4)]
    for _ in range(2):  # the second step begins anew
        model.start_optimizer_step()
        for batch, value in zip(batches, expected, strict=True):
            outputs = model(**batch)
            assert outputs.aux_loss.item() == pytest.approx(value, rel=1e-5)
            outputs.loss.backward()
        model.zero_grad()
    assert len(set(expected)) == 4


def losses_of_two_steps(model, between):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = []
    for _ in range(2):
        model.start_optimizer_step()
        for batch in micro_batches(model):
            outputs = model(**batch)
            outputs.loss.backward()
            losses.append(outputs.aux_loss.item())
            between(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_each_step_begins_anew():
    first, second, *next_step = losses_of_two_steps(
        balanced_model("decoder", "global_batch").train(), lambda model, batch: None
    )
    assert next_step == pytest.approx([first, second], rel=1e-6)
    assert first != second


def test_a_forward_pass_that_trains_nothing_does_not_count():
    def evaluate(model, batch):
        with torch.no_grad():
            model(**batch)
        model.eval()(**batch, output_router_logits=True)
        model.train()

    plain = losses_of_two_steps(balanced_model("decoder", "global_batch").train(), lambda model, batch: None)
    assert losses_of_two_steps(balanced_model("decoder", "global_batch").train(), evaluate) == plain


def test_where_nothing_tells_of_steps_each_micro_batch_stands_alone_and_that_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    hf.utils.logging.warning_once.cache_clear()
    model = balanced_model("decoder", "global_batch").train()
    batches = micro_batches(model, number=4)
    for batch in batches:
        assert model(**batch).aux_loss.item() == pytest.approx(per_token_aux_loss(model, [batch]), rel=1e-5)
    (message,) = [record.getMessage() for record in caplog.records if "start_optimizer_step" in record.getMessage()]
    assert "balances each micro-batch by itself" in message


def test_every_trainer_tells_of_steps(tmp_path):
    """Also one with other callbacks, and around a wrapper; the list of transformers that this rests on is there."""
    model = balanced_model("decoder", "global_batch")
    seen = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            seen.append(model.optimizer_step.earlier_LE.sum().item())

        on_step_end = on_substep_end

    trainer = step_trainer(model, examples(model, "identical"), 2, 2, tmp_path, callbacks=[Watch()], max_steps=2)
    trainer.train()
    assert seen == [seen[0], 2 * seen[0]] * 2
    assert sum(isinstance(call, OptimizerStepCallback) for call in trainer.callback_handler.callbacks) == 1


def test_counts_of_another_shape_begin_anew():
    step = OptimizerStep(None)
    step.start()
    seen = []
    for layers in (2, 2, 1):
        step.global_losses([torch.ones(4)] * layers, [torch.full((4,), 0.25)] * layers, [2] * layers, None, None)
        seen.append(step.earlier_LE.tolist())
    assert seen == [[[1.0] * 4] * 2, [[2.0] * 4] * 2, [[1.0] * 4]]


@pytest.mark.parametrize("scope", SCOPES)
def test_one_micro_batch_of_one_sequence_has_the_same_loss_in_every_scope(scope):
    model = balanced_model("decoder", scope).train()
    inputs = tiny_inputs(model, batch=1)
    expected = per_token_aux_loss(model, [inputs])
    assert model(**inputs).aux_loss.item() == pytest.approx(expected, rel=1e-5)
