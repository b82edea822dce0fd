"""The card says what the checkpoint says, and nothing that others wrote can break out of its place."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BertConfig, LlamaConfig, T5Config, TrainerState

from hf_sparse_moe import (
    SparseMoeDecoderForCausalLM,
    SparseMoeDecoderForTokenClassification,
    SparseMoeEncoderConfig,
    SparseMoeEncoderDecoderForConditionalGeneration,
    SparseMoeEncoderForMaskedLM,
)
from hf_sparse_moe.hub import render_model_card


SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
EVIL = "\\| x\n---\nlicense: mit\n# Heading <script>alert(1)</script> `code` | cell {{ 7 * 7 }} [a](b)\u202eback"


def make(**fields) -> SparseMoeEncoderForMaskedLM:
    config = SparseMoeEncoderConfig.from_dense(BertConfig(intermediate_size=32, **SHAPE), **fields)
    return SparseMoeEncoderForMaskedLM(config)


def rows(card: str) -> dict[str, str]:
    """The cells of the card's two-column tables."""
    lines = [line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and line.endswith(" |")]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_numbers_are_those_of_the_model():
    model = make(num_experts=8, num_experts_per_tok=3, mlp_layer_types=["sparse", "dense", "sparse"])
    facts = rows(render_model_card(model, "tester/card"))
    idle = sum(p.numel() * 5 // 8 for block in model.sparse_blocks for p in block.experts.parameters(recurse=False))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert facts["Parameters, total"] == f"{total:,}"
    assert facts["Parameters, active for a token"].startswith(f"{total - idle:,} (")
    assert facts["FLOPs for a token"].startswith(f"{model.config.flops_per_token():,} (")
    assert facts["Experts of a sparse layer"] == "8 routed, 0 shared"
    assert facts["Routed experts for a token (top-k)"] == "3"
    assert facts["Sparse layers (encoder)"] == "2 of 3: 0, 2 (counted from 0)"
    assert facts["Dense architecture"] == "`bert`"
    assert facts["Precision of the weights"] == "float32"
    assert rows(render_model_card(model.bfloat16(), "tester/card"))["Precision of the weights"] == "bfloat16"


def test_what_is_unknown_says_so():
    card = render_model_card(make(), "tester/card")
    facts = rows(card)
    for name in ("Dense source", "Revision of the source", "SHA-256 of the source", "Licence"):
        assert facts[name] == "not recorded"
    assert "## Evaluation\n\nNot recorded." in card
    assert "Not recorded: the checkpoint carries no receipt" in card
    data = front_matter(card)
    assert not {"license", "base_model", "base_model_relation"} & set(data)
    assert data["tags"] == ["moe", "sparse-moe", "encoder"]


def test_the_receipt_is_shown_in_full():
    model = make()
    source = {"name_or_path": "a/b", "revision": "86b5e09", "sha256": {"model.safetensors": "c0ffee"}}
    arguments = {"method": "copy", "seed": 7, "layers": [1, 2]}
    model.receipt = {"source": source, "arguments": arguments, "equality": {"max_abs_difference": 1.25e-7}}
    facts = rows(render_model_card(model, "tester/card"))
    assert facts["Dense source"] == "`a/b`"
    assert facts["Revision of the source"] == "`86b5e09`"
    assert facts["SHA-256 of the source's `model.safetensors`"] == "`c0ffee`"
    assert facts["arguments.method"] == "copy"
    assert facts["arguments.seed"] == "7"
    assert facts["arguments.layers"] == "\\[1, 2\\]"
    assert facts["equality.max\\_abs\\_difference"] == "1.25e-07"


@pytest.mark.parametrize("receipt", [[], "text", {"source": "text"}, {"source": {"name_or_path": 3, "sha256": []}}])
def test_a_receipt_of_another_shape_does_no_harm(receipt):
    model = make()
    model.receipt = receipt
    assert "base_model" not in front_matter(render_model_card(model, "tester/card"))


def test_metadata_is_what_the_hub_understands():
    model = make()
    model.receipt = {"source": {"name_or_path": "google-bert/bert-base-uncased", "revision": "86b5e09"}}
    data = front_matter(render_model_card(model, "tester/card", license="apache-2.0", tags=["demo", "moe"]))
    assert data == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "base_model": "google-bert/bert-base-uncased",
        "base_model_relation": "finetune",
        "pipeline_tag": "fill-mask",
        "tags": ["moe", "sparse-moe", "encoder", "upcycled", "demo"],
    }


