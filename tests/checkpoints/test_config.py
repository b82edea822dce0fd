"""Configs that anyone may have written."""

import json

import pytest
import torch
from transformers import AutoModel, CamembertConfig, Data2VecTextConfig, EncoderDecoderConfig, LlamaConfig, MPNetConfig

import hf_sparse_moe
from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.checkpoints.config import read_config, sensible_config, usable_positions
from hf_sparse_moe.checkpoints.source import find_source
from tiny_models import ARCHITECTURES, tiny_dense, tiny_sparse


@pytest.fixture
def folder(tmp_path):
    tiny_sparse("llama").save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


COMMANDS = ("info", "card", "export", "consolidate", "plan", "upcycle", "import-stock", "quickstart", "verify")


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"dense_config": {"model_type": "llama", "num_hidden_layers": 10**7}},
        {"num_labels": 10**6},
        {"num_experts": 10**7},
        {"norm_topk_prob": 1.0},
        {"auto_map": 4},
        {"auto_map": {"AutoConfig": 4}},
        {"num_local_experts": 4.0},
        {"num_local_experts": "4"},
        {"num_experts": 4.0},
        {"architectures": "x"},
        {"architectures": [4]},
        {"model_type": ["x"]},
        {"attn_implementation": "user/kernel"},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["info", "card"])
def test_one_sentence(fields, command, folder):
    change(folder, **fields)
    assert_one_sentence(run_cli(command, folder))


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 1025), ("num_local_experts", 5000), ("hidden_size", 10**9), ("vocab_size", float("inf"))],
)
def test_sizes_within_reason(name, value, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    assert read_config(tmp_path).model_type == "llama"
    change(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}={value}`, which must be at most"):
        read_config(tmp_path)


def test_foreign_code_is_never_run_and_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = tmp_path / "ran"
    tiny_dense("llama").save_pretrained(tmp_path / "clone")
    code = "from transformers import LlamaConfig\nclass Evil(LlamaConfig):\n    model_type = 'evil'\n"
    (tmp_path / "clone" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n{code}")
    change(tmp_path / "clone", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    for command in COMMANDS:
        output = [tmp_path / "out"] if command in ("export", "consolidate", "upcycle", "import-stock") else []
        further = {"verify": ["--against", tmp_path / "clone"], "quickstart": ["--output", tmp_path / "out"]}
        given = ["--model", tmp_path / "clone"] if command == "quickstart" else [tmp_path / "clone"]
        finished = run_cli(command, *given, *output, *further.get(command, []))
        assert (finished.code, finished.err.count("\n")) == (2, 1), finished
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="trust_remote_code"):
        hf_sparse_moe.SparseMoeDecoderConfig.from_dense(str(tmp_path / "clone"))
    assert not ran.exists()


def test_a_checkpoint_with_an_adapter_in_it_leads_nowhere_else(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "clone")
    (tmp_path / "clone" / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere"}')
    with pytest.raises(ValueError, match="a model and an adapter"):
        find_source(tmp_path / "clone")


def test_out_of_memory_is_reported_as_that():
    with pytest.raises(MemoryError, match="`x` does not fit in the free memory"), sensible_config("x"):
        torch.empty(2**62, dtype=torch.uint8)
    with pytest.raises(ValueError, match="does not describe a model"), sensible_config("x"):
        torch.empty(2, 3) @ torch.empty(2, 3)


def test_a_field_by_its_other_name_is_checked_as_by_its_own():
    for value in (4.0, "4"):
        with pytest.raises(Exception, match="num_experts"):
            hf_sparse_moe.SparseMoeDecoderConfig(num_local_experts=value)
    config = hf_sparse_moe.SparseMoeDecoderConfig(num_local_experts=4)
    assert (config.num_experts, config.num_local_experts) == (4, 4)


RELATIVES = {"camembert": CamembertConfig, "mpnet": MPNetConfig, "data2vec": Data2VecTextConfig}


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm_roberta", *RELATIVES, "gpt2", "opt", "bart"])
def test_a_model_takes_as_many_tokens_as_it_has_usable_positions(name):
    config = RELATIVES[name](**ARCHITECTURES["roberta"].fields) if name in RELATIVES else ARCHITECTURES[name].config()
    model = AutoModel.from_config(config).eval()
    most = usable_positions(config)
    model(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))


def test_usable_positions_of_other_configs():
    assert usable_positions(tiny_sparse("roberta").config) == 62
    assert usable_positions(ARCHITECTURES["t5"].config()) is None
    sides = [ARCHITECTURES[name].config() for name in ("bert", "roberta")]
    assert usable_positions(EncoderDecoderConfig.from_encoder_decoder_configs(*sides)) == 62
