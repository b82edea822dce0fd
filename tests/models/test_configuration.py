"""What a config accepts, refuses, defaults to, and keeps."""

import copy
import logging
import pickle

import pytest
import torch
import transformers as hf
from huggingface_hub.errors import StrictDataclassFieldValidationError

import hf_sparse_moe
from hf_sparse_moe.models.size import meta_model
from tiny_models import (
    ARCHITECTURES,
    CONFIG_CLASSES,
    LANGUAGE_MODELS,
    tiny_config,
    tiny_dense,
    tiny_inputs,
    tiny_sparse,
)


FAMILIES = list(CONFIG_CLASSES)

# A value for one field, and what the message must say beside the field's name and the value.
WRONG_VALUES = [
    ({"num_experts": 0}, "at least 1"),
    ({"num_experts_per_tok": 0}, "between 1 and `num_experts=8`"),
    ({"num_experts_per_tok": 9}, "between 1 and `num_experts=8`"),
    ({"moe_intermediate_size": 0}, "None or at least 1"),
    ({"num_shared_experts": -1}, "at least 0"),
    ({"scoring_func": "tanh"}, r"one of \('softmax', 'sigmoid', 'cosine'\)"),
    ({"routed_scaling_factor": 0.0}, "above 0"),
    ({"routed_scaling_factor": float("inf")}, "finite"),
    ({"router_jitter_noise": 1.0}, "below 1"),
    ({"router_jitter_noise": -0.1}, "at least 0"),
    ({"router_aux_loss_coef": -1.0}, "at least 0"),
    ({"router_aux_loss_coef": float("nan")}, "at least 0"),
    ({"router_z_loss_coef": -1.0}, "at least 0"),
    ({"expert_dropout": 1.0}, "below 1"),
    ({"dense_config": "bert-base-uncased"}, "a config"),
]
WRONG_TYPES = [{"num_experts": "8"}, {"num_experts": True}, {"norm_topk_prob": "yes"}, {"scoring_func": None}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("fields", "allowed"), WRONG_VALUES, ids=str)
def test_wrong_value_names_field_value_and_what_is_allowed(family, fields, allowed):
    ((field, value),) = fields.items()
    with pytest.raises(ValueError, match=f"`{field}={value!r}` is not allowed: .*{allowed}"):
        CONFIG_CLASSES[family](**fields)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", WRONG_TYPES, ids=str)
def test_wrong_type_is_refused_as_transformers_does(family, fields):
    ((field, value),) = fields.items()
    with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){field}.*expected.*{value}"):
        CONFIG_CLASSES[family](**fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_a_token_keeps_its_probability_as_its_weight(family, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    hf.utils.logging.warning_once.cache_clear()
    make = CONFIG_CLASSES[family]
    assert make().norm_topk_prob is True
    assert make(num_experts_per_tok=1).norm_topk_prob is False
    assert make(num_experts_per_tok=1, num_experts=1).norm_topk_prob is True  # there is nothing to choose
    assert make(num_experts_per_tok=1, router_type="hash").norm_topk_prob is True
    assert not caplog.records
    # What older versions wrote has `true`, and computes what it computed, with a warning.
    old = tiny_sparse(family, num_experts_per_tok=1, norm_topk_prob=True, router_aux_loss_coef=0.0)
    old.save_pretrained(tmp_path)
    caplog.clear()
    hf.utils.logging.warning_once.cache_clear()
    loaded = LANGUAGE_MODELS[family].from_pretrained(tmp_path)
    (message,) = {record.getMessage() for record in caplog.records if "num_experts_per_tok" in record.getMessage()}
    assert "never trains the router" in message
    inputs = tiny_inputs(old)
    torch.testing.assert_close(loaded(**inputs).logits, old(**inputs).logits, rtol=0, atol=1e-5)
    for norm_topk_prob, learns in ((True, False), (False, True)):
        model = tiny_sparse(family, num_experts_per_tok=1, norm_topk_prob=norm_topk_prob, router_aux_loss_coef=0.0)
        model(**inputs).loss.backward()
        assert all((block.gate.weight.grad.norm() > 1e-4) == learns for block in model.sparse_blocks)


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("encoder", "mlp_layer_types"),
        ("decoder", "mlp_layer_types"),
        ("encoder_decoder", "encoder_mlp_layer_types"),
        ("encoder_decoder", "decoder_mlp_layer_types"),
    ],
)
def test_layer_lists_are_checked_and_obeyed(family, field):
    with pytest.raises(ValueError, match=f"`{field}` has 3 entries, but .* has 2 feed-forwards"):
        tiny_sparse(family, **{field: ["sparse"] * 3})
    with pytest.raises(ValueError, match=f"`{field}=.*'dense', 'sparse'"):
        tiny_config(family, **{field: ["sparse", "moe"]})
    every = len(tiny_sparse(family).sparse_blocks)
    model = tiny_sparse(family, **{field: ["dense", "sparse"]})
    assert len(model.sparse_blocks) == every - 1
    assert tiny_sparse(family, **{field: ["sparse", "dense"]}).sparse_blocks[0].side in ("encoder", "decoder")