@pytest.mark.parametrize("source", ["/home/someone/secret/bert", "some folder", "../bert"])
def test_a_local_source_is_no_base_model_and_its_folder_stays_private(source):
    model = make()
    model.receipt = {"source": {"name_or_path": source, "revision": "86b5e09"}, "arguments": {"from": source}}
    card = render_model_card(model, "tester/card")
    assert "base_model" not in front_matter(card)
    assert "someone" not in card


LLAMA = LlamaConfig(intermediate_size=32, **SHAPE)
T5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2)


@pytest.mark.parametrize(
    ("model_class", "dense", "auto_class", "task"),
    [
        (SparseMoeDecoderForCausalLM, LLAMA, "AutoModelForCausalLM", "text-generation"),
        (SparseMoeDecoderForTokenClassification, LLAMA, "AutoModelForTokenClassification", "token-classification"),
        (SparseMoeEncoderDecoderForConditionalGeneration, T5, "AutoModelForSeq2SeqLM", None),
    ],
)
def test_each_class_names_its_auto_class_and_task(model_class, dense, auto_class, task):
    config = model_class.config_class.from_dense(dense)
    card = render_model_card(model_class(config), "tester/card")
    assert f'{auto_class}.from_pretrained("tester/card")' in card
    assert front_matter(card).get("pipeline_tag") == task
    sides = [name for name in rows(card) if name.startswith("Sparse layers")]
    assert len(sides) == (2 if config.is_encoder_decoder else 1)


def test_evaluation_of_a_dict_or_of_a_trainer_state():
    model = make()
    assert rows(render_model_card(model, "tester/card", evaluation={"accuracy": 0.8125}))["accuracy"] == "0.8125"
    logs = [{"eval_loss": 3.0, "step": 5}, {"loss": 2.0, "step": 6}]
    logs.append({"eval_loss": 1.25, "eval_runtime": 9.0, "eval_samples_per_second": 4.0, "epoch": 2.0, "step": 10})
    facts = rows(render_model_card(model, "tester/card", evaluation=TrainerState(log_history=logs)))
    assert (facts["eval\\_loss"], facts["step"]) == ("1.25", "10")
    assert not any("runtime" in name or "second" in name for name in facts)
    with pytest.raises(ValueError, match="`evaluation` is a list"):
        render_model_card(model, "tester/card", evaluation=[1.0])


@pytest.mark.parametrize(
    "where", ["receipt", "receipt_key", "source", "evaluation", "evaluation_key", "license", "tags"]
)
def test_text_of_others_stays_in_its_place(where):
    model = make()
    source = {"name_or_path": EVIL, "revision": EVIL, "sha256": {"model.safetensors": EVIL}}
    model.receipt = {"receipt": {"method": EVIL}, "receipt_key": {EVIL: 1}, "source": {"source": source}}.get(where)
    evaluation = {"evaluation": {"score": EVIL}, "evaluation_key": {EVIL: 1.0}}.get(where)
    license = EVIL if where == "license" else None
    tags = [EVIL] if where == "tags" else None
    card = render_model_card(model, "tester/card", evaluation=evaluation, license=license, tags=tags)
    plain = render_model_card(make(), "tester/card")
    parsed = ModelCard(card)
    assert parsed.data.license == (EVIL if where == "license" else None)
    assert "<script>" not in parsed.text
    assert "\u202e" not in parsed.text
    assert ("{{ 7" in parsed.text) == (where != "tags")  # shown, not evaluated; tags stand in the metadata only
    headings = [line for line in parsed.text.splitlines() if line.startswith("#")]
    assert headings == [line for line in ModelCard(plain).text.splitlines() if line.startswith("#")]
    for line in parsed.text.splitlines():
        if line.startswith("| "):
            assert len(re.sub(r"\\.", "", line).split("|")) == 4


def test_the_model_and_the_name_are_checked():
    with pytest.raises(ValueError, match="Repo id"):
        render_model_card(make(), 'x"); import os; ("')
    with pytest.raises(ValueError, match="`model` is a Linear"):
        render_model_card(torch.nn.Linear(1, 1), "tester/card")
