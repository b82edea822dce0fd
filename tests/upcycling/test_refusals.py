"""What upcycling cannot keep, or was asked for wrongly, ends in one sentence before anything is written."""

import json
import logging

import pytest
import torch
import transformers as hf

from hf_sparse_moe import expand, upcycle
from tiny_models import tiny_dense, tiny_sparse


def lora(**arguments):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, init_lora_weights=False, **arguments)


def with_adapter(kind):
    from peft import get_peft_model

    dense = tiny_dense("llama")
    if kind == "PeftModel":
        return get_peft_model(dense, lora(target_modules=["q_proj"]))
    if kind == "get_base_model":
        return get_peft_model(dense, lora(target_modules=["q_proj"])).get_base_model()
    if kind == "modules_to_save":
        return get_peft_model(dense, lora(target_modules=["q_proj"], modules_to_save=["lm_head"])).get_base_model()
    dense._hf_peft_config_loaded = False
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(lora(target_modules=["q_proj"]), dense)


@pytest.mark.parametrize("kind", ["PeftModel", "get_base_model", "modules_to_save", "injected"])
def test_an_adapter_that_is_not_merged(kind, tmp_path):
    model = with_adapter(kind)
    for output in (None, tmp_path / "out"):
        with pytest.raises(ValueError, match=r"merge_and_unload"):
            upcycle(model, 4, output=output)
    assert list(tmp_path.iterdir()) == []


def test_a_merged_adapter_is_kept():
    from peft import get_peft_model

    model = get_peft_model(tiny_dense("llama"), lora(target_modules=["q_proj", "up_proj"]))
    assert upcycle(model.merge_and_unload(), 4).receipt["equality"]["max_abs_difference"] < 1e-4


@pytest.mark.parametrize("to_disk", [False, True])
def test_an_exact_method_that_did_not_keep_the_function(to_disk, tmp_path):
    """Something that the mixture cannot know of, here a hook, changes what the dense model computes."""
    dense = tiny_dense("llama")
    dense.model.norm.register_forward_hook(lambda module, args, output: 1.01 * output)
    with pytest.raises(ValueError, match=r"should compute what the dense model computes, but its outputs differ by"):
        upcycle(dense, 4, output=tmp_path / "out" if to_disk else None)
    assert list(tmp_path.iterdir()) == []
    assert upcycle(dense, 4, method="drop").receipt["equality"]["max_abs_difference"] > 0


@pytest.mark.parametrize("key", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(key, tmp_path):
    dense = tiny_dense("llama")
    with torch.no_grad():
        dense.get_parameter(key).view(-1)[3] = float("nan")
    dense.save_pretrained(tmp_path / "dense")
    for source, output in [(dense, None), (tmp_path / "dense", None), (tmp_path / "dense", tmp_path / "out")]:
        with pytest.raises(ValueError, match="of the dense model holds NaN"):
            upcycle(source, 4, output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_outputs_that_are_no_numbers():
    dense = tiny_dense("llama")
    with torch.no_grad():
        dense.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinite outputs"):
        upcycle(dense, 4, method="drop")


def test_quantised_weights(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    for output in (None, tmp_path / "out"):
        with pytest.raises(ValueError, match=r"`dense` is quantised \(torchao\)"):
            upcycle(tmp_path / "dense", 4, output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_quantised_model_and_what_it_dequantises_to(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_dense("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantised = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    )
    with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes\).*dequantize"):
        upcycle(quantised, 4)
    assert upcycle(quantised.dequantize(), 4).receipt["equality"]["max_abs_difference"] < 1e-3


# ---- branches -------------------------------------------------------------------------------------------------------


def branch(**fields):
    """The weights of one model, under a config that computes something else."""
    dense = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**tiny_dense("llama").config.to_dict(), **fields}))
    dense.load_state_dict(tiny_dense("llama").state_dict())
    return dense


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("rope_parameters", {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}),
        ("num_attention_heads", 2),
        ("hidden_act", "relu"),
        ("rms_norm_eps", 0.5),
        ("pad_token_id", 7),
    ],
)
def test_branches_that_compute_something_else(field, value):
    other = branch(**{field: value}, **({"head_dim": 16, "num_key_value_heads": 1} if "heads" in field else {}))
    named = field.replace("num_attention_heads", "(num_attention_heads|num_key_value_heads|head_dim)")
    with pytest.raises(ValueError, match=f"`{named}`: .* in `model 2`.*one config"):
        upcycle(method="branches", sources=[tiny_dense("llama"), other])
    with pytest.raises(ValueError, match=f"`{named}`: "):
        upcycle(other, method="branches", sources=[tiny_dense("llama")] * 2, trunk="base")