def test_sides_of_an_encoder_decoder_have_their_own_layers():
    encoder, decoder = {"num_layers": 3}, ["dense", "sparse"]
    with pytest.raises(ValueError, match="`decoder_mlp_layer_types` has 2 entries"):
        tiny_sparse("t5", dense_fields=encoder | {"num_decoder_layers": 4}, decoder_mlp_layer_types=decoder)
    model = tiny_sparse(
        "t5",
        dense_fields=encoder | {"num_decoder_layers": 2},
        encoder_mlp_layer_types=["dense", "sparse", "sparse"],
        decoder_mlp_layer_types=decoder,
    )
    assert [block.side for block in model.sparse_blocks] == ["encoder", "encoder", "decoder"]


@pytest.mark.parametrize("family", FAMILIES)
def test_values_assigned_later_are_checked_when_a_model_is_built(family):
    config = tiny_config(family)
    config.num_experts_per_tok = 5
    with pytest.raises(ValueError, match="`num_experts_per_tok=5` is not allowed"):
        LANGUAGE_MODELS[family].from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_dense_refuses_what_cannot_become_a_mixture(family):
    config_class = CONFIG_CLASSES[family]
    with pytest.raises(ValueError, match="`num_exprts` is no field of"):
        config_class.from_dense(ARCHITECTURES["llama"].config(), num_exprts=4)
    with pytest.raises(ValueError, match="mixture already"):
        config_class.from_dense(tiny_config(family))
    with pytest.raises(ValueError, match=r"head; transformers has none for `model_type='vit'`"):
        config_class.from_dense(hf.ViTConfig())
    with pytest.raises(ValueError, match=r"`model_type='nope'`, which the installed transformers does not know"):
        config_class(dense_config={"model_type": "nope"})


@pytest.mark.parametrize(
    "dense",
    [
        hf.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1),
        hf.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1),
    ],
    ids=lambda config: config.model_type,
)
def test_an_architecture_without_feed_forward_is_refused(dense):
    with pytest.raises(ValueError, match=r"no feed-forward of a known layout. Known are gate_up_down, .*Mamba, RWKV"):
        hf_sparse_moe.SparseMoeDecoderConfig.from_dense(dense)


def test_a_stock_mixture_is_refused():
    stock = hf.MixtralConfig(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="is a mixture of experts already"):
        hf_sparse_moe.SparseMoeDecoderConfig.from_dense(stock)


