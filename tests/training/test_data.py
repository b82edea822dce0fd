"""Every kind of file gives the same rows, and packing and metrics count what they should."""

import copy
import gzip
import math
import re
import shutil

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, RobertaConfig

from training_runs import TRAINING


ROWS = [
    {"text": 'He said "no", twice', "label": index, "pair": {"en": f"one {index}", "de": "eins"}} for index in range(4)
]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    return __import__("recipe")


def write(kind, path):
    flat = Dataset.from_list([{"text": row["text"], "label": row["label"]} for row in ROWS])
    if kind == "csv":
        flat.to_csv(path)
    elif kind == "tsv":
        flat.to_csv(path, sep="\t")
    elif kind == "parquet":
        flat.to_parquet(path)
    elif kind == "txt":
        path.write_text("".join(row["text"] + "\n" for row in ROWS))
    else:
        flat.to_json(path, lines=kind == "jsonl")


@pytest.mark.parametrize(
    ("kind", "compressed"),
    [(kind, zipped) for kind in ("txt", "csv", "tsv", "json", "jsonl") for zipped in (False, True)]
    + [("parquet", False)],
)
def test_every_kind_of_file_gives_the_same_rows(kind, compressed, recipe, tmp_path):
    path = tmp_path / f"rows.{kind}"
    write(kind, path)
    if compressed:
        with path.open("rb") as plain, gzip.open(tmp_path / f"rows.{kind}.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        path.unlink()
        path = tmp_path / f"rows.{kind}.gz"
    data = recipe.load_data(recipe.DataArguments(train_file=[str(path)], validation_percentage=25))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 3, "validation": 1}
    rows = [row for split in data.values() for row in split]
    assert {row["text"] for row in rows} == {ROWS[0]["text"]}
    if kind != "txt":
        assert sorted(row["label"] for row in rows) == [0, 1, 2, 3]


def test_a_tsv_without_header_and_quoting(recipe, tmp_path):
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text('"open quote\t1\nplain\t0\n')
    arguments = recipe.DataArguments(
        train_file=str(tmp_path / "*.tsv"), column_names=["text", "label"], no_quotes=True, validation_percentage=0
    )
    data = recipe.load_data(arguments)
    assert data["train"]["text"] == ['"open quote', "plain"] * 2
    assert "validation" not in data


@pytest.mark.parametrize(
    ("splits", "arguments", "validation"),
    [
        (("train", "validation"), {}, ["hf://datasets/user/law"]),
        (
            ("train", "validation"),
            {"max_eval_samples": 1},
            ["hf://datasets/user/law, split validation", "of these the first 1 rows"],
        ),
        (("train", "test"), {}, ["hf://datasets/user/law, 25% held out of the training data"]),
        (("train", "validation"), {"dataset_name": "folder/law"}, ["law"]),
    ],
)
def test_the_card_names_a_data_set(splits, arguments, validation, recipe, tmp_path, monkeypatch):
    """A whole split as `.eval_results/` takes it, a part of one in words, and a folder by its name."""
    data = DatasetDict({split: Dataset.from_list(ROWS) for split in splits})
    monkeypatch.setattr(recipe.data, "load_dataset", lambda name, config: data)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "law").mkdir(parents=True)
    args = recipe.DataArguments(**{"dataset_name": "user/law", "validation_percentage": 25, **arguments})
    recipe.load_data(args)
    assert recipe.data.data_names(args) == ([validation[0].partition(",")[0]], validation)


def test_a_split_that_is_not_there_is_named(recipe, monkeypatch):
    monkeypatch.setattr(recipe.data, "load_dataset", lambda name, config: DatasetDict(train=Dataset.from_list(ROWS)))
    for argument in ("train_split", "validation_split"):
        with pytest.raises(ValueError, match=rf"`--{argument}=dev` is none of \['train'\]"):
            recipe.load_data(recipe.DataArguments(dataset_name="user/law", **{argument: "dev"}))


def test_nested_columns(recipe):
    data = DatasetDict(train=Dataset.from_list(ROWS))
    recipe.require_columns(data, source_column="pair.en")
    assert recipe.column(data["train"], "pair.en")[1] == "one 1"
    with pytest.raises(ValueError, match=r"`--source_column=pair\.fr` is no column"):
        recipe.require_columns(data, source_column="pair.fr")


