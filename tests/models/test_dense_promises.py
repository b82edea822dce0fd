"""What a dense model's forward and config promise, the mixture made of it keeps."""

import copy
import dataclasses
import inspect
import logging
from typing import get_type_hints

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from transformers.cache_utils import Cache

from hf_sparse_moe import SparseMoeDecoderConfig, upcycle
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from tiny_models import (
    ARCHITECTURES,
    BACKBONES,
    FAMILIES,
    VOCAB_SIZE,
    tiny_config,
    tiny_dense,
    tiny_inputs,
    tiny_sparse,
    without_dropout,
)


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]


def parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


# ---- the signature ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_names_what_the_dense_model_takes(name):
    model = tiny_sparse(name)
    assert parameters_of(model).keys() >= parameters_of(model.dense).keys()
    assert parameters_of(copy.deepcopy(model)).keys() == parameters_of(model).keys()
    assert "labels" in inspect.signature(type(model).forward).parameters  # where Trainer looks for labels


def test_further_inputs_may_be_given_by_place():
    model = tiny_sparse("bert")
    inputs = tiny_inputs(model, labels=False)
    types = torch.ones_like(inputs["input_ids"])
    by_place = model(inputs["input_ids"], inputs["attention_mask"], types)
    assert torch.equal(by_place.logits, model(**inputs, token_type_ids=types).logits)


def typed_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Inputs with the token types that GPT-2 takes: ids of its vocabulary."""
    inputs = tiny_inputs(model)
    types = torch.full_like(inputs["input_ids"], VOCAB_SIZE - 1)
    return inputs | {"token_type_ids": types}


def test_trainer_keeps_the_columns_of_the_dense_model(tmp_path):
    model = tiny_sparse("gpt2")
    inputs = typed_inputs(model)
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(len(inputs["input_ids"]))]
    arguments = hf.TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=len(rows))
    loss = hf.Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    without = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    assert loss == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    assert loss != pytest.approx(model(**without).loss.item(), rel=1e-3)


def test_generate_takes_the_inputs_of_the_dense_model():
    dense = tiny_dense("gpt2")
    inputs = typed_inputs(dense)
    del inputs["labels"]
    asked = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(upcycle(dense, 4).generate(**inputs, **asked), dense.generate(**inputs, **asked))


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [(name, auto) for name, autos in zip(ONE_A_FAMILY, AUTO_CLASSES.values(), strict=True) for auto in autos],
)
def test_the_return_annotation_is_the_dataclass_of_the_outputs(name, auto_class):
    """As sentence-transformers reads it, to learn which outputs a model has."""
    if name == "t5" and auto_class is hf.AutoModelForQuestionAnswering:
        name = "bart"
    model = tiny_sparse(name, auto_class)
    for annotation in (get_type_hints(model.forward)["return"], inspect.signature(model.forward).return_annotation):
        assert model(**tiny_inputs(model)).keys() <= {field.name for field in dataclasses.fields(annotation)}


def test_a_replica_of_data_parallel_runs_itself():
    model = tiny_sparse("llama")
    replica = model._replicate_for_data_parallel()
    assert replica.forward.__self__ is replica
    assert model.forward.__self__ is model


# ---- the loss ---------------------------------------------------------------------------------------------------


def zeros_as_labels(model: nn.Module) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["labels"].clamp(min=0)
    inputs["labels"][:, 2] = 0
    return inputs


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "modernbert"])
def test_further_arguments_reach_the_loss(name):
    """Those families whose dense model hands them on; the others of transformers drop them."""
    dense = tiny_dense(name)
    inputs = zeros_as_labels(dense)
    wanted = dense(**inputs, ignore_index=0).loss
    assert upcycle(dense, 4)(**inputs, ignore_index=0).loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert dense(**inputs).loss.item() != pytest.approx(wanted.item(), rel=1e-3)


HEADS_OF_LLAMA = [
    hf.AutoModelForCausalLM,
    hf.AutoModelForSequenceClassification,
    hf.AutoModelForTokenClassification,
    hf.AutoModelForQuestionAnswering,
]


@pytest.mark.parametrize("auto_class", HEADS_OF_LLAMA)
def test_a_loss_of_the_user_s_own_is_called_as_the_dense_model_calls_it(auto_class):
    def squares(*logits, **given):
        logits = logits or (given.get("pooled_logits", given.get("logits")),)
        return sum(each.square().mean() for each in logits[:2] if each.is_floating_point())

    dense = tiny_dense("llama", auto_class)
    mixture = upcycle(dense, 4, router_aux_loss_coef=0.5)
    for model in (dense, mixture):
        model.loss_function = squares
    inputs = tiny_inputs(dense)
    wanted = dense(**inputs).loss.item()
    assert mixture(**inputs).loss.item() == pytest.approx(wanted, rel=1e-4)
    outputs = without_dropout(mixture).train()(**inputs)
    assert outputs.task_loss.item() == pytest.approx(wanted, rel=1e-4)
    assert (outputs.loss - outputs.task_loss).item() == pytest.approx(0.5 * outputs.aux_loss.item(), rel=1e-3)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_loss_of_the_user_s_own_counts_in_every_family(name):
    model = tiny_sparse(name)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + vocab_size
    assert model(**tiny_inputs(model)).loss == VOCAB_SIZE


# ---- other tools ------------------------------------------------------------------------------------------------


def test_two_mixtures_make_an_encoder_decoder():
    decoder = hf.GPT2LMHeadModel(ARCHITECTURES["gpt2"].config(add_cross_attention=True, is_decoder=True))
    encoder = tiny_sparse("bert", hf.AutoModel)
    model = hf.EncoderDecoderModel(encoder=encoder, decoder=upcycle(decoder, num_experts=4)).eval()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    ids = torch.randint(5, VOCAB_SIZE, (2, 6))
    assert torch.isfinite(model(input_ids=ids, decoder_input_ids=ids).logits).all()
    model.set_attn_implementation("eager")  # the composite has put a config of its own in the place of each part's
    outputs = model(input_ids=ids, decoder_input_ids=ids, output_attentions=True)
    assert [len(outputs[f"{part}_attentions"]) for part in ("encoder", "decoder", "cross")] == [2, 2, 2]
    model.encoder.set_experts_implementation("eager")
    assert {block.experts.config._experts_implementation for block in encoder.sparse_blocks} == {"eager"}


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_peft_learns_a_prompt(name, kind):
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    model = peft.get_peft_model(tiny_sparse(name).train(), kind(task_type=task, num_virtual_tokens=3))
    model(**tiny_inputs(model.base_model)).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prompt_encoder.parameters())


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_hidden_states_and_inputs_have_gradients(name, labels):
    """Of the model's own loss, and of one that somebody computes from its logits."""
    model = tiny_sparse(name).train()
    model.enable_input_require_grads()
    inputs = tiny_inputs(model)
    if not labels:
        given = inputs.pop("labels")
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(given)
    outputs = model(**inputs, output_hidden_states=True)
    states = outputs.decoder_hidden_states if model.config.is_encoder_decoder else outputs.hidden_states
    for state in states:
        state.retain_grad()
    (outputs.loss if labels else outputs.logits.square().mean()).backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in states)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_numbers_of_the_model_are_those_of_a_stock_one(name):
    dense, model = tiny_dense(name).bfloat16(), tiny_sparse(name, scoring_func="sigmoid").bfloat16()
    assert model.dtype == dense.dtype == torch.bfloat16
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == sum(p.nbytes for p in model.parameters()) + buffers
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    embeddings = [one.num_parameters() - one.num_parameters(exclude_embeddings=True) for one in (dense, model)]
    assert embeddings[0] == embeddings[1] > 0


