"""Text in several domains: what every Python installation carries, or the user's own."""

from __future__ import annotations

import ast
import gzip
import json
import random
import sysconfig
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("valid", "validation", "val", "dev", "test", "eval", "held_out")
HELD_OUT_SHARE = 10  # one document in ten, where the data has no split of its own
# Enough for a run of minutes; tokenizing more would only cost time.
TRAIN_CHARACTERS = 600_000
HELD_OUT_CHARACTERS = 60_000
DOCUMENT_CHARACTERS = 20_000
# Parts of the standard library that are generated tables, tests, or missing from some installations.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo"}


@dataclass(frozen=True)
class Corpus:
    """
    Documents by domain.

    Args:
        train (`dict[str, list[str]]`): To learn from.
        held_out (`dict[str, list[str]]`): Other documents of the same domains, to measure on.
    """

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]

    @property
    def domains(self) -> list[str]:
        """Sorted names."""
        return sorted(self.train)


def load_corpus(data: str | None, seed: int = 0) -> Corpus:
    """
    The corpus of a folder, of a Hub data set, or, without `data`, of this Python installation.

    A folder holds `.jsonl` files (a `text` column; `domain` and `doc` where there are) and `.txt` files (paragraphs),
    either also as `.gz`. The domain is the `domain` column, else the file's name. Folders or files called `valid`,
    `test`, ... are held out; where there are none, a tenth of each domain's documents is.

    Args:
        data (`str`, *optional*): A folder, or the id of a Hub data set with a `text` column.
        seed (`int`, defaults to 0): Of the choice of held-out documents.

    Raises:
        ValueError: no text in `data`, or a domain without a document to hold out.
    """
    if data is None:
        rows = python_texts()
    elif Path(data).is_dir():
        rows = _folder_rows(Path(data))
    elif Path(data).is_absolute() or data.startswith(".") or data.count("/") > 1:
        raise ValueError(f"`{data}` is no folder, and no id of a Hub data set. Check the path.")
    else:
        rows = _hub_rows(data)
    return _split(rows, str(data), seed)


@dataclass(frozen=True)
class _Row:
    domain: str
    document: str
    text: str
    held_out: bool | None  # None: the data does not say


