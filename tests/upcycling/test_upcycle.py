"""What `upcycle` keeps of the dense model beside its function: head, dtype, labels, mode, generation settings."""

import json

import pytest
import torch
import transformers as hf

import hf_sparse_moe
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from tiny_models import FAMILIES, tiny_dense, tiny_inputs


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]
HEADS = [
    (name, auto_class)
    for name, classes in zip(["bert", "llama", "bart"], AUTO_CLASSES.values(), strict=True)
    for auto_class in classes
]


@pytest.mark.parametrize(("name", "auto_class"), HEADS)
def test_every_head_is_kept_with_its_function(name, auto_class):
    has_classes = auto_class in (hf.AutoModelForSequenceClassification, hf.AutoModelForTokenClassification)
    dense = tiny_dense(name, auto_class, **({"num_labels": 3} if has_classes else {}))
    sparse = hf_sparse_moe.upcycle(dense, num_experts=4)
    assert type(sparse) is AUTO_CLASSES[type(sparse.config)][auto_class]
    assert sparse.config.num_labels == dense.config.num_labels
    inputs = tiny_inputs(dense, labels=False)
    torch.testing.assert_close(sparse(**inputs)[0], dense(**inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dense_class", "config", "expected"),
    [
        (hf.BertLMHeadModel, hf.BertConfig(is_decoder=True), "SparseMoeDecoderForCausalLM"),
        (hf.BertForMaskedLM, hf.BertConfig(), "SparseMoeEncoderForMaskedLM"),
        (hf.BertForPreTraining, hf.BertConfig(), "SparseMoeEncoderForMaskedLM"),
        (hf.BertModel, hf.BertConfig(), "SparseMoeEncoderModel"),
        (hf.GPT2LMHeadModel, hf.GPT2Config(), "SparseMoeDecoderForCausalLM"),
        (hf.LlamaForSequenceClassification, hf.LlamaConfig(), "SparseMoeDecoderForSequenceClassification"),
        (hf.T5ForConditionalGeneration, hf.T5Config(), "SparseMoeEncoderDecoderForConditionalGeneration"),
        (hf.BartForQuestionAnswering, hf.BartConfig(), "SparseMoeEncoderDecoderForQuestionAnswering"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_class_that_a_dense_class_becomes(dense_class, config, expected):
    assert sparse_class(config, dense_class.__name__).__name__ == expected


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_the_same_seed_gives_the_same_bits(name):
    dense = tiny_dense(name)
    first, second, other = (hf_sparse_moe.upcycle(dense, num_experts=4, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)
    changed = {key for key in first if not torch.equal(first[key], other[key])}
    assert changed == {key for key in first if key.endswith("gate.weight")}


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_routers_start_small_and_differ_from_layer_to_layer(name):
    sparse = hf_sparse_moe.upcycle(tiny_dense(name), num_experts=4)
    weights = [block.gate.weight for block in sparse.sparse_blocks]
    assert all(0.01 < weight.std() < 0.03 for weight in weights)
    assert all(not torch.equal(weights[0], weight) for weight in weights[1:])


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_dtype(name):
    dense = tiny_dense(name).bfloat16()
    assert {p.dtype for p in hf_sparse_moe.upcycle(dense, num_experts=2).parameters()} == {torch.bfloat16}
    wide = hf_sparse_moe.upcycle(dense, num_experts=2, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_config_fields_and_receipt(name, tmp_path):
    dense = tiny_dense(name)
    sparse = hf_sparse_moe.upcycle(dense, 4, 1, router_aux_loss_coef=0.05, norm_topk_prob=True)
    assert (sparse.config.num_experts, sparse.config.num_experts_per_tok) == (4, 1)
    assert sparse.config.router_aux_loss_coef == 0.05
    receipt = sparse.receipt
    assert receipt["source"]["architecture"] == type(dense).__name__
    assert receipt["parameters"]["total"] == sum(parameter.numel() for parameter in sparse.parameters())
    assert receipt["parameters"]["active"] == sparse.config.num_parameters(only_active=True)
    assert receipt["equality"]["max_abs_difference"] <= 1e-5
    sparse.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "receipt.json").read_text()) == receipt
    assert type(sparse).from_pretrained(tmp_path).receipt == receipt


@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
def test_generation_settings_come_along(name):
    dense = tiny_dense(name)
    dense.generation_config.max_new_tokens = 4
    dense.generation_config.temperature = 0.5
    sparse = hf_sparse_moe.upcycle(dense, num_experts=2)
    assert sparse.generation_config.to_dict() == dense.generation_config.to_dict()


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_the_mode_of_the_dense_model_is_left_as_it_was(name):
    dense = tiny_dense(name).train()
    sparse = hf_sparse_moe.upcycle(dense, num_experts=2)
    assert dense.training
    assert not sparse.training


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_it_trains_from_there(name):
    """Copies part ways: after a step the experts of a layer differ."""
    sparse = hf_sparse_moe.upcycle(tiny_dense(name), num_experts=4).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    inputs = tiny_inputs(sparse)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = sparse(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    down = sparse.sparse_blocks[-1].experts.down_proj
    assert (down[0] - down[1]).abs().max() > 0
