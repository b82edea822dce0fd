"""Text in several domains: what every Python installation has, or the user's own."""

from __future__ import annotations

import ast
import gzip
import json
import random
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("valid", "validation", "val", "dev", "test", "eval", "held_out")
HELD_OUT_SHARE = 10  # one document in ten, where the data has no split of its own
# Enough for a run of minutes; tokenizing more would only take time.
TRAIN_CHARACTERS = 600_000
HELD_OUT_CHARACTERS = 60_000
DOCUMENT_CHARACTERS = 20_000

Row = tuple[str, bool, str, str]  # domain, whether it is held out, document, text


@dataclass(frozen=True)
class Corpus:
    """Documents by domain: `train` to learn from, and `held_out`, other documents of the same domains."""

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]

    @property
    def domains(self) -> list[str]:
        return sorted(self.train)


def load_corpus(data: str | None, seed: int = 0) -> Corpus:
    """
    The corpus of a folder, of a Hub data set, or, without `data`, of this Python installation.

    A folder holds `.jsonl` files (a column `text`; `domain` and `doc` are optional) and `.txt` files (each paragraph
    is a document), either also as `.gz`. The domain is the `domain` column, else the file's name. Folders or files
    called `valid`, `test`, ... are held out; in a domain without any, a tenth of the documents is.

    Args:
        data (`str`, *optional*): A folder, or the id of a Hub data set with a `text` column.
        seed (`int`, defaults to 0): Of the choice and order of documents.

    Raises:
        ValueError: no text in `data`, or a domain without a document to hold out.
    """
    if data is None:
        rows = _python_rows()
    elif Path(data).is_dir():
        rows = _folder_rows(Path(data))
    elif Path(data).is_absolute() or data.startswith(".") or data.count("/") > 1:
        raise ValueError(f"`{data}` is neither a folder nor the id of a Hub data set. Check the path.")
    else:
        rows = _hub_rows(data)
    documents: dict[str, dict[bool, dict[str, list[str]]]] = defaultdict(lambda: {True: {}, False: {}})
    for domain, is_held_out, document, text in rows:
        if text.strip():
            documents[domain][is_held_out].setdefault(document, []).append(text)
    if not documents:
        raise ValueError(f"`{data}` has no text. It needs files that end in one of {SUFFIXES}.")
    train, held_out = {}, {}
    for domain in sorted(documents):
        learn, measure = (list(documents[domain][is_held_out].values()) for is_held_out in (False, True))
        random.Random(seed).shuffle(learn)
        if not measure:
            cut = -(-len(learn) // HELD_OUT_SHARE)
            learn, measure = learn[cut:], learn[:cut]
        if not learn or not measure:
            raise ValueError(
                f"Domain `{domain}` of `{data}` needs at least one document to learn from and one to hold out. Add "
                "documents, or leave the domain out."
            )
        train[domain] = _at_most(learn, TRAIN_CHARACTERS)
        held_out[domain] = _at_most(measure, HELD_OUT_CHARACTERS)
    return Corpus(train, held_out)


def _at_most(documents: list[list[str]], characters: int) -> list[str]:
    """The beginnings of documents, one string each, up to `characters` in all."""
    chosen: list[str] = []
    for parts in documents:
        if characters <= 0:
            break
        chosen.append("\n\n".join(parts)[: min(DOCUMENT_CHARACTERS, characters)])
        characters -= len(chosen[-1])
    return chosen


def _folder_rows(folder: Path) -> Iterator[Row]:
    for path in sorted(path for path in folder.rglob("*") if path.name.lower().endswith(SUFFIXES) and path.is_file()):
        stem = path.name.split(".")[0]
        parts = {part.lower() for part in (*path.relative_to(folder).parts[:-1], stem)}
        is_split = stem.lower() in (*HELD_OUT_NAMES, *TRAIN_NAMES)
        domain = folder.resolve().name if is_split else stem
        for number, row in enumerate(read_rows(path)):
            if "text" not in row:
                raise ValueError(
                    f"Line {number + 1} of `{path}` has no `text`, only {sorted(row)}. Rename the column."
                )
            document = str(row.get("doc", f"{path.name}:{number}"))
            yield str(row.get("domain", domain)), not parts.isdisjoint(HELD_OUT_NAMES), document, str(row["text"])


def read_rows(path: Path) -> Iterator[dict]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if ".jsonl" in path.name.lower():
                yield from (dict(json.loads(line)) for line in file if line.strip())
            else:
                yield from ({"text": paragraph} for paragraph in file.read().split("\n\n"))
    except (ValueError, TypeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"`{path}` cannot be read ({error}). Check the file.") from error


def _hub_rows(name: str) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("Hub data sets need datasets: pip install 'hf-sparse-moe[train]'.") from error
    for split, rows in load_dataset(name).items():
        if "text" not in rows.column_names:
            raise ValueError(f"`{name}` has no column `text`, only {rows.column_names}. Pass a folder of your own.")
        for number, row in enumerate(rows):
            is_held_out = split.split("_")[0] in HELD_OUT_NAMES
            yield str(row.get("domain", name)), is_held_out, str(row.get("doc", f"{split}:{number}")), row["text"]


def _python_rows() -> Iterator[Row]:
    """
    The standard library's code, its documentation, and the language reference behind `help()`. A paragraph that
    occurred before is left out, so that no held-out text was seen in training.
    """
    seen: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        code, documentation = _code_and_documentation(path.read_text(encoding="utf-8", errors="replace"))
        is_held_out = zlib.crc32(path.name.encode()) % HELD_OUT_SHARE == 0  # the same modules in both domains
        yield "code", is_held_out, path.name, code
        yield "documentation", is_held_out, path.name, _unseen_paragraphs(documentation, seen)
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield "reference", False, name, _unseen_paragraphs(text, seen)


def _code_and_documentation(source: str) -> tuple[str, str]:
    tree = ast.parse(source)
    documentation = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                documentation.append(text)
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree), "\n\n".join(documentation)


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        key = "".join(letter for letter in paragraph.lower() if letter.isalnum())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)
