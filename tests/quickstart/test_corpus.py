"""Domains, documents and what is held out."""

import gzip
import json

import pytest

from hf_sparse_moe.quickstart.corpus import load_corpus


@pytest.fixture(scope="module")
def python_corpus():
    return load_corpus(None)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_every_installation_has_three_domains(python_corpus):
    assert python_corpus.domains == ["code", "documentation", "reference"]
    for domain in python_corpus.domains:
        assert sum(map(len, python_corpus.train[domain])) > 50_000
        assert sum(map(len, python_corpus.held_out[domain])) > 5_000


def test_nothing_held_out_was_seen(python_corpus):
    seen = {part for texts in python_corpus.train.values() for text in texts for part in text.split("\n\n")}
    for domain in ("documentation", "reference"):
        held_out = [part for text in python_corpus.held_out[domain] for part in text.split("\n\n")]
        assert not [part for part in held_out if len(part) > 80 and part in seen]


def test_code_has_no_documentation_in_it(python_corpus):
    assert not any(text.startswith(('"', "'")) for text in python_corpus.train["code"])
    assert sum('"""' in text for text in python_corpus.train["code"]) < len(python_corpus.train["code"]) / 4


def test_split_folders(tmp_path):
    write(tmp_path / "train" / "law.jsonl.gz", [{"text": "learn law", "domain": "law", "doc": "1"}])
    write(tmp_path / "train" / "art.jsonl", [{"text": "learn art"}])
    write(tmp_path / "valid" / "law.jsonl", [{"text": "measure law", "domain": "law", "doc": "2"}])
    write(tmp_path / "valid" / "art.jsonl", [{"text": "measure art"}])
    corpus = load_corpus(str(tmp_path))
    assert corpus.train == {"art": ["learn art"], "law": ["learn law"]}
    assert corpus.held_out == {"art": ["measure art"], "law": ["measure law"]}


def test_a_tenth_of_the_documents_is_held_out(tmp_path):
    rows = [{"text": f"document {number // 2} part {number % 2}", "doc": str(number // 2)} for number in range(80)]
    write(tmp_path / "notes.jsonl", rows)
    (tmp_path / "songs.txt").write_text("\n\n".join(f"song {number}" for number in range(40)))
    corpus = load_corpus(str(tmp_path), seed=3)
    assert 3 <= len(corpus.held_out["notes"]) <= 6
    assert 3 <= len(corpus.held_out["songs"]) <= 6
    for domain, count in (("notes", 40), ("songs", 40)):
        documents = corpus.train[domain] + corpus.held_out[domain]
        assert len(documents) == len(set(documents)) == count
    assert all("part 0\n\ndocument" in document for document in corpus.train["notes"])  # a document stays whole
    assert load_corpus(str(tmp_path), seed=3) == corpus
    assert load_corpus(str(tmp_path), seed=4) != corpus


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"content": "b"}\n', r"Line 2 of .*notes.jsonl.* has no `text`, only \['content'\]"),
        (b'{"text": "a"\n', r"notes.jsonl.* cannot be read"),
        (b"\xff\xfe\x00", r"notes.jsonl.* cannot be read"),
        (b'{"text": "only one"}\n', r"Domain `notes` .* at least one document"),
        (b"", "has no text"),
    ],
)
def test_data_that_cannot_be_used(content, message, tmp_path):
    (tmp_path / "notes.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path))


def test_a_line_that_is_no_object(tmp_path):
    (tmp_path / "notes.jsonl").write_text("4\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_corpus(str(tmp_path))


def test_a_broken_archive(tmp_path):
    write(tmp_path / "notes.jsonl.gz", [{"text": "words " * 1000}])
    content = (tmp_path / "notes.jsonl.gz").read_bytes()
    (tmp_path / "notes.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_corpus(str(tmp_path))


def test_no_such_folder():
    with pytest.raises(ValueError, match="neither a folder nor"):
        load_corpus("/nowhere")


@pytest.mark.needs_data("domains")
def test_ten_real_domains(data_dir):
    corpus = load_corpus(str(data_dir / "domains"))
    assert len(corpus.domains) == 10
    assert {"law", "zh_poetry", "python_code"} <= set(corpus.domains)
    assert all(len(text) > 20 for texts in corpus.held_out.values() for text in texts)