def _split(rows: Iterable[_Row], data: str, seed: int) -> Corpus:
    documents: dict[tuple[str, bool | None], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.text.strip():
            documents[row.domain, row.held_out][row.document].append(row.text)
    domains = sorted({domain for domain, _ in documents})
    if not domains:
        raise ValueError(f"`{data}` has no text. It needs files that end in one of {SUFFIXES}.")
    train, held_out = {}, {}
    for domain in domains:
        learn = list(documents[domain, False].values())
        measure = list(documents[domain, True].values())
        undecided = list(documents[domain, None].values())
        random.Random(seed).shuffle(undecided)
        if not measure:
            measure, learn = _take_a_share(undecided or learn)
        else:
            learn += undecided
        if not learn or not measure:
            raise ValueError(
                f"Domain `{domain}` of `{data}` needs at least one document to learn from and one to hold out. Add "
                "documents, or leave the domain out."
            )
        random.Random(seed).shuffle(learn)
        train[domain] = _at_most(learn, TRAIN_CHARACTERS)
        held_out[domain] = _at_most(measure, HELD_OUT_CHARACTERS)
    return Corpus(train, held_out)


def _take_a_share(documents: list[list[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """The first documents, up to a tenth of the text, and the rest."""
    wanted = sum(len(part) for parts in documents for part in parts) // HELD_OUT_SHARE
    taken, cut = 0, 0
    while taken <= wanted and cut < len(documents):
        taken += sum(map(len, documents[cut]))
        cut += 1
    return documents[:cut], documents[cut:]


def _at_most(documents: list[list[str]], characters: int) -> list[str]:
    """The beginnings of documents, one string each, up to `characters` in all."""
    chosen, total = [], 0
    for parts in documents:
        if total >= characters:
            break
        chosen.append("\n\n".join(parts)[: min(DOCUMENT_CHARACTERS, characters - total)])
        total += len(chosen[-1])
    return chosen


# ---- the user's own -------------------------------------------------------------------------------------------


def _folder_rows(folder: Path) -> Iterator[_Row]:
    for path in sorted(path for path in folder.rglob("*") if path.name.lower().endswith(SUFFIXES) and path.is_file()):
        stem = path.name.split(".")[0]
        parts = [*path.relative_to(folder).parts[:-1], stem]
        held_out = None
        if any(part.lower() in HELD_OUT_NAMES for part in parts):
            held_out = True
        elif any(part.lower() in TRAIN_NAMES for part in parts):
            held_out = False
        default = folder.resolve().name if stem.lower() in (*HELD_OUT_NAMES, *TRAIN_NAMES) else stem
        for number, row in enumerate(_read_rows(path)):
            if "text" not in row:
                raise ValueError(
                    f"Line {number + 1} of `{path}` has no `text`, only {sorted(row)}. Rename the column."
                )
            document = str(row.get("doc", f"{path.name}:{number}"))
            yield _Row(str(row.get("domain", default)), document, str(row["text"]), held_out)


def _read_rows(path: Path) -> Iterator[dict]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if ".jsonl" in path.name.lower():
                for line in file:
                    if line.strip():
                        yield json.loads(line)
            else:
                for paragraph in file.read().split("\n\n"):
                    yield {"text": paragraph}
    except (UnicodeDecodeError, json.JSONDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"`{path}` cannot be read ({error}). Check the file.") from error


def _hub_rows(name: str) -> Iterator[_Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("Hub data sets need datasets: pip install 'hf-sparse-moe[train]'.") from error
    for split, rows in load_dataset(name).items():
        if "text" not in rows.column_names:
            raise ValueError(f"`{name}` has no column `text`, only {rows.column_names}. Pass a folder of your own.")
        for number, row in enumerate(rows):
            held_out = split.split("_")[0] in HELD_OUT_NAMES
            domain, document = str(row.get("domain", name)), str(row.get("doc", f"{split}:{number}"))
            yield _Row(domain, document, row["text"], held_out)


# ---- what every Python installation carries ---------------------------------------------------------------------


def python_texts() -> Iterator[_Row]:
    """
    Four kinds of text: the standard library's code without its documentation, that documentation, the language
    reference behind `help()`, and the licences of what is installed. A paragraph that was there before, as most of a
    licence was, is left out, so that nothing held out has been seen.
    """
    seen: set[str] = set()
    yield from _library_rows(seen)
    yield from _reference_rows(seen)
    yield from _licence_rows(seen)


def _library_rows(seen: set[str]) -> Iterator[_Row]:
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in library.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(library).parts)
    )
    random.Random(0).shuffle(paths)
    left = dict.fromkeys(("code", "documentation"), TRAIN_CHARACTERS + 2 * HELD_OUT_CHARACTERS)
    for path in paths:
        if max(left.values()) <= 0:
            return
        name = path.relative_to(library).as_posix()
        code, documentation = _code_and_documentation(path.read_text(encoding="utf-8", errors="replace"))
        texts = {"code": code, "documentation": _unseen_paragraphs(documentation, seen)}
        for domain, text in texts.items():
            if left[domain] > 0 and len(text) > 200:
                left[domain] -= min(len(text), DOCUMENT_CHARACTERS)
                # By the module's name, so that what is held out as code is held out as documentation too.
                yield _Row(domain, name, text, zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0)


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


def _reference_rows(seen: set[str]) -> Iterator[_Row]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield _Row("reference", name, _unseen_paragraphs(text, seen), None)


def _licence_rows(seen: set[str]) -> Iterator[_Row]:
    texts = {}
    own = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if own.is_file():
        texts["python"] = own.read_text(encoding="utf-8", errors="replace")
    for distribution in metadata.distributions():
        for file in distribution.files or []:
            if file.stem.upper().split("-")[0] in ("LICENSE", "LICENCE", "COPYING", "NOTICE"):
                path = Path(str(file.locate()))
                if path.is_file() and path.suffix.lower() != ".py":
                    name = f"{distribution.metadata['Name']} {file.name} {len(texts)}"
                    texts[name] = path.read_text(encoding="utf-8", errors="replace")
    for name, text in sorted(texts.items()):
        unseen = _unseen_paragraphs(text, seen)
        if len(unseen) > 200:
            yield _Row("licences", name, unseen, None)


def _unseen_paragraphs(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        key = "".join(letter for letter in paragraph.lower() if letter.isalnum())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)