def test_branches_with_another_window():
    with pytest.raises(ValueError, match="`sliding_window`: 4 in"):
        upcycle(method="branches", sources=[tiny_dense("mistral", sliding_window=size) for size in (8, 4)])


def test_branches_may_differ_in_what_evaluation_does_not_read(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    others = branch(eos_token_id=5), branch(attention_dropout=0.1, initializer_range=0.5, use_cache=False)
    mixture = upcycle(method="branches", sources=[tiny_dense("llama"), *others])
    assert mixture.config.num_experts == 3
    assert mixture.config.dense_config.eos_token_id == tiny_dense("llama").config.eos_token_id
    (warning,) = [record.getMessage() for record in caplog.records if "eos_token_id" in record.getMessage()]
    assert "5" in warning


@pytest.mark.parametrize("kind", ["vocabulary", "merges", "files"])
def test_branches_with_another_vocabulary(kind, tmp_path):
    for name, words in {"a": ["x", "y"], "b": ["y", "x"]}.items():
        tiny_dense("llama").save_pretrained(tmp_path / name)
        if kind == "files":
            (tmp_path / name / "vocab.txt").write_text("\n".join(words))
            continue
        model = {"vocab": {word: place for place, word in enumerate(words if kind == "vocabulary" else ["x", "y"])}}
        model["merges"] = [words if kind == "merges" else ["x", "y"]]
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    with pytest.raises(ValueError, match=f"`{kind.replace('files', 'vocab.txt')}`: .*in `b`.*one vocabulary"):
        upcycle(method="branches", sources=[tmp_path / "a", tmp_path / "b"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert upcycle(method="branches", sources=[tmp_path / "a", tmp_path / "a"]).config.num_experts == 2


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "drop", "drop_ratio": 2}, "`drop_ratio=2` is not allowed: it must be a number"),
        ({"method": "noise", "noise_std": "0.1"}, "`noise_std='0.1'`"),
        ({"method": "noise", "noise_std": float("nan")}, "`noise_std=nan`"),
        ({"method": "split", "granularity": 2.0}, "`granularity=2.0` is not allowed: it must be a whole number"),
        ({"method": 3}, "`method=3`"),
        ({"seed": "a"}, "`seed='a'` is not allowed: it must be a whole number"),
        ({"seed": True}, "`seed=True`"),
        ({"dtype": "bf16"}, "`dtype='bf16'`"),
        ({"num_experts": "4"}, "`num_experts='4'` is not allowed: it must be a whole number of at least 1"),
        ({"num_experts_per_tok": 2.0}, "`num_experts_per_tok=2.0`"),
        ({"router_aux_loss_coef": "x"}, "router_aux_loss_coef"),
        ({"layers": 3}, "`layers=3`"),
        ({"layers": [0.5]}, r"`layers=\[0.5\]`"),
        ({"layers": {"encodr": "all"}}, "`layers` names the sides"),
        ({"method": "graft", "moe_intermediate_size": 13}, r"Choose one of \[1, 2, 3, 4, 6, 8, 12, 16, 24, 48\]"),
        ({"evaluation": 5}, "`evaluation=5`"),
        ({"evaluation": [object()]}, "`evaluation` has a batch, a object"),
        ({"evaluation": [torch.arange(5)[None] * 1.0]}, "`evaluation` has a batch"),
        ({"evaluation": ["some text"]}, "Texts need `tokenizer`"),
        ({"data": 3, "method": "partition", "partition": "activation"}, "`data=3`"),
        ({"sources": "abc", "method": "branches"}, "`sources` must name at least 2"),
    ],
)
def test_arguments_of_another_kind(arguments, message):
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_dense("llama"), **{"num_experts": 4, **arguments})


