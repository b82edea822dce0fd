"""Each head's loss is the dense head's own, and sums over the micro-batches of a step to the loss of the whole."""

import pytest
import torch
import transformers as hf
from transformers.utils.generic import find_labels

import hf_sparse_moe
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_dense, tiny_inputs, tiny_sparse


# BART alone has an encoder-decoder's classification and question-answering heads with a decoder of their own making.
HEADS = [
    (name, auto_class)
    for names, classes in zip(FAMILIES.values(), AUTO_CLASSES.values(), strict=True)
    for name in names
    for auto_class in classes
    if auto_class is not hf.AutoModel
]
HEAD_IDS = [f"{name}-{auto_class.__name__.removeprefix('AutoModel')}" for name, auto_class in HEADS]
PROBLEMS = {
    "regression": ({"num_labels": 1}, lambda batch: torch.randn(batch)),
    "several regressions": ({"num_labels": 3, "problem_type": "regression"}, lambda batch: torch.randn(batch, 3)),
    "multi-label": ({"num_labels": 3}, lambda batch: torch.randint(2, (batch, 3)).float()),
    "three classes": ({"num_labels": 3}, lambda batch: torch.randint(3, (batch,))),
}


@pytest.mark.parametrize(("name", "auto_class"), HEADS, ids=HEAD_IDS)
def test_loss_is_the_dense_model_s_own(name, auto_class):
    dense = tiny_dense(name, auto_class)
    sparse = hf_sparse_moe.upcycle(dense, num_experts=4)
    assert isinstance(sparse, AUTO_CLASSES[type(sparse.config)][auto_class])
    inputs = tiny_inputs(dense, pads=2)
    expected = dense(**inputs).loss
    assert expected > 0.1
    torch.testing.assert_close(sparse(**inputs).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_loss_of_each_kind_of_classification_is_the_dense_model_s_own(name, problem):
    fields, make_labels = PROBLEMS[problem]
    dense = tiny_dense(name, hf.AutoModelForSequenceClassification, **fields)
    sparse = hf_sparse_moe.upcycle(dense, num_experts=4)
    torch.manual_seed(0)
    inputs = tiny_inputs(dense, labels=False) | {"labels": make_labels(2)}
    torch.testing.assert_close(sparse(**inputs).loss, dense(**inputs).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_classification_losses_of_micro_batches_sum_to_the_whole(name, problem):
    fields, make_labels = PROBLEMS[problem]
    model = tiny_sparse(name, hf.AutoModelForSequenceClassification, dense_fields=fields)
    torch.manual_seed(0)
    batch = tiny_inputs(model, labels=False, batch=4) | {"labels": make_labels(4)}
    assert_parts_sum_to_whole(model, batch, count=batch["labels"].numel())


@pytest.mark.parametrize(("name", "auto_class"), HEADS, ids=HEAD_IDS)
def test_losses_of_micro_batches_sum_to_the_whole(name, auto_class):
    model = tiny_sparse(name, auto_class)
    batch = tiny_inputs(model, batch=4, pads=2)
    if "start_positions" in batch:
        count = 4
    elif auto_class is hf.AutoModelForCausalLM:
        count = batch["labels"][:, 1:].ne(-100).sum()
    else:
        count = batch["labels"].ne(-100).sum()
    assert_parts_sum_to_whole(model, batch, count)


def assert_parts_sum_to_whole(model, batch: dict, count: torch.Tensor | int) -> None:
    whole = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=count).loss, whole, rtol=1e-5, atol=1e-6)
    for sizes in ([1, 1, 1, 1], [2, 2], [1, 3]):
        pieces = zip(*(value.split(sizes) for value in batch.values()), strict=True)
        parts = [model(**dict(zip(batch, piece, strict=True)), num_items_in_batch=count).loss for piece in pieces]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [names[0] for names in FAMILIES.values()])
def test_training_adds_the_balance_losses(name):
    model = tiny_sparse(name, router_aux_loss_coef=0.0).train()
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["input_ids"]  # every position has a label, so every token counts
    torch.manual_seed(0)  # the same dropout both times
    task = model(**inputs).loss
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 0.5, 0.25
    torch.manual_seed(0)
    outputs = model(**inputs, output_router_logits=True)
    z_loss = sum(logits.logsumexp(-1).square().mean() for logits in outputs.router_logits) / len(outputs.router_logits)
    torch.testing.assert_close(outputs.loss, task + 0.5 * outputs.aux_loss + 0.25 * z_loss)
    assert outputs.aux_loss > 1.0


@pytest.mark.parametrize("name", [names[0] for names in FAMILIES.values()])
def test_labels_without_a_head_are_refused(name):
    model = tiny_sparse(name, hf.AutoModel)
    inputs = tiny_inputs(model, labels=False)
    with pytest.raises(ValueError, match="`labels` need a head"):
        model(**inputs, labels=inputs["input_ids"])


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "m2m_100", "marian", "pegasus", "t5gemma"])
def test_targets_are_shifted_as_the_dense_model_shifts_them(name):
    dense = tiny_dense(name)
    sparse = hf_sparse_moe.upcycle(dense, num_experts=2)
    labels = torch.tensor([[7, 8, 9, 2, -100], [7, 8, 9, 10, 2]])
    inputs = tiny_inputs(dense, labels=False) | {"decoder_input_ids": None, "labels": labels}
    expected = dense(**inputs)
    actual = sparse(**inputs)
    assert actual.logits.shape == (2, 5, VOCAB_SIZE)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_class", [cls for classes in AUTO_CLASSES.values() for cls in classes.values()])
def test_trainer_takes_no_other_argument_for_a_label(model_class):
    """Trainer evaluates a loss only where every argument with "label" in its name is given."""
    expected = ["start_positions", "end_positions"] if "QuestionAnswering" in model_class.__name__ else ["labels"]
    assert find_labels(model_class) == expected


def test_labels_that_are_shifted_already():
    model = tiny_sparse("decoder")
    inputs = tiny_inputs(model)
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, expected)
