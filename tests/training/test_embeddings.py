"""run_embeddings.py end to end: what it trains is a sentence-transformers model, and its mixture is watched."""

import itertools
import json
import re
import shutil
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertModel

from hf_sparse_moe import SparseMoeEncoderModel
from training_runs import command_line, history, results, run_recipe


@pytest.fixture(scope="module")
def sentence_encoder(checkpoints, tmp_path_factory):
    """A dense encoder with the first token's state as its embedding, which is not the default."""
    folder = tmp_path_factory.mktemp("sentences") / "dense"
    transformer = Transformer(str(checkpoints["encoder"]))
    SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="cls"), Normalize()]).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def scored(texts, tmp_path_factory):
    """Texts with themselves, their beginning and another one."""
    path = tmp_path_factory.mktemp("scored") / "pairs.jsonl"
    rows = [
        {"one": text, "other": other, "score": score}
        for text, another in itertools.pairwise(texts)
        for other, score in ((text, 5), (text[: len(text) // 2], 3), (another, 0))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def search_run(sentence_encoder, files, tmp_path_factory):
    arguments = {
        "model_name_or_path": sentence_encoder,
        "train_file": files["docs.jsonl"],
        "text_column": "first",
        "second_text_column": "text",
        "validation_percentage": 20,
        "config_overrides": '{"expert_dropout": 0.1}',
        "learning_rate": 3e-3,
        "save_steps": 5,
        "router_learning_rate": 1e-2,
        "weight_decay": 0.01,
        "output_dir": tmp_path_factory.mktemp("runs") / "search",
    }
    run_recipe("run_embeddings.py", *command_line(arguments))
    return arguments


def test_it_is_a_sentence_transformers_model_with_the_pooling_of_its_source(search_run):
    model = SentenceTransformer(str(search_run["output_dir"]), device="cpu")
    assert isinstance(model[0].model, SparseMoeEncoderModel)
    assert model[0].model.receipt["arguments"]["method"] == "copy"
    assert (model[1].pooling_mode, type(model[2])) == ("cls", Normalize)
    assert model.max_seq_length == 32


def test_its_scores_and_its_routing_are_recorded(search_run):
    folder = search_run["output_dir"]
    logs = [log for log in history(folder) if "loss" in log]
    assert logs[1]["loss"] < logs[0]["loss"]
    assert all({"aux_loss", "router/entropy"} <= set(log) for log in logs)
    scores = results(folder)
    assert 0 < scores["eval_cosine_mrr@10"] <= scores["eval_cosine_ndcg@10"] <= 1
    record = json.loads((folder / "training_record.json").read_text())
    assert record["evaluation"]["results"][""]["cosine_mrr@10"] == scores["eval_cosine_mrr@10"]
    card = (folder / "README.md").read_text()
    assert "ndcg@10" in card
    assert "SparseMoeEncoderModel" in card


def test_its_card_says_how_to_use_it(search_run, monkeypatch):
    folder = search_run["output_dir"]
    card = (folder / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert "sentence-transformers" in data.tags
    assert "AutoModel" not in card
    monkeypatch.chdir(folder.parent)
    namespace: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)[1], namespace)
    assert namespace["embeddings"].shape == (2, 32)


def test_the_extra_is_named(call_recipe, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_embeddings.py", "--help")
    assert stop.value.code == 2
    assert "pip install 'hf-sparse-moe[embeddings]'" in capsys.readouterr().err


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(search_run, tmp_path):
    whole, resumed = search_run["output_dir"], tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    output = run_recipe("run_embeddings.py", *command_line({**search_run, "output_dir": resumed}))
    assert "Going on from" in output
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("loss", ["cosent", "cosine"])
def test_similarity(loss, checkpoints, scored, call_recipe, tmp_path):
    """From a plain encoder, which gets mean pooling; the score of an untrained one is far lower."""
    arguments = {"text_column": "one", "second_text_column": "other", "score_column": "score", "max_score": 5.0}
    call_recipe(
        "run_embeddings.py", model_name_or_path=checkpoints["encoder"], train_file=scored, loss=loss, max_steps=20,
        learning_rate=3e-3, save_strategy="no", output_dir=tmp_path, **arguments,
    )  # fmt: skip
    assert results(tmp_path)["eval_spearman_cosine"] > 0.5
    assert SentenceTransformer(str(tmp_path), device="cpu")[1].pooling_mode == "mean"


def test_the_dense_twin(sentence_encoder, scored, call_recipe, tmp_path):
    call_recipe(
        "run_embeddings.py", "--dense", *command_line({
            "model_name_or_path": sentence_encoder, "train_file": scored, "text_column": "one",
            "second_text_column": "other", "score_column": "score", "max_score": 5.0, "max_steps": 2,
            "save_strategy": "no", "freeze": "embeddings", "output_dir": tmp_path,
        }),
    )  # fmt: skip
    trained, source = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path, sentence_encoder))
    assert isinstance(trained[0].model, BertModel)
    assert trained[1].pooling_mode == "cls"
    before, after = source[0].model.state_dict(), trained[0].model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("embeddings.word") for name in changed)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"score_column": "score"}, "has values that are no numbers from 0 to 1. Pass the scores' `--max_score`"),
        ({"loss": "cosent"}, "`--loss=cosent` without `--score_column` must be one of ('multiple_negatives',)"),
        ({"negative_column": "one", "score_column": "score"}, "`--negative_column` belongs to pairs without"),
        ({"score_column": "one", "max_score": 9}, "no numbers from 0 to 9"),
        ({"second_text_column": "score"}, "`score` of the train data has rows without text"),
        ({"model_name_or_path": "encoder_decoder"}, "is an encoder-decoder"),
        ({"model_name_or_path": None, "config_name": "bert", "tokenizer_name": "x"}, "`--config_name` is not for"),
    ],
)
def test_bad_input(changes, sentence, checkpoints, scored, call_recipe, tmp_path, capsys):
    base = {"text_column": "one", "second_text_column": "other", "model_name_or_path": "encoder", **changes}
    base["model_name_or_path"] = checkpoints.get(base["model_name_or_path"])
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_embeddings.py", train_file=scored, output_dir=tmp_path / "out", **base)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
