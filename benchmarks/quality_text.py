"""
The text of benchmarks/quality.py, as rows of token ids: what to learn from, a tuning split to choose learning rates
on, and a test split. No document is in two of them.

A row is one window of `length` tokens, or one sentence pair. Every held-out row knows its document, every document its
domain: for the decoder and the encoder that of the data, for the encoder-decoder the direction of translation.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_sparse_moe.quickstart.small_dense_model import train_tokenizer


GRAM = 13  # words in a row that two texts share by copying alone, as GPT-3's authors counted
COPIED = 0.1  # a document is left out when more of its grams than this are held out, or were trained on
LANGUAGES = ("en", "de", "fr")
IGNORED = -100
SPLITS = ("train", "tuning", "test")

Documents = dict[tuple[str, str], str]  # by domain and name


@dataclass(frozen=True)
class Rows:
    """Model inputs, each of shape (rows, length); `document` (rows,) numbers `documents`, (domain, name) each."""

    inputs: dict[str, torch.Tensor]
    document: torch.Tensor
    documents: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.document)

    def batch(self, rows: torch.Tensor | slice) -> dict[str, torch.Tensor]:
        return {name: tensor[rows] for name, tensor in self.inputs.items()}


@dataclass(frozen=True)
class Text:
    train: Rows
    tuning: Rows
    test: Rows
    vocab_size: int
    facts: dict[str, Any]  # documents, tokens and what was left out


def load_text(family: str, data: Path, settings: dict[str, Any]) -> Text:
    """
    Args:
        family (`str`): `"decoder"`, `"encoder"` or `"encoder-decoder"`.
        data (`Path`): The folder with `domains` and `multi30k`.
        settings (`dict`): `length`; for windows also `machine_characters`, how much of the standard library's source
            is added to the ten domains, `tuning_characters` of each domain, `test_characters` of each document.
    """
    return _translations(data, settings) if family == "encoder-decoder" else _windows(family, data, settings)


def _windows(family: str, data: Path, settings: dict[str, Any]) -> Text:
    if (data / "domains").is_dir():
        train, test = read_domains(data / "domains", "train"), read_domains(data / "domains", "valid")
    else:  # a bare machine has its own text alone: every 20th file is held out
        train = machine_text(settings["machine_characters"], known=())
        test = {key: train.pop(key) for key in sorted(train)[::20]}
    tuning: Documents = {}
    for domain in sorted({domain for domain, _ in train}):
        names = sorted((name for other, name in train if other == domain), key=lambda n: zlib.crc32(n.encode()))
        room = settings["tuning_characters"]
        for name in names[: len(names) // 2]:
            if room > 0:
                tuning[domain, name] = train.pop((domain, name))
                room -= len(tuning[domain, name])
    train |= machine_text(settings["machine_characters"], known=[name for _, name in (*train, *tuning, *test)])
    read = {"train": len(train), "tuning": len(tuning), "test": len(test)}
    train, (tuning, test) = without_copies(train, [tuning, test])
    kept = {"train": len(train), "tuning": len(tuning), "test": len(test)}

    tokenizer = train_tokenizer(train.values())
    order = sorted(train)
    random.Random(0).shuffle(order)
    end, length = tokenizer.eos_token_id, settings["length"]
    tokens: list[int] = []
    for ids in tokenizer([train[name] for name in order])["input_ids"]:
        tokens += [*ids, end]
    ids = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    learn = Rows({"input_ids": ids, "labels": ids.clone()}, torch.zeros(len(ids), dtype=torch.long), [("train", "")])
    held_out = [_held_out_windows(documents, tokenizer, settings) for documents in (tuning, test)]
    vocab_size, splits = len(tokenizer), [learn, *held_out]
    if family == "encoder":
        share = settings["masked"]
        splits = [_masked(rows, vocab_size, share, seed) for seed, rows in enumerate(splits)]
        vocab_size += 1
    facts = {"documents": kept, "documents left out as copies": {name: read[name] - kept[name] for name in read}}
    return Text(*splits, vocab_size, facts | {"training tokens": ids.numel()})


def read_domains(folder: Path, split: str) -> Documents:
    """The documents of a split, each the rows of one `doc`, in their order."""
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted((folder / split).glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for row in map(json.loads, file):
                parts[path.name.split(".")[0], str(row["doc"])].append(row["text"])
    return {key: "\n".join(texts) for key, texts in parts.items()}


def machine_text(characters: int, known: Iterable[str]) -> Documents:
    """Source files of this Python's standard library, tests left out, but for those that `known` names already."""
    library = Path(sysconfig.get_path("stdlib"))
    names = {name.partition("/")[2] for name in known if name.startswith("python")}
    paths = [path.relative_to(library) for path in sorted(library.rglob("*.py"))]
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = [path for path in paths if left_out.isdisjoint(path.parts) and path.as_posix() not in names]
    random.Random(0).shuffle(paths)
    documents: Documents = {}
    for path in paths:
        if characters <= 0:
            break
        text = (library / path).read_text(encoding="utf-8", errors="replace")[:characters]
        documents["machine", path.as_posix()] = text
        characters -= len(text)
    return documents


