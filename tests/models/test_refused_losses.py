"""
A loss that leaves out the balance loss is refused in its backward pass, whoever computes it; nothing else is. TRL's
trainers run the body with a head of their own, and are refused there.
"""

import copy
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy

from models.balance_worker import (
    RouterGradient,
    balanced_model,
    collate,
    examples,
    relative_difference,
    router_gradient,
    step_trainer,
)
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_inputs, tiny_sparse, without_dropout


REFUSAL = "leaves out the balance loss"
BODY_REFUSAL = "run by itself.*SFTTrainer"
COEFFICIENTS = [{"router_aux_loss_coef": 0.5}, {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.5}]
CHECKPOINTING = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
}


def own_loss(model, inputs, outputs=None):
    """A task loss from the logits alone."""
    logits = (outputs or model(**inputs)).logits
    return cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


def training_model(family, checkpointing="none", **fields):
    model = without_dropout(tiny_sparse(family, **{"router_aux_loss_coef": 0.5, **fields})).train()
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable(CHECKPOINTING[checkpointing])
        model.enable_input_require_grads()
    return model


def gate_gradient(model):
    gradient = torch.cat([block.gate.weight.grad.flatten() for block in model.sparse_blocks])
    model.zero_grad()
    return gradient


# ---- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=["aux", "z"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_from_the_logits_alone_is_refused(family, coefficients, checkpointing):
    model = training_model(family, checkpointing, **coefficients)
    inputs = tiny_inputs(model)
    loss = own_loss(model, inputs)
    with pytest.raises(ValueError, match=REFUSAL):
        loss.backward()


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_the_task_loss_alone_is_refused_in_every_scope(scope):
    model = training_model("decoder", balance_scope=scope)
    outputs = model(**tiny_inputs(model))
    with pytest.raises(ValueError, match=REFUSAL):
        outputs.task_loss.backward()


def test_a_head_of_one_s_own_on_the_headless_model_is_refused():
    model = without_dropout(tiny_sparse("encoder", hf.AutoModel, router_aux_loss_coef=0.5)).train()
    loss = model(**tiny_inputs(model)).last_hidden_state.square().mean()
    with pytest.raises(ValueError, match=REFUSAL):
        loss.backward()


