"""Where somebody else computes the loss, what leaves the model carries the balance loss, once and with its weight."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hf_sparse_moe.models.optimizer_steps import OptimizerStepCallback
from models.balance_worker import (
    OUTSIDE_LOSSES,
    SPLITS,
    Case,
    balanced_model,
    case_gradient,
    collate,
    examples,
    relative_difference,
    router_gradient,
    step_trainer,
)
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse, without_dropout


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
    gates = [block.gate.weight for block in model.sparse_blocks]
    gradient = torch.cat([(torch.zeros_like(gate) if gate.grad is None else gate.grad).flatten() for gate in gates])
    model.zero_grad()
    return gradient


def without_labels(model, inputs):
    """The inputs of a forward pass whose loss somebody else computes."""
    inputs = dict(inputs)
    labels = inputs.pop("labels", None)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    return inputs


def balance_gradient(model, inputs):
    """Of the balance losses alone, of a forward pass on `inputs`."""
    config, outputs = model.config, model(**inputs)
    loss = config.router_aux_loss_coef * outputs.aux_loss
    (loss if outputs.z_loss is None else loss + config.router_z_loss_coef * outputs.z_loss).backward()
    return gate_gradient(model)


def task_gradient(model, loss_of):
    """Of a loss from outside, without balance loss."""
    config = model.config
    coefficients = config.router_aux_loss_coef, config.router_z_loss_coef
    config.router_aux_loss_coef = config.router_z_loss_coef = 0.0
    loss_of(model).backward()
    config.router_aux_loss_coef, config.router_z_loss_coef = coefficients
    return gate_gradient(model)


# ---- carried ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_from_the_logits_trains_the_router_as_the_models_own_does(family, checkpointing):
    model = training_model(family, checkpointing, router_z_loss_coef=0.25)
    inputs = tiny_inputs(model, pads=2)
    outputs = model(**inputs)
    (own_loss(model, inputs, outputs) + 0.5 * outputs.aux_loss + 0.25 * outputs.z_loss).backward()
    expected = gate_gradient(model)
    own_loss(model, inputs).backward()  # the model is given the labels
    torch.testing.assert_close(gate_gradient(model), expected)

    def loss_of(model):
        return own_loss(model, inputs, model(**without_labels(model, inputs)))

    expected = balance_gradient(model, without_labels(model, inputs)) + task_gradient(model, loss_of)
    loss_of(model).backward()
    torch.testing.assert_close(gate_gradient(model), expected)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_s_own_loss_carries_it_once(family, scope):
    model = training_model(family, balance_scope=scope, router_z_loss_coef=0.25)
    inputs = tiny_inputs(model, pads=2)
    model(**inputs).loss.backward()
    expected = gate_gradient(model)
    outputs = model(**inputs)
    (outputs.task_loss + 0.5 * outputs.aux_loss + 0.25 * outputs.z_loss).backward()
    torch.testing.assert_close(gate_gradient(model), expected)
    model(**inputs).task_loss.backward()
    torch.testing.assert_close(gate_gradient(model), expected)


def run_body(model, inputs):
    return model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state


PLACES = {
    "body": run_body,
    "body, a tuple": lambda model, inputs: model.base_model(**inputs, return_dict=False)[0],
    "head": lambda model, inputs: model.dense(**inputs).logits,
    "the last hidden state": lambda model, inputs: model(**inputs, output_hidden_states=True).hidden_states[-1],
    "a tuple": lambda model, inputs: model(**inputs, return_dict=False)[0],
    "changed in place": lambda model, inputs: model(**inputs).logits.mul_(0.5),
}
OUTPUTS = {
    "encoder": {
        "logits": lambda outputs: outputs.logits,
        "hidden_states": lambda outputs: outputs.hidden_states[-1],
        "both": lambda outputs: torch.cat([outputs.logits, outputs.hidden_states[-1]], dim=-1),
    },
    "decoder": {
        "logits": lambda outputs: outputs.logits,
        "hidden_states": lambda outputs: outputs.hidden_states[-1],
    },
    "encoder_decoder": {
        "logits": lambda outputs: outputs.logits,
        "decoder_hidden_states": lambda outputs: outputs.decoder_hidden_states[-1],
        "encoder_hidden_states": lambda outputs: outputs.encoder_hidden_states[-1],
        "encoder_last_hidden_state": lambda outputs: outputs.encoder_last_hidden_state,
    },
}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("family", "output"), [(family, output) for family in OUTPUTS for output in OUTPUTS[family]])
def test_every_output_carries_it_once_whether_labels_are_given_or_not(family, output, labelled):
    model = training_model(family, router_z_loss_coef=0.25)
    given = tiny_inputs(model, pads=2)
    if family == "encoder_decoder":
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(given["labels"])
    given["output_hidden_states"] = True
    if not labelled:
        del given["labels"]

    def loss_of(model):
        return OUTPUTS[family][output](model(**given)).square().mean()

    expected = balance_gradient(model, given) + task_gradient(model, loss_of)
    loss_of(model).backward()
    torch.testing.assert_close(gate_gradient(model), expected)


@pytest.mark.parametrize("output", ["last_hidden_state", "pooler_output"])
def test_so_do_pooled_outputs(output):
    model = without_dropout(tiny_sparse("bert", hf.AutoModel, router_aux_loss_coef=0.5)).train()
    inputs = {name: value for name, value in tiny_inputs(model, pads=2).items() if name != "labels"}
    expected = balance_gradient(model, inputs) + task_gradient(model, lambda model: model(**inputs)[output].mean())
    model(**inputs)[output].mean().backward()
    torch.testing.assert_close(gate_gradient(model), expected)


@pytest.mark.parametrize("place", PLACES)
def test_whatever_leaves_the_model_carries_it(place):
    model = training_model("decoder", router_z_loss_coef=0.25)
    inputs = without_labels(model, tiny_inputs(model, pads=2))
    expected = balance_gradient(model, inputs)

    def loss_of(model):
        return PLACES[place](model, inputs).square().mean()

    expected += task_gradient(model, loss_of)
    loss_of(model).backward()
    torch.testing.assert_close(gate_gradient(model), expected)


def test_the_states_between_stay_on_the_way_of_the_loss():
    model = training_model("decoder")
    outputs = model(**without_labels(model, tiny_inputs(model)), output_hidden_states=True)
    for state in outputs.hidden_states[:-1]:
        state.retain_grad()
    outputs.logits.square().mean().backward()
    assert all(state.grad is not None for state in outputs.hidden_states[:-1])


@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_so_do_a_headless_model_and_the_encoder_of_two_sides(family):
    model = without_dropout(tiny_sparse(family, hf.AutoModel, router_aux_loss_coef=0.5)).train()
    inputs = tiny_inputs(model, pads=2)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    part = model.get_encoder() if family == "encoder_decoder" else model
    part(**inputs).last_hidden_state.square().mean().backward()
    gates = [block.gate.weight.grad for block in model.sparse_blocks if block.side == "encoder"]
    model.config.router_aux_loss_coef, carried = 0.0, torch.stack([gate.clone() for gate in gates])
    model.zero_grad()
    part(**inputs).last_hidden_state.square().mean().backward()
    alone = torch.stack([block.gate.weight.grad for block in model.sparse_blocks if block.side == "encoder"])
    assert (carried - alone).norm() > 0.01 * alone.norm()


def test_the_body_returns_router_logits_without_gradient():
    """TRL computes a balance loss of its own from them; it is logged, and the model's trains."""
    model = training_model("decoder")
    inputs = without_labels(model, tiny_inputs(model))
    outputs = model.base_model(**inputs, output_router_logits=True)
    assert len(outputs.router_logits) == 2
    assert not any(logits.requires_grad for logits in outputs.router_logits)