def test_the_longest_sequence_is_what_the_model_takes(recipe, tokenizer):
    """Of 66 positions RoBERTa leaves the first two to the padding; a tokenizer may know no limit."""
    config = RobertaConfig(max_position_embeddings=66, pad_token_id=1, hidden_size=8, num_attention_heads=1)
    endless = copy.deepcopy(tokenizer)
    endless.model_max_length = 10**30
    given = [recipe.DataArguments(train_file="x.jsonl", max_length=length) for length in (None, 64, 65)]
    assert [recipe.sequence_length(args, endless, config) for args in given[:2]] == [64, 64]
    with pytest.raises(ValueError, match="`--max_length=65` is more than the 64 tokens"):
        recipe.sequence_length(given[2], endless, config)


def test_packing_keeps_the_text(recipe, tokenizer, texts):
    data = DatasetDict(train=Dataset.from_dict({"text": texts[:40]}))
    arguments = recipe.TextArguments(train_file=["x.jsonl"])
    packed, groups = recipe.pack(data, arguments, tokenizer, 16, lines=False)
    blocks = packed["train"]["input_ids"]
    assert groups is None
    assert {len(block) for block in blocks} == {16}
    stream = tokenizer.decode([token for block in blocks for token in block])
    assert "</s>".join(texts[:40]).startswith(stream)
    # Lines of a running text: the line breaks are there, and no special tokens.
    blocks = recipe.pack(data, arguments, tokenizer, 16, lines=True)[0]["train"]["input_ids"]
    assert "\n".join(texts[:40]).startswith(tokenizer.decode([token for block in blocks for token in block]))


def test_blocks_and_perplexity_by_group(recipe, tokenizer, texts):
    kinds = ["even" if place % 2 == 0 else "odd" for place in range(40)]
    data = DatasetDict(validation=Dataset.from_dict({"text": texts[:40], "kind": kinds}))
    arguments = recipe.TextArguments(validation_file=["x.jsonl"], group_by="kind")
    packed, groups = recipe.pack(data, arguments, tokenizer, 16, lines=False)
    assert packed["validation"].column_names == ["input_ids"]
    for kind, first in (("even", 0), ("odd", 1)):
        own = [block for block, group in zip(packed["validation"]["input_ids"], groups, strict=True) if group == kind]
        assert "</s>".join(texts[first:40:2]).startswith(tokenizer.decode([token for block in own for token in block]))
    losses = torch.arange(1.0, len(groups) + 1)
    rows = torch.stack([losses, torch.full_like(losses, 4)], dim=1).numpy()
    scores = recipe.perplexity(EvalPrediction(predictions=rows, label_ids=rows), groups)
    even = [loss for loss, group in zip(losses.tolist(), groups, strict=True) if group == "even"]
    assert scores["perplexity_even"] == pytest.approx(math.exp(sum(even) / len(even) / 4), rel=1e-5)
    assert set(scores) == {"perplexity", "perplexity_even", "perplexity_odd"}


def test_perplexity_is_that_of_the_labelled_tokens(recipe):
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, 3, 4, 5], [6, 0, -100, -100, -100]])
    rows = recipe.token_losses((logits, "hidden states"), labels, shift=True)
    assert rows[:, 1].tolist() == [4, 1]
    losses = torch.nn.functional.cross_entropy(
        torch.cat([logits[0, :4], logits[1, :1]]), torch.cat([labels[0, 1:], labels[1, 1:2]])
    )
    score = recipe.perplexity(EvalPrediction(predictions=rows.numpy(), label_ids=labels.numpy()))
    assert score["perplexity"] == pytest.approx(math.exp(losses), rel=1e-5)


@pytest.mark.parametrize("path", sorted((TRAINING / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_read(path, call_recipe, tmp_path, monkeypatch, capsys):
    """By Accelerate, or by the recipe that its first lines name, which then misses only the data."""
    monkeypatch.chdir(tmp_path)
    recipe = re.search(r"^# .*python training/(run_\w+\.py) training/configs/", path.read_text(), re.MULTILINE)
    if recipe is None:
        assert load_config_from_file(str(path)).num_processes >= 1
        return
    with pytest.raises(SystemExit):
        call_recipe(recipe[1], str(path), "--train_file", "nowhere.jsonl")
    assert "`--train_file=nowhere.jsonl` matches no file" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(TRAINING.glob("run_*.py")), ids=lambda path: path.stem)
def test_help(script, call_recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        call_recipe(script.name, "--help")
    assert stop.value.code == 0
    assert "--train_file" in capsys.readouterr().out