@pytest.mark.parametrize(
    "arguments", [{"factor": "2"}, {"factor": 1}, {"factor": 2.0}, {"seed": "a"}, {"router_noise": -1.0}]
)
def test_arguments_of_expand(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}=.* is not allowed"):
        expand(tiny_sparse("decoder"), **{"factor": 2, **arguments})
    with pytest.raises(ValueError, match="no sparse layer was found"):
        expand(tiny_dense("llama"), 2)


# ---- batches --------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer: a word is a number."""

    def __call__(self, texts, return_tensors="pt", padding=True, truncation=True):
        ids = [[int(word) for word in text.split()] for text in texts]
        length = max(map(len, ids))
        padded = [row + [0] * (length - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in ids]
        return hf.BatchEncoding({"input_ids": padded, "attention_mask": mask}, tensor_type=return_tensors)


TEXT = "7 8 9 10 11 12 13 14"
IDS = [int(word) for word in TEXT.split()]


@pytest.mark.parametrize(
    "given",
    [
        [torch.tensor([IDS])],
        torch.tensor([IDS]),
        [TEXT],
        TEXT,
        [[TEXT]],
        hf.BatchEncoding({"input_ids": [IDS], "attention_mask": [[1] * 8]}),
        [{"input_ids": IDS}],
        iter([{"input_ids": torch.tensor([IDS]), "labels": torch.tensor([IDS])}]),
    ],
    ids=["tensors", "tensor", "texts", "text", "lists of texts", "encoding", "dict of lists", "labelled"],
)
def test_every_form_of_batches(given):
    dense = tiny_dense("llama")
    receipt = upcycle(dense, 4, evaluation=given, tokenizer=Words()).receipt
    assert receipt["loss"]["labels"] == 8
    expected = dense(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.item()
    assert receipt["loss"]["dense"] == pytest.approx(expected, rel=1e-5)


def test_padding_is_no_label():
    receipt = upcycle(tiny_dense("llama"), 4, evaluation=[["7 8 9 10", "7 8"]], tokenizer=Words()).receipt
    assert receipt["loss"]["labels"] == 6


def test_data_and_prompts_may_be_texts():
    dense, method = tiny_dense("llama"), {"method": "partition", "partition": "activation"}
    states = [
        upcycle(dense, 4, data=data, tokenizer=Words(), **method).state_dict()
        for data in ([TEXT], [torch.tensor([IDS])])
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    prompts = [[TEXT], ["40 41 42 43"]]
    mixture = upcycle(method="branches", sources=[dense] * 2, prompts=prompts, tokenizer=Words())
    ids = [torch.tensor([[int(word) for word in text.split()]]) for (text,) in prompts]
    same = upcycle(method="branches", sources=[dense] * 2, prompts=[[each] for each in ids])
    assert torch.equal(mixture.sparse_blocks[0].gate.weight, same.sparse_blocks[0].gate.weight)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_pads_of_data_and_prompts_are_not_measured(name):
    dense = tiny_dense(name)
    ids = torch.tensor([IDS])
    padded = torch.cat([ids, torch.full_like(ids, 90)], dim=1)
    padded = {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < len(IDS)).long()[None]}
    method = {"method": "partition", "partition": "activation"}
    states = [upcycle(dense, 4, data=[data], **method).state_dict() for data in (ids, padded)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    prompts = [[[ids], [ids.flip(1)]], [[padded], [ids.flip(1)]]]
    pair = [upcycle(method="branches", sources=[dense] * 2, prompts=each).sparse_blocks for each in prompts]
    for block, same in zip(*pair, strict=True):
        torch.testing.assert_close(block.gate.weight, same.gate.weight)


@pytest.mark.parametrize("auto_class", [hf.AutoModelForSequenceClassification, hf.AutoModel])
def test_other_heads_need_labels(auto_class, monkeypatch):
    dense = tiny_dense("bert", auto_class)
    monkeypatch.setattr("hf_sparse_moe.upcycling.conversion.Conversion.load", lambda *_: pytest.fail("work"))
    with pytest.raises(ValueError, match="a batch without labels"):
        upcycle(dense, 4, evaluation=torch.tensor([IDS]))


def test_question_answering_has_its_own_labels():
    dense = tiny_dense("bert", hf.AutoModelForQuestionAnswering)
    batch = {
        "input_ids": torch.tensor([IDS]),
        "start_positions": torch.tensor([1]),
        "end_positions": torch.tensor([2]),
    }
    loss = upcycle(dense, 4, evaluation=[batch]).receipt["loss"]
    assert loss["labels"] == 1
    assert loss["dense"] == pytest.approx(loss["mixture"], rel=1e-4)


# ---- what the mixture calls itself ----------------------------------------------------------------------------------


def test_weights_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_dense("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"is quantised or sharded \(`model\.layers"):
        upcycle(model, 4)


def with_other_sizes(kind):
    if kind == "one layer narrower":
        model = tiny_dense("llama")
        mlp = model.model.layers[0].mlp
        mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(32, 24, bias=False) for _ in range(2))
        mlp.down_proj = torch.nn.Linear(24, 32, bias=False)
    elif kind == "head":
        model = tiny_dense("bert", hf.AutoModelForSequenceClassification)
        model.classifier = torch.nn.Linear(32, 5)
    else:
        model = tiny_dense("gpt2", tie_word_embeddings=False)
        model.transformer.wte = torch.nn.Embedding(120, 32)
    return model


@pytest.mark.parametrize("kind", ["one layer narrower", "head", "embeddings"])
def test_sizes_that_the_config_does_not_tell(kind):
    with pytest.raises(ValueError, match=r"would have the shape .*whose config tells its sizes"):
        upcycle(with_other_sizes(kind), 4)


@pytest.mark.parametrize("kind", ["meta", "offloaded"])
def test_weights_that_are_elsewhere(kind):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_dense("llama")
    model = model.to("meta") if kind == "meta" else accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"not in memory.*without offloading"):
        upcycle(model, 4)


@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_the_attention_of_the_dense_model_is_kept(name):
    for implementation in ("eager", "sdpa"):
        mixture = upcycle(tiny_dense(name, attn_implementation=implementation), 4)
        assert mixture.config._attn_implementation == mixture.dense.config._attn_implementation == implementation


def test_a_mixture_has_no_name_before_it_is_saved(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    mixture = upcycle(tmp_path / "dense", 4)
    for model in (mixture, expand(mixture, 2)):
        assert (model.config._name_or_path, model.name_or_path) == ("", "")


def test_nothing_is_shared_with_the_model_it_was_made_of():
    dense = tiny_dense("llama")
    mixture = upcycle(dense, 4)
    larger = expand(mixture, 2)
    for here, there in ((mixture, dense), (larger, mixture)):
        here.generation_config.max_new_tokens, there.generation_config.max_new_tokens = 7, 8
        assert here.generation_config.max_new_tokens == 7
        here.config.id2label[0], there.config.id2label[0] = "here", "there"
        assert here.config.id2label[0] == "here"
    mixture.config.num_experts_per_tok = 1
    mixture.config.dense_config.rope_parameters["rope_theta"] = 5.0
    assert larger.config.num_experts_per_tok == 4
    assert dense.config.rope_parameters["rope_theta"] != 5.0
    assert larger.config.dense_config.rope_parameters["rope_theta"] != 5.0
