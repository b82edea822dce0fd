"""What a forward pass returns: fields, shapes, order, and that pads count for nothing."""

import pytest
import torch
import transformers as hf

import hf_sparse_moe
from hf_sparse_moe.models.balancing import load_balancing_loss
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from tiny_models import BACKBONES, FAMILIES, tiny_dense, tiny_inputs, tiny_sparse, without_dropout


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]
EVERY_HEAD = [
    (name, auto_class)
    for name, classes in zip(["bert", "llama", "bart"], AUTO_CLASSES.values(), strict=True)
    for auto_class in classes
]


@pytest.mark.parametrize(("name", "auto_class"), EVERY_HEAD)
def test_every_head_returns_routing_when_asked(name, auto_class):
    model = tiny_sparse(name, auto_class)
    inputs = tiny_inputs(model)
    outputs = model(**inputs, output_router_logits=True)
    assert isinstance(outputs, model.output_class)
    assert len(outputs.router_logits) == len(model.sparse_blocks)
    assert all(logits.shape[1] == 4 and logits.dtype == torch.float32 for logits in outputs.router_logits)
    assert 1.0 <= outputs.aux_loss.item() < 4.0
    plain = model(**inputs)
    assert plain.router_logits is None
    assert plain.aux_loss is None
    assert ("loss" in plain) == (auto_class is not hf.AutoModel)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_layers_come_before_decoder_layers(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, labels=False, batch=2, length=9)
    router_logits = model(**inputs, output_router_logits=True).router_logits
    assert [len(logits) for logits in router_logits] == [2 * 9] * 2 + [2 * 7] * 2
    generated = model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert generated.shape[0] == 2


@pytest.mark.parametrize("name", BACKBONES)
def test_router_logits_are_what_the_gates_say_in_order(name):
    model = tiny_sparse(name)
    seen = []
    for block in model.sparse_blocks:
        block.gate.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    outputs = model(**tiny_inputs(model, labels=False), output_router_logits=True)
    assert len(seen) == len(outputs.router_logits) == 2 * (1 + model.config.is_encoder_decoder)
    for gate_output, router_logits in zip(seen, outputs.router_logits, strict=True):
        torch.testing.assert_close(gate_output[0], router_logits, rtol=0, atol=0)
    losses = [load_balancing_loss(routing.router_logits.softmax(-1), routing.top_k_index) for routing in seen]
    torch.testing.assert_close(outputs.aux_loss, torch.stack(losses).mean())


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_config_turns_routing_on_and_the_argument_overrules_it(name):
    model = tiny_sparse(name, output_router_logits=True)
    inputs = tiny_inputs(model)
    assert model(**inputs).router_logits is not None
    assert model(**inputs, output_router_logits=False).router_logits is None


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_aux_loss_is_there_in_training_while_a_coefficient_is_above_zero(name):
    model = tiny_sparse(name).train()
    inputs = tiny_inputs(model)
    outputs = model(**inputs)
    assert outputs.aux_loss.requires_grad
    assert outputs.router_logits is None
    model.config.router_aux_loss_coef = 0.0
    assert model(**inputs).aux_loss is None


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_evaluation_loss_is_the_task_loss_alone(name):
    model = tiny_sparse(name, router_aux_loss_coef=100.0)
    inputs = tiny_inputs(model)
    pure = model(**inputs)
    asked = model(**inputs, output_router_logits=True)
    assert asked.loss == pure.loss
    assert asked.aux_loss is not None


@pytest.mark.parametrize("name", BACKBONES)
def test_tuple_outputs_hold_the_same_values(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model)
    expected = model(**inputs, output_router_logits=True)
    outputs = model(**inputs, output_router_logits=True, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], expected.loss)
    torch.testing.assert_close(outputs[1], expected.logits)
    assert len(outputs) == len(expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_hidden_states_and_attentions_pass_through(name):
    dense = tiny_dense(name, attn_implementation="eager")
    sparse = hf_sparse_moe.upcycle(dense, num_experts=4)
    sparse.set_attn_implementation("eager")
    inputs = tiny_inputs(dense, labels=False)
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected, outputs = dense(**inputs, **asked), sparse(**inputs, **asked)
    names = [key for key in expected if key.endswith(("hidden_states", "attentions"))]
    assert len(names) >= 2
    for key in names:
        assert len(outputs[key]) == len(expected[key])
        for state, wanted in zip(outputs[key], expected[key], strict=True):
            torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKBONES)
def test_pads_change_neither_the_aux_loss_nor_the_real_tokens(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, labels=False, batch=1)
    pad = model.config.pad_token_id
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 5), value=pad),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=0),
    }
    if model.config.is_encoder_decoder:
        decoder_ids = inputs["decoder_input_ids"]
        decoder_ids[:, -1] = model.config.eos_token_id  # a last token with nothing to predict counts in neither
        padded["decoder_input_ids"] = torch.nn.functional.pad(decoder_ids, (0, 3), value=pad)
        real = decoder_ids.shape[1]
    else:
        real = inputs["input_ids"].shape[1]
    expected = model(**inputs, output_router_logits=True)
    outputs = model(**padded, output_router_logits=True)
    torch.testing.assert_close(outputs.logits[:, :real], expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-6)


def padded(inputs, model, pads, side):
    """`inputs` with pads on one side; a decoder that reads an encoder has its own on the right."""

    def pad(name, value, fill):
        left = side == "left" and not (name == "labels" and model.config.is_encoder_decoder)
        return torch.nn.functional.pad(value, (pads, 0) if left else (0, pads), value=fill)

    fills = {"input_ids": model.config.pad_token_id, "attention_mask": 0, "labels": -100, "position_ids": 0}
    return {name: pad(name, value, fills[name]) for name, value in inputs.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_pads_change_neither_the_losses_nor_the_router_gradient(name, scope, side):
    model = tiny_sparse(name, router_aux_loss_coef=0.5, router_z_loss_coef=0.25, balance_scope=scope)
    without_dropout(model).train()
    inputs = tiny_inputs(model)
    if name == "bert":  # which counts positions from the first pad
        inputs["position_ids"] = torch.arange(7).expand(2, 7)
    if name == "llama":  # a pad must not predict the first token
        inputs["labels"][:, 0] = -100
    results = []
    for given in (inputs, padded(inputs, model, pads=5, side=side)):
        outputs = model(**given)
        outputs.loss.backward()
        gradient = torch.cat([block.gate.weight.grad.flatten() for block in model.sparse_blocks])
        results.append((outputs.task_loss, outputs.aux_loss, outputs.z_loss, gradient))
        model.zero_grad()
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_embeddings_in_the_place_of_ids_give_the_same(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, labels=False)
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision_runs_and_keeps_the_router_in_float32(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model)
    expected = model(**inputs, output_router_logits=True)
    outputs = model.bfloat16()(**inputs, output_router_logits=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
    assert torch.isfinite(outputs.loss)
    assert abs(outputs.loss.item() - expected.loss.item()) < 0.1 * expected.loss.item() + 0.3
