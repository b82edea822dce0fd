"""Small real data, tokenizers and dense checkpoints for the recipes, all made on the spot, and ways to run them."""

import argparse
import collections
import gzip
import inspect
import json
import os
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from training_runs import TRAINING, command_line


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def docstrings() -> list[str]:
    """Real text that every Python carries, in an order that does not change."""
    modules = (argparse, collections, gzip, inspect, json, os, subprocess, textwrap)
    members = [member for module in modules for _, member in sorted(vars(module).items())]
    texts = [inspect.getdoc(member) for member in members if inspect.isroutine(member) or inspect.isclass(member)]
    return list(dict.fromkeys(text for text in texts if text and len(text) > 40))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return docstrings()


@pytest.fixture(scope="session")
def tokenizer(texts) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end token, for every family."""
    special = ["<pad>", "</s>", "<mask>"]
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        mask_token="<mask>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def checkpoints(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """A dense checkpoint of each family, and the tokenizer alone."""
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    t5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
    dense = {
        "decoder": AutoModelForCausalLM.from_config(LlamaConfig(**ids, **SIZES, max_position_embeddings=128)),
        "encoder": AutoModelForMaskedLM.from_config(BertConfig(**ids, **SIZES, max_position_embeddings=128)),
        "encoder_decoder": AutoModelForSeq2SeqLM.from_config(T5Config(**ids, **t5)),
    }
    folder = tmp_path_factory.mktemp("dense")
    for name, model in dense.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    return {name: folder / name for name in (*dense, "tokenizer")}


@pytest.fixture(scope="session")
def files(texts, tmp_path_factory) -> dict[str, Path]:
    """The texts as a file of each kind that a recipe needs."""
    folder = tmp_path_factory.mktemp("data")
    # A class for each text, from the text itself, and each text's first line as its summary.
    rows = [
        {"text": text, "first": text.splitlines()[0], "label": "short" if len(text) < 200 else "long"}
        for text in texts
    ]
    words = [{"words": text.split()[:12]} for text in texts]
    for row in words:
        row["tags"] = ["B-NAME" if word[:1].isupper() else "O" for word in row["words"]]
    names = ("docs.jsonl", "docs.jsonl.gz", "docs.txt", "words.jsonl", "squad.jsonl", "multi30k.jsonl")
    paths = {name: folder / name for name in names}
    paths["docs.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with gzip.open(paths["docs.jsonl.gz"], "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    longest = [max(text.split(), key=len) for text in texts]
    asked = [
        {
            "context": text,
            "question": "Which word is longest?",
            "answers": {"text": [word], "answer_start": [text.find(word)]},
        }
        for text, word in zip(texts, longest, strict=True)
    ]
    pairs = [{"translation": {"en": row["first"], "de": row["first"].upper()}} for row in rows]
    for name, lines in (("squad.jsonl", asked), ("multi30k.jsonl", pairs)):
        paths[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    paths["docs.txt"].write_text("\n\n".join(texts), encoding="utf-8")
    paths["words.jsonl"].write_text("".join(json.dumps(row) + "\n" for row in words), encoding="utf-8")
    return paths


@pytest.fixture
def call_recipe(monkeypatch):
    """A recipe in this process, which has imported torch already: `call_recipe("run_clm.py", output_dir=...)`."""

    def call(script: str, *line: str, **arguments) -> None:
        monkeypatch.syspath_prepend(str(TRAINING))
        monkeypatch.setattr(sys, "argv", [script, *(line or command_line(arguments))])
        runpy.run_path(str(TRAINING / script), run_name="__main__")

    return call