class OwnComputeLoss(hf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = own_loss(model, inputs, outputs)
        return (loss, outputs) if return_outputs else loss


def row_examples(model):
    """Rows of a data set for a loss that takes the labels away from the model."""
    rows = examples(model, "unequal labels")
    if model.config.is_encoder_decoder:
        for row in rows:
            row["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(row["labels"][None])[0]
    return rows


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_s_label_smoothing_is_refused(family, accumulation, tmp_path):
    model = balanced_model(family, "micro_batch")
    size = 8 // accumulation
    with pytest.raises(ValueError, match=f"{REFUSAL}.*`label_smoothing_factor`"):
        router_gradient(model, row_examples(model), size, accumulation, tmp_path, label_smoothing_factor=0.1)


def test_a_compute_loss_of_one_s_own_is_refused(tmp_path):
    model = balanced_model("decoder", "micro_batch")
    with pytest.raises(ValueError, match=f"{REFUSAL}.*`compute_loss`"):
        step_trainer(model, examples(model, "identical"), 8, 1, tmp_path, OwnComputeLoss).train()


def test_a_compute_loss_func_is_refused(tmp_path):
    model = balanced_model("decoder", "micro_batch")
    trainer = step_trainer(model, examples(model, "identical"), 8, 1, tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()
    with pytest.raises(ValueError, match=REFUSAL):
        trainer.train()


# ---- right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_adding_the_balance_losses_by_hand_gives_the_gradient_of_the_loss(family, checkpointing):
    model = training_model(family, checkpointing, router_z_loss_coef=0.25)
    inputs = tiny_inputs(model)
    model(**inputs).loss.backward()
    expected = gate_gradient(model)
    outputs = model(**inputs)
    (outputs.task_loss + 0.5 * outputs.aux_loss + 0.25 * outputs.z_loss).backward()
    torch.testing.assert_close(gate_gradient(model), expected)


def test_two_forward_passes_before_one_backward():
    model = training_model("decoder")
    first, second = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    (model(**first).loss + model(**second).loss).backward()
    together = gate_gradient(model)
    model(**first).loss.backward()
    model(**second).loss.backward()
    torch.testing.assert_close(gate_gradient(model), together)


def test_the_second_of_two_forward_passes_without_its_balance_loss_is_refused():
    model = training_model("decoder")
    inputs = tiny_inputs(model)
    loss = model(**inputs).loss + own_loss(model, inputs)
    with pytest.raises(ValueError, match=REFUSAL):
        loss.backward()


def test_a_copied_model_follows_its_own_config():
    model = training_model("decoder")
    duplicate = copy.deepcopy(model)
    duplicate.config.router_aux_loss_coef = 0.0
    inputs = tiny_inputs(model)
    duplicate.base_model(inputs["input_ids"]).last_hidden_state.sum().backward()
    with pytest.raises(ValueError, match=BODY_REFUSAL):
        model.base_model(inputs["input_ids"])


def freeze_routers(model):
    for block in model.sparse_blocks:
        block.gate.requires_grad_(False)
    return model


NOT_REFUSED = {
    "coefficients 0": lambda: training_model("decoder", router_aux_loss_coef=0.0),
    "evaluation": lambda: training_model("decoder").eval(),
    "frozen routers": lambda: freeze_routers(training_model("decoder")),
    "frozen routers, checkpointed": lambda: freeze_routers(training_model("decoder", "not reentrant")),
    "hash router": lambda: training_model("decoder", router_type="hash"),
    "adapters on attention": lambda: get_peft_model(
        training_model("decoder"), LoraConfig(target_modules=["q_proj"], r=2)
    ).get_base_model(),
}


@pytest.mark.parametrize("name", NOT_REFUSED)
def test_where_no_balance_loss_trains_a_router_a_loss_from_the_logits_is_not_refused(name):
    model = NOT_REFUSED[name]()
    own_loss(model, tiny_inputs(model)).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_forward_passes_without_gradient_are_not_refused():
    model = training_model("decoder")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert model(**inputs).aux_loss is not None
        assert model.base_model(inputs["input_ids"]).last_hidden_state.shape == (2, 7, 32)


@pytest.mark.parametrize(
    "scope",
    ["global_batch", *(pytest.param(scope, marks=pytest.mark.conformance) for scope in ("micro_batch", "sequence"))],
)
def test_compiled_in_one_graph_the_loss_and_its_gradient_are_the_same(scope):
    model = training_model("decoder", balance_scope=scope, router_z_loss_coef=0.25)
    model.set_experts_implementation("grouped_mm")
    inputs = tiny_inputs(model, pads=2)
    outputs = model(**inputs)
    outputs.loss.backward()
    expected = gate_gradient(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        again = compiled(**inputs)
        again.loss.backward()
        torch.testing.assert_close(again.aux_loss, outputs.aux_loss)
        torch.testing.assert_close(gate_gradient(model), expected, rtol=1e-4, atol=1e-6)


def test_compiled_without_labels_a_loss_from_the_logits_alone_is_refused():
    """There somebody else computes the loss, so the graph is broken for the hooks. With labels it stays whole."""
    model = training_model("decoder")
    inputs = tiny_inputs(model)
    labels = inputs.pop("labels")
    compiled = torch.compile(model, backend="aot_eager")
    loss = own_loss(model, {"labels": labels}, compiled(**inputs))
    with pytest.raises(ValueError, match=REFUSAL):
        loss.backward()
    outputs = compiled(**inputs)
    (own_loss(model, {"labels": labels}, outputs) + 0.5 * outputs.aux_loss).backward()
    assert gate_gradient(model).norm() > 0


def smoothed_gradient(model, rows):
    """The routers' gradient of the formula: cross entropy against (1 - 0.1) one-hot + 0.1 / V."""
    batch = collate(rows)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if model.config_class.model_type == "sparse_moe_decoder":
        logits, labels = logits[:, :-1], labels[:, 1:]
    cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1).backward()
    return gate_gradient(model)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_balance_loss_label_smoothing_is_right(family, accumulation, tmp_path, capsys):
    """A causal class must be known to Trainer for one whose labels it shifts."""
    model = without_dropout(tiny_sparse(family, router_aux_loss_coef=0.0)).train()
    rows = row_examples(model)
    expected = smoothed_gradient(model, rows)
    gradient = router_gradient(model, rows, 8 // accumulation, accumulation, tmp_path, label_smoothing_factor=0.1)
    difference = relative_difference(gradient, expected)
    with capsys.disabled():
        print(
            f"\n{family}, label smoothing, {accumulation} micro-batches: differs from the formula by {difference:.1e}"
        )
    assert difference <= 1e-5


def test_the_auto_classes_list_the_causal_class_once():
    mapping = hf.AutoModelForCausalLM._model_mapping
    classes = [model_class.__name__ for model_class in mapping.values() if "SparseMoe" in str(model_class)]
    assert classes == ["SparseMoeDecoderForCausalLM"]
    assert len(mapping) == len(list(mapping.keys())) == len(list(mapping.items()))


# ---- TRL --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB_SIZE)}, unk_token="w5"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def arguments(config_class, folder, accumulation=1, **fields):
    return config_class(
        str(folder), per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=1, max_grad_norm=0.0, learning_rate=0.0, report_to=[], disable_tqdm=True, save_strategy="no",
        use_cpu=True, bf16=False, **fields,
    )  # fmt: skip


def sft_gradient(trainer_class, trl, tokenizer, model, folder, accumulation=1, **fields):
    rows = [
        {"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()} for row in examples(model, "ragged")
    ]
    trainer = trainer_class(
        model, args=arguments(trl.SFTConfig, folder, accumulation, **fields),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[RouterGradient()],
    )  # fmt: skip
    trainer.train()
    return next(call for call in trainer.callback_handler.callbacks if isinstance(call, RouterGradient)).gradient


def trainer_gradient(model, folder, coefficient, accumulation=1):
    model = copy.deepcopy(model)
    model.config.router_aux_loss_coef = coefficient
    return router_gradient(model, examples(model, "ragged"), 8 // accumulation, accumulation, folder)


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_sft_trainer_balances_or_is_refused(coefficient, trl, tokenizer, tmp_path):
    """With None it takes the coefficient of the model's config."""
    model = balanced_model("decoder", "micro_batch")
    expected = trainer_gradient(model, tmp_path, 1.0 if coefficient is None else coefficient)

    def train():
        return sft_gradient(trl.SFTTrainer, trl, tokenizer, model, tmp_path, router_aux_loss_coef=coefficient)

    if hasattr(trl.trainer.utils, "add_fused_lm_head"):
        with pytest.raises(ValueError, match=BODY_REFUSAL):
            train()
    else:  # earlier releases of TRL took the model's own loss
        assert relative_difference(train(), expected) <= 1e-5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_trainer_is_right_without_balance_loss(accumulation, trl, tokenizer, tmp_path, capsys):
    model = balanced_model("decoder", "micro_batch")
    expected = trainer_gradient(model, tmp_path, 0.0, accumulation)
    gradient = sft_gradient(trl.SFTTrainer, trl, tokenizer, model, tmp_path, accumulation, router_aux_loss_coef=0.0)
    difference = relative_difference(gradient, expected)
    with capsys.disabled():
        print(f"\nSFTTrainer, coefficient 0, {accumulation} micro-batches: differs from Trainer by {difference:.1e}")
    assert difference <= 1e-4  # its head computes in tiles


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_trainer_is_right_with_the_loss_of_the_model(accumulation, trl, tokenizer, tmp_path, capsys):
    """What the refusal advises."""

    class ModelLossSFTTrainer(trl.SFTTrainer):
        compute_loss = hf.Trainer.compute_loss

    model = balanced_model("decoder", "global_batch")
    expected = trainer_gradient(model, tmp_path, 0.5, accumulation)
    gradient = sft_gradient(
        ModelLossSFTTrainer, trl, tokenizer, model, tmp_path, accumulation, router_aux_loss_coef=0.5
    )
    difference = relative_difference(gradient, expected)
    with capsys.disabled():
        print(
            f"\nSFTTrainer, loss of the model, {accumulation} micro-batches: differs from Trainer by {difference:.1e}"
        )
    assert difference <= 1e-5


def dpo_train(trl, tokenizer, model, folder, **fields):
    rows = [{"prompt": f"w{5 + row} w6", "chosen": f" w7 w{8 + row} w9", "rejected": " w9 w8"} for row in range(8)]
    trainer = trl.DPOTrainer(
        model, copy.deepcopy(model), args=arguments(trl.DPOConfig, folder, **fields),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[callback := RouterGradient()],
    )  # fmt: skip
    trainer.train()
    return SimpleNamespace(gradient=callback.gradient, log=trainer.state.log_history)


def test_dpo_trainer_is_refused_with_balance_loss_and_runs_without(trl, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=BODY_REFUSAL):
        dpo_train(trl, tokenizer, balanced_model("decoder", "micro_batch"), tmp_path)
    model = without_dropout(tiny_sparse("decoder", router_aux_loss_coef=0.0))
    assert dpo_train(trl, tokenizer, model, tmp_path).gradient.norm() > 0