def test_arguments_of_the_dense_class_are_its_own(tmp_path):
    """As the cards of many embedding models load them."""
    dense = tiny_dense("bert", hf.AutoModel)
    upcycle(dense, 4).save_pretrained(tmp_path)
    model = hf.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    outputs, inputs = model(**tiny_inputs(dense)), tiny_inputs(dense)
    assert model.dense.pooler is None
    assert outputs.pooler_output is None
    torch.testing.assert_close(outputs[0], dense(**inputs)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="no_such_argument"):
        hf.AutoModel.from_pretrained(tmp_path, no_such_argument=False)


# ---- the config -------------------------------------------------------------------------------------------------

SETTINGS = [
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"output_hidden_states": True, "output_attentions": True},
    {"use_cache": False},
]


def assert_same_outputs(model: nn.Module, dense: nn.Module) -> None:
    inputs = tiny_inputs(dense, labels=False)
    with torch.no_grad():
        expected, outputs = dense(**inputs), model(**inputs)
    assert outputs.keys() == expected.keys()
    for name, wanted in expected.items():
        if not isinstance(wanted, Cache):
            torch.testing.assert_close(outputs[name], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_setting_of_the_config_does_what_it_does_to_the_dense_model(name, settings, tmp_path):
    dense = tiny_dense(name, attn_implementation="eager")
    if not all(hasattr(dense.config, field) for field in settings):
        pytest.skip("the dense model knows no such setting")
    dense.save_pretrained(tmp_path / "dense")
    upcycle(dense, num_experts=4).save_pretrained(tmp_path / "sparse")
    folders = {type(dense): tmp_path / "dense", type(tiny_sparse(name)): tmp_path / "sparse"}
    eager = {"attn_implementation": "eager"}
    model, dense = (one.from_pretrained(folder, **eager, **settings) for one, folder in reversed(folders.items()))
    assert_same_outputs(model, dense)
    model, dense = (one.from_pretrained(folder, **eager) for one, folder in reversed(folders.items()))
    for one in (model, dense):
        for field, value in settings.items():
            setattr(one.config, field, value)
    assert_same_outputs(model, dense)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gemma2", "final_logit_softcapping", 0.01),
        ("t5", "scale_decoder_outputs", False),
    ],
)
def test_a_field_that_the_dense_forward_reads_may_be_set_at_any_time(name, field, value):
    dense = tiny_dense(name)
    model = upcycle(dense, num_experts=4)
    before = model(**tiny_inputs(dense)).logits.detach()
    for one in (model, dense):
        assert hasattr(one.config, field)
        setattr(one.config, field, value)
    assert_same_outputs(model, dense)
    assert (model(**tiny_inputs(dense)).logits - before).abs().max() > 0.01  # it has an effect