def without_copies(train: Documents, held_out: list[Documents]) -> tuple[Documents, list[Documents]]:
    """
    Without the training documents that are copies of held-out ones, and without the held-out documents of which the
    rest of the training text holds copies.
    """
    grams = {key: set(_grams(text)) for documents in held_out for key, text in documents.items()}
    of_held_out = set().union(*grams.values())
    kept, seen = {}, set()
    for key, text in train.items():
        of_document = list(_grams(text))
        shared = [gram for gram in of_document if gram in of_held_out]
        if len(shared) <= COPIED * len(of_document):
            kept[key] = text
            seen.update(shared)
    return kept, [
        {key: text for key, text in documents.items() if len(grams[key] & seen) <= COPIED * len(grams[key])}
        for documents in held_out
    ]


def _grams(text: str) -> Iterator[int]:
    words = re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())
    for start in range(len(words) - GRAM + 1):
        yield zlib.crc32(" ".join(words[start : start + GRAM]).encode())


def _held_out_windows(documents: Documents, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> Rows:
    end, length = tokenizer.eos_token_id, settings["length"]
    windows, labels, document = [], [], []
    for number, text in enumerate(documents.values()):
        ids = [end, *tokenizer(text[: settings["test_characters"]])["input_ids"]]
        for start in range(0, len(ids), length):
            part = ids[start : start + length]
            if len(part) > 1:
                windows.append(part + [end] * (length - len(part)))
                labels.append(part + [IGNORED] * (length - len(part)))
                document.append(number)
    inputs = {"input_ids": torch.tensor(windows), "labels": torch.tensor(labels)}
    return Rows(inputs, torch.tensor(document), list(documents))


def _masked(rows: Rows, mask_id: int, share: float, seed: int) -> Rows:
    """A share of the tokens is to be told: 80 % of them masked, 10 % another token, 10 % as they are (BERT)."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = rows.inputs["input_ids"].clone(), rows.inputs["labels"].clone()
    draw = torch.rand(ids.shape, generator=generator)
    labels[draw >= share] = IGNORED
    told = labels != IGNORED
    ids[told & (draw < 0.8 * share)] = mask_id
    other = told & (draw >= 0.8 * share) & (draw < 0.9 * share)
    ids[other] = torch.randint(0, mask_id, (int(other.sum()),), generator=generator)
    return Rows({"input_ids": ids, "labels": labels}, rows.document, rows.documents)


def _translations(data: Path, settings: dict[str, Any]) -> Text:
    def read(split: str) -> list[dict[str, str]]:
        with gzip.open(data / "multi30k" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            return [json.loads(line)["translation"] for line in file]

    captions = {"train": read("train"), "tuning": read("validation"), "test": read("test_2016_flickr")}
    held_out = {caption["en"] for split in ("tuning", "test") for caption in captions[split]}
    captions["train"] = [caption for caption in captions["train"] if caption["en"] not in held_out]
    tokenizer = train_tokenizer(caption[language] for caption in captions["train"] for language in LANGUAGES)
    splits = [_pairs(captions[split], tokenizer, settings["length"]) for split in SPLITS]
    facts = {"documents": {split: len(rows) for split, rows in captions.items()}}
    return Text(
        *splits, len(tokenizer) + len(LANGUAGES), facts | {"training tokens": splits[0].inputs["labels"].numel()}
    )


def _pairs(captions: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, length: int) -> Rows:
    """Each caption in six directions; the source begins with a token of the language to write."""
    end = tokenizer.eos_token_id
    ids = {code: tokenizer([caption[code] for caption in captions])["input_ids"] for code in LANGUAGES}
    sources, targets, documents = [], [], []
    for number in range(len(captions)):
        for source in LANGUAGES:
            for code, target in enumerate(LANGUAGES):
                if source != target:
                    sources.append([len(tokenizer) + code, *ids[source][number][: length - 2], end])
                    targets.append([*ids[target][number][: length - 1], end])
                    documents.append((f"{source}-{target}", str(number)))
    inputs = {
        "input_ids": torch.tensor([row + [end] * (length - len(row)) for row in sources]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in sources]),
        "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in targets]),
    }
    return Rows(inputs, torch.arange(len(documents)), documents)