@pytest.mark.parametrize(
    ("family", "model_type", "hidden_size"),
    [("encoder", "modernbert", 768), ("decoder", "qwen3", 1024), ("encoder_decoder", "t5", 768)],
)
def test_a_default_config_gives_a_sensible_model(family, model_type, hidden_size):
    config = CONFIG_CLASSES[family](num_experts=8)
    assert (config.dense_config.model_type, config.hidden_size) == (model_type, hidden_size)
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    model = meta_model(config)
    assert {type(block.experts).__name__ for block in model.sparse_blocks} == {"SparseMoeGatedExperts"}
    assert config.num_parameters(only_active=True) < config.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_and_writes_through_to_the_dense_config(family):
    config = tiny_config(family)
    dense = config.dense_config
    assert (config.vocab_size, config.pad_token_id, config.hidden_size) == (96, dense.pad_token_id, 32)
    config.vocab_size = 80
    config.pad_token_id = 4
    assert (dense.vocab_size, dense.pad_token_id) == (80, 4)
    dense.vocab_size = 72
    assert config.vocab_size == 72
    config.num_local_experts = 8
    assert config.num_experts == 8
    config.a_field_of_mine = 1
    assert not hasattr(dense, "a_field_of_mine")
    config.output_hidden_states = True  # which both have
    assert dense.output_hidden_states
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = config.no_such_field


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_config_is_the_mixture_s_own(family):
    config = tiny_config(family, router_aux_loss_coef=0.5)
    assert config.get_text_config() is config  # what TRL reads
    assert config.get_text_config().router_aux_loss_coef == 0.5
    assert not config.get_text_config().output_router_logits


def test_the_dense_config_that_was_passed_is_left_alone():
    dense = ARCHITECTURES["bert"].config()
    before = dense.to_dict()
    config = hf_sparse_moe.SparseMoeEncoderConfig.from_dense(dense, num_labels=5)
    config.vocab_size = 50
    hf.AutoModelForSequenceClassification.from_config(config)
    assert dense.to_dict() == before
    direct = hf_sparse_moe.SparseMoeEncoderConfig(dense_config=dense, num_labels=5)
    direct.vocab_size = 60
    hf.AutoModelForSequenceClassification.from_config(direct)
    assert dense.to_dict() == before
    model = tiny_dense("bert")
    before = model.config.to_dict()
    hf_sparse_moe.upcycle(model, num_experts=2)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_and_problem_type_come_from_the_dense_config(family):
    name = {"encoder": "bert", "decoder": "llama", "encoder_decoder": "bart"}[family]
    dense = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "problem_type": "multi_label_classification"}
    config = tiny_config(name, dense_fields=dense)
    assert config.id2label == dense["id2label"]
    model = hf.AutoModelForSequenceClassification.from_config(config)
    assert model.config.problem_type == "multi_label_classification"
    assert any(p.shape == (3, 32) for name, p in model.named_parameters() if "experts" not in name)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda config: pickle.loads(pickle.dumps(config)),
    "dict": lambda config: type(config).from_dict(config.to_dict()),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_save_and_load_keeps_every_field(name, tmp_path):
    config = tiny_config(name, num_experts=3, router_aux_loss_coef=0.25, num_shared_experts=1)
    config.save_pretrained(tmp_path)
    loaded = hf.AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert type(loaded.dense_config) is type(config.dense_config)
    assert fields_of(loaded) == fields_of(config)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_equal_and_independent(family, how):
    config = tiny_config(family, num_experts=3, scoring_func="sigmoid")
    copied = COPIES[how](config)
    assert type(copied) is type(config)
    assert fields_of(copied) == fields_of(config)
    copied.vocab_size = 7
    assert config.vocab_size == 96


def fields_of(config: hf.PreTrainedConfig) -> dict:
    transient = ("_name_or_path", "transformers_version")
    fields = {name: value for name, value in config.to_dict().items() if name not in transient}
    if "dense_config" in fields:
        fields["dense_config"] = {key: value for key, value in fields["dense_config"].items() if key not in transient}
    return fields


@pytest.mark.parametrize("family", FAMILIES)
def test_from_dense_reads_a_folder(family, tmp_path):
    dense = ARCHITECTURES[tiny_config(family).dense_config.model_type].config()
    dense.save_pretrained(tmp_path)
    config = CONFIG_CLASSES[family].from_dense(str(tmp_path), num_experts=4, num_experts_per_tok=2)
    assert fields_of(config) == fields_of(tiny_config(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_of_the_config_is_that_of_the_model(family):
    config = tiny_config(family, dtype="bfloat16")
    assert config.dtype == torch.bfloat16
    model = LANGUAGE_MODELS[family].from_config(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