@pytest.mark.parametrize("name", BACKBONES)
def test_a_config_asks_for_tuples(name):
    """Most dense models fail where theirs does."""
    model = tiny_sparse(name)
    inputs = tiny_inputs(model)
    expected = model(**inputs)
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[1], expected.logits)
    assert torch.equal(model(**inputs, return_dict=True).logits, expected.logits)
    dense = ARCHITECTURES[name].config(return_dict=False)
    assert not type(model.config)(dense_config=dense).return_dict


def test_a_setting_of_the_dense_config_is_the_mixture_s():
    dense = ARCHITECTURES["llama"].config(output_hidden_states=True, problem_type="regression", num_labels=3)
    for config in (SparseMoeDecoderConfig(dense_config=dense), SparseMoeDecoderConfig.from_dense(dense)):
        assert (config.output_hidden_states, config.problem_type, config.num_labels) == (True, "regression", 3)
    config = SparseMoeDecoderConfig(dense_config=dense, num_labels=5)
    assert config.num_labels == config.dense_config.num_labels == 5


def test_private_fields_of_the_dense_config_are_read_and_written_through():
    config = SparseMoeDecoderConfig(dense_config=ARCHITECTURES["opt"].config(_remove_final_layer_norm=True))
    assert config._remove_final_layer_norm
    config._remove_final_layer_norm = False
    assert not config.dense_config._remove_final_layer_norm
    with pytest.raises(AttributeError, match="_no_such_field"):
        _ = config._no_such_field


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sizes_are_in_the_dict_and_in_the_file_once(name):
    config = tiny_config(name)
    as_dict, in_file = config.to_dict(), config.to_diff_dict()
    assert as_dict.get("hidden_size") == getattr(config, "hidden_size", None)
    assert "hidden_size" not in in_file
    as_dict["dense_config"]["vocab_size"] = 7
    assert type(config).from_dict(as_dict).vocab_size == 7


def test_trainer_gathers_no_memories_of_the_dense_model():
    config = SparseMoeDecoderConfig(dense_config={"model_type": "xlnet"})
    assert {"mems", "router_logits", "aux_loss"} <= set(config.keys_to_ignore_at_inference)
    assert "past_key_values" in tiny_config("llama").keys_to_ignore_at_inference


# ---- layers that are run in parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"router_type": "expert_choice"}, {"capacity_factor": 1.0}], ids=str)
def test_sparse_layers_are_not_chunked(fields, caplog):
    library = logging.getLogger("hf_sparse_moe")
    library.propagate, before = True, library.propagate
    hf.utils.logging.get_logger("hf_sparse_moe").warning_once.cache_clear()
    results = []
    for size in (0, 2):
        model = without_dropout(tiny_sparse("bert", dense_fields={"chunk_size_feed_forward": size}, **fields)).train()
        outputs = model(**tiny_inputs(model, length=8), output_router_logits=True)
        outputs.loss.backward()
        gradient = torch.cat([block.gate.weight.grad.flatten() for block in model.sparse_blocks])
        results.append((outputs.loss, outputs.aux_loss, gradient, *outputs.router_logits))
    library.propagate = before
    assert len(results[0]) == len(results[1])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert [record.message for record in caplog.records if "chunk_size_feed_forward=2" in record.message]