def test_forward_passes_of_one_loss_share_its_weight():
    model = training_model("decoder")
    inputs = [without_labels(model, tiny_inputs(model, seed=seed)) for seed in range(2)]

    def contrast(model):
        left, right = (run_body(model, one).mean(dim=1) for one in inputs)
        return (left @ right.T).mean()

    expected = task_gradient(model, contrast) + sum(balance_gradient(model, one) for one in inputs) / 2
    for _ in range(2):  # the second backward pass begins anew
        contrast(model).backward()
        torch.testing.assert_close(gate_gradient(model), expected)


def test_they_share_it_by_their_sequences_however_they_go_backward():
    """Rows of one pass count as those of another; a graph that is kept gives the same again."""
    model = training_model("decoder", balance_scope="sequence")
    inputs = without_labels(model, tiny_inputs(model, batch=4))
    parts = [{name: value[part] for name, value in inputs.items()} for part in (slice(1), slice(1, 4))]

    def loss_of(*batches):
        return sum(model(**one).logits.square().sum() for one in batches) / 100

    loss_of(inputs).backward()
    expected = gate_gradient(model)
    loss = loss_of(*parts)
    for keeps in (True, False):
        loss.backward(retain_graph=keeps)
        torch.testing.assert_close(gate_gradient(model), expected)
    apart = [loss_of(one) for one in parts]
    for loss in apart:
        loss.backward()
    torch.testing.assert_close(gate_gradient(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_that_is_not_used_has_no_share(family):
    """Such as one of a metric, with gradients that nobody asks for."""
    model = training_model(family)
    inputs = without_labels(model, tiny_inputs(model))
    model(**inputs).logits.square().mean().backward()
    expected = gate_gradient(model)
    model(**inputs)
    loss = model(**inputs).logits.square().mean()
    model(**inputs).logits.argmax(dim=-1)
    loss.backward()
    torch.testing.assert_close(gate_gradient(model), expected)


def test_a_model_that_was_run_can_be_pickled():
    model = training_model("decoder")
    inputs = without_labels(model, tiny_inputs(model))
    outputs = model(**inputs)
    with torch.no_grad():
        model(**inputs)
    again = pickle.loads(pickle.dumps(model))
    assert again.optimizer_step.settings is again.config
    torch.testing.assert_close(again(**inputs).logits, outputs.logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_run_again_in_backward_carries_it_once(reentrant):
    model = training_model("decoder")
    embeddings = torch.randn(2, 7, 32, requires_grad=True)

    def run(inputs_embeds):
        return model(inputs_embeds=inputs_embeds).logits

    run(embeddings).square().mean().backward()
    expected = gate_gradient(model)
    for _ in range(2):
        checkpoint(run, embeddings, use_reentrant=reentrant).square().mean().backward()
        torch.testing.assert_close(gate_gradient(model), expected)


def test_under_functional_transforms():
    model = training_model("decoder")
    model.set_experts_implementation("eager")
    inputs = without_labels(model, tiny_inputs(model))
    model(**inputs).logits.square().mean().backward()
    expected = gate_gradient(model)

    def loss_of(parameters):
        return torch.func.functional_call(model, parameters, (), inputs).logits.square().mean()

    gradients = torch.func.grad(loss_of)(dict(model.named_parameters()))
    found = torch.cat([gradient.flatten() for name, gradient in gradients.items() if name.endswith("gate.weight")])
    torch.testing.assert_close(found, expected)


def test_a_loop_of_one_s_own_says_how_it_scales_the_loss():
    model = training_model("decoder")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs = without_labels(model, tiny_inputs(model))

    def loss_of(model):
        return model(**inputs).logits.square().mean()

    expected = balance_gradient(model, inputs) + task_gradient(model, loss_of)
    model.start_optimizer_step(micro_batches=4, loss_scale=scaler.get_scale())
    for _ in range(4):
        scaler.scale(loss_of(model) / 4).backward()
    torch.testing.assert_close(gate_gradient(model) / 1024, expected)


def test_a_scale_that_nobody_tells_is_asked_for(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    hf.utils.logging.warning_once.cache_clear()
    model = training_model("decoder")
    inputs = without_labels(model, tiny_inputs(model))
    with torch.autocast("cpu", dtype=torch.float16):
        model(**tiny_inputs(model)).loss.backward()  # scaled with the balance loss in it
        assert "start_optimizer_step" not in caplog.text
        model(**inputs).logits.mean().backward()
    assert "start_optimizer_step" in caplog.text


# ---- not carried ------------------------------------------------------------------------------------------------


def freeze_routers(model):
    for block in model.sparse_blocks:
        block.gate.requires_grad_(False)
    return model


NOTHING_TO_CARRY = {
    "coefficients 0": lambda: training_model("decoder", router_aux_loss_coef=0.0),
    "evaluation": lambda: training_model("decoder").eval(),
    "hash router": lambda: training_model("decoder", router_type="hash"),
}


@pytest.mark.parametrize("name", NOTHING_TO_CARRY)
def test_where_there_is_no_balance_loss_nothing_is_added_to_the_graph(name):
    model = NOTHING_TO_CARRY[name]()
    inputs = without_labels(model, tiny_inputs(model))
    for logits in (model(**inputs).logits, model.base_model(**inputs).last_hidden_state):
        assert "Carried" not in type(logits.grad_fn).__name__
    assert "Carried" in type(training_model("decoder")(**inputs).logits.grad_fn).__name__  # this test can fail


@pytest.mark.parametrize("adapted", [False, True])
def test_a_frozen_router_gets_no_gradient(adapted):
    model = freeze_routers(training_model("decoder"))
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).get_base_model()
    own_loss(model, tiny_inputs(model)).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    assert all(block.gate.weight.grad is None for block in model.sparse_blocks)


def test_forward_passes_without_gradient():
    model = training_model("decoder")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert model(**inputs).aux_loss is not None
        assert model.base_model(inputs["input_ids"]).last_hidden_state.shape == (2, 7, 32)


def test_a_copied_model_follows_its_own_config():
    model = training_model("decoder")
    duplicate = copy.deepcopy(model)
    duplicate.config.router_aux_loss_coef = 0.0
    inputs = tiny_inputs(model)
    assert "Carried" not in type(duplicate.base_model(inputs["input_ids"]).last_hidden_state.grad_fn).__name__
    assert "Carried" in type(model.base_model(inputs["input_ids"]).last_hidden_state.grad_fn).__name__


def test_two_forward_passes_before_one_backward():
    model = training_model("decoder")
    first, second = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    (model(**first).loss + model(**second).loss).backward()
    together = gate_gradient(model)
    model(**first).loss.backward()
    model(**second).loss.backward()
    torch.testing.assert_close(gate_gradient(model), together)


# ---- compiled ---------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "body"])
def test_compiled_without_labels_the_outputs_carry_it(part):
    """There somebody else computes the loss, so the graph is broken behind the model. With labels it stays whole."""
    model = training_model("decoder")
    inputs = without_labels(model, tiny_inputs(model))
    run = (lambda: model(**inputs).logits) if part == "model" else (lambda: run_body(model, inputs))
    run().square().mean().backward()
    expected = gate_gradient(model)
    compiled = torch.compile(run, backend="aot_eager")
    for _ in range(2):
        compiled().square().mean().backward()
        torch.testing.assert_close(gate_gradient(model), expected, rtol=1e-4, atol=1e-6)


# ---- trainers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", OUTSIDE_LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_gradient_is_the_same_for_every_split(family, loss, tmp_path):
    """Two processes: test_global_batch.py."""
    case = Case(family, "sequence", "identical", 1, loss=loss)
    expected, *others = [case_gradient(case, *split, tmp_path) for split in SPLITS]
    assert max(relative_difference(gradient, expected) for gradient in others) <= 1e-5


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path):
    model = balanced_model("decoder", "sequence")
    rows = examples(model, "identical")

    class Norms(hf.TrainerCallback):
        norms = []

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.norms.append(torch.stack([block.gate.weight.grad for block in model.sparse_blocks]).norm())

    arguments = {"label_smoothing_factor": 0.1, "max_steps": 6, "callbacks": [Norms()]}
    step_trainer(model, rows, 1, 3, tmp_path, **arguments).train()  # 3 + 3 + 2 micro-batches, twice
    assert len(Norms.norms) == 6
    torch.testing.assert_close(torch.stack(Norms.norms), Norms.norms[0].expand(6), rtol=1e-5, atol=0)


def test_trainer_tells_the_scale_of_the_loss():
    model = training_model("decoder")
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for told in (
        SimpleNamespace(scaler=scaler),
        SimpleNamespace(scaler=None, optimizer=SimpleNamespace(loss_scale=1024)),
    ):
        OptimizerStepCallback().on_step_begin(
            SimpleNamespace(gradient_accumulation_steps=4), SimpleNamespace(global_step=0), None,
            model=model, optimizer=told, train_dataloader=range(8),
        )  # fmt: skip
        assert model.optimizer_step.weight == 256
    told = SimpleNamespace(scaler=None, optimizer=optimizer)
    OptimizerStepCallback().on_step_begin(
        SimpleNamespace(gradient_accumulation_steps=4), SimpleNamespace(global_step=1), None,
        model=model, optimizer=told, train_dataloader=range(6),
    )  # fmt: skip
    assert model.optimizer_step.weight == 0.5  # two micro-batches are left


def test_a_coefficient_among_the_trainer_s_arguments_counts_and_that_is_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    model = training_model("decoder")
    for given in (None, 0.5, 0.25):
        OptimizerStepCallback().on_train_begin(SimpleNamespace(router_aux_loss_coef=given), None, None, model=model)
    assert model.config.router_aux_loss_coef == 0.25
    assert [record.getMessage().startswith("`router_aux_loss_coef` is 0.25") for record in caplog.records] == [True]


def test_after_training_a_micro_batch_is_a_step_again(tmp_path):
    model = balanced_model("decoder", "sequence")
    step_trainer(model, examples(model, "identical"), 2, 4, tmp_path).train()
    assert model.optimizer_step.weight is None


def smoothed_gradient(model, rows):
    """The routers' gradient of the formula: cross entropy against (1 - 0.1) one-hot + 0.1 / V."""
    batch = collate(rows)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    if model.config_class.model_type == "sparse_moe_decoder":
        logits, labels = logits[:, :-1], labels[:, 1:]
    cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1).backward()
    return gate_gradient(model)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_label_smoothing_is_right(family, coefficient, tmp_path):
    """A causal class must be known to Trainer for one whose labels it shifts."""
    model = without_dropout(tiny_sparse(family, router_aux_loss_coef=coefficient, balance_scope="sequence")).train()
    rows = examples(model, "unequal labels")
    expected = smoothed_gradient(model, rows)
    gradient = router_gradient(model, rows, 4, 2, tmp_path, label_smoothing_factor=0.1)
    assert relative_difference(gradient, expected) <= 1e-5


def test_the_auto_classes_list_the_causal_class_once():
    mapping = hf.AutoModelForCausalLM._model_mapping
    classes = [model_class.__name__ for model_class in mapping.values() if "SparseMoe" in str(model_class)]
    assert classes == ["SparseMoeDecoderForCausalLM"]
    assert len(mapping) == len(list(mapping.keys())) == len(list(mapping.items()))
