"""What `upcycle` keeps of the dense model beside its function: head, dtype, labels, mode, generation settings."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers.distributed.configuration_utils import DistributedConfig

import hf_sparse_moe
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.upcycling import UpcycleReport
from hf_sparse_moe.upcycling.conversion import Conversion
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


ONE_A_WAY = [("llama", {"method": "noise"}), ("gpt2", {"method": "drop"}), ("t5", {"method": "split"})]


@pytest.mark.parametrize(("name", "arguments"), ONE_A_WAY)
def test_memory_disk_and_shards_give_the_same_bits(name, arguments, tmp_path):
    tiny_dense(name).save_pretrained(tmp_path / "dense")
    whole = hf_sparse_moe.upcycle(str(tmp_path / "dense"), 4, seed=2, **arguments)
    report = hf_sparse_moe.upcycle(tmp_path / "dense", 4, seed=2, output=tmp_path / "disk", **arguments)
    assert isinstance(report, UpcycleReport)
    assert report.to_dict() == {
        "path": str(tmp_path / "disk"),
        "class": type(whole).__name__,
        "receipt": read_json(tmp_path / "disk" / "receipt.json"),
    }
    sizes = DistributedConfig()
    sharded = hf_sparse_moe.upcycle(tmp_path / "dense", 4, seed=2, distributed_config=sizes, **arguments)
    assert sharded.receipt == report.receipt
    on_disk = load_file(tmp_path / "disk" / "model.safetensors")
    for key, tensor in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[key], tensor), key
        assert key not in on_disk or torch.equal(on_disk[key], tensor), key
    assert on_disk.keys() == whole.state_dict().keys() - whole.all_tied_weights_keys.keys()


def test_the_names_of_version_0_1_still_work(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    with pytest.warns(FutureWarning, match=r"is now `hf_sparse_moe\.upcycle`"):
        receipt = hf_sparse_moe.stream_upcycle(tmp_path / "dense", tmp_path / "old", 4, 1)
    assert receipt == read_json(tmp_path / "old" / "receipt.json")
    with pytest.warns(FutureWarning, match=r"is now `hf_sparse_moe\.upcycle`"):
        shards = hf_sparse_moe.upcycle_into_shards(tmp_path / "dense", DistributedConfig(), 4, 1)
    assert shards.receipt == receipt


def test_a_model_is_written_too(tmp_path):
    dense = tiny_dense("llama")
    report = hf_sparse_moe.upcycle(dense, 4, output=tmp_path / "out")
    assert report.receipt["equality"]["max_abs_difference"] < 1e-4
    with pytest.raises(ValueError, match="exclude each other"):
        hf_sparse_moe.upcycle(dense, 4, output=tmp_path / "again", distributed_config=DistributedConfig())
    with pytest.raises(ValueError, match="`dtype='int8'` is not allowed"):
        hf_sparse_moe.upcycle(dense, 4, dtype="int8")


def test_the_dense_model_is_left_as_it_is():
    dense = tiny_dense("llama")
    dense.train()
    before = copy.deepcopy(dense)
    sparse = hf_sparse_moe.upcycle(dense, 4, dtype=torch.bfloat16)
    sparse.config.id2label[0] = "changed"
    sparse.config.dense_config.rope_parameters["rope_theta"] = 5.0
    sparse.generation_config.max_new_tokens = 3
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
    assert dense.training
    assert dense.config.to_dict() == before.config.to_dict()
    assert dense.generation_config.to_dict() == before.generation_config.to_dict()
    for (key, tensor), wanted in zip(dense.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(tensor, wanted), key


def test_a_mixture_with_more_modules_is_not_expanded():
    sparse = hf_sparse_moe.upcycle(tiny_dense("llama"), 4)
    sparse.dense.add_module("more", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`dense\.more\.bias`, which has no place"):
        hf_sparse_moe.expand(sparse, 2)


def test_the_process_keeps_its_threads(monkeypatch):
    """While a mixture is made, what other threads compute is not slowed down."""
    counts, make = [], Conversion.make

    def watch(self, *args, **kwargs):
        with ThreadPoolExecutor(1) as other:
            counts.append((torch.get_num_threads(), other.submit(torch.get_num_threads).result()))
        return make(self, *args, **kwargs)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(Conversion, "make", watch)
    try:
        hf_sparse_moe.upcycle(tiny_dense("llama"), 4)
    finally:
        torch.set_num_threads(before)
    assert counts == [(1, 3)] * 2
