"""Which files are a folder's own, and what its JSON may be."""

import json
import os

import pytest

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.files import is_own, read_json, tensor_names, write_whole
from hf_sparse_moe.checkpoints.hashes import source_files


SECRET = "secret-of-a-person"


@pytest.fixture
def folder(tmp_path):
    """A folder with files of its own, and links, a pipe and a device in it that are not."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("blobs", "precious"):
        (tmp_path.parent / name).mkdir(exist_ok=True)
        (tmp_path / name).mkdir()
        (tmp_path / name / "id_rsa").write_text(SECRET)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "COPYING").symlink_to("tokenizer.json")
    (folder / "LICENSE").symlink_to(tmp_path / "precious" / "id_rsa")
    (folder / "NOTICE").symlink_to("../blobs/id_rsa")
    (folder / "vocab.json").symlink_to("../../blobs/id_rsa")
    (folder / "vocab.txt").symlink_to("vocab.txt")
    (folder / "tokenizer.model").symlink_to("/dev/zero")
    os.mkfifo(folder / "merges.txt")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "1_Pooling" / "more.json").symlink_to(tmp_path / "precious" / "id_rsa")
    (folder / "2_Dense").symlink_to(tmp_path / "precious", target_is_directory=True)
    (tmp_path / "precious" / "config.json").write_text(SECRET)
    return folder


def own_files(folder):
    return [path.name for path in sorted(folder.iterdir()) if is_own(path, folder)]


def test_only_own_files_are_copied(folder, tmp_path):
    assert own_files(folder) == ["COPYING", "config.json", "tokenizer.json"]
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_companions(folder, copy)
    names = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    assert names == ["1_Pooling/config.json", "COPYING", "tokenizer.json"]


def test_a_snapshot_of_the_hub_owns_its_blobs(tmp_path):
    repository = tmp_path / "models--user--name"
    snapshot, other = repository / "snapshots" / "abc", tmp_path / "blobs"
    for made in (snapshot, repository / "blobs", other):
        made.mkdir(parents=True)
        (made / "file").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/file")
    (snapshot / "LICENSE").symlink_to("../../../blobs/file")
    assert own_files(snapshot) == ["config.json", "file"]


def test_blobs_that_are_a_link_belong_to_nobody(tmp_path):
    repository = tmp_path / "models--user--name"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "id_rsa").write_text(SECRET)
    (repository / "blobs").symlink_to(tmp_path / "precious", target_is_directory=True)
    (repository / "snapshots" / "abc" / "LICENSE").symlink_to("../../blobs/id_rsa")
    assert own_files(repository / "snapshots" / "abc") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"x"', "holds a JSON str, not an object"),
        ("[]", "holds a JSON list, not an object"),
        ('{"half": ', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested too deeply"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_json_of_another_shape(text, words, tmp_path):
    path = tmp_path / "receipt.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"`{path}` {words}|{words}"):
        read_json(path)
    path.write_text("[1]")
    assert read_json(path, list) == [1]


def test_json_that_is_not_there_or_not_its_own(folder, tmp_path):
    assert read_json(folder / "receipt.json", optional=True) == {}
    with pytest.raises(ValueError, match=r"has no receipt\.json"):
        read_json(folder / "receipt.json")
    for name, words in (("vocab.json", "link that leads out"), ("vocab.txt", "link"), ("merges.txt", "regular file")):
        with pytest.raises(ValueError, match=words):
            read_json(folder / name, optional=True)


def test_what_may_not_be_read_is_reported_as_that(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        tensor_names(path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    for read in (tensor_names, lambda path: source_files(path.parent)):
        with pytest.raises(PermissionError, match="Permission denied"):
            read(path)


def test_a_file_is_written_whole_and_never_through_a_link(tmp_path):
    precious, path = tmp_path / "precious", tmp_path / "README.md"
    precious.write_text("mine")
    path.symlink_to(precious)
    write_whole(path, json.dumps([1]))
    assert (precious.read_text(), path.read_text(), path.is_symlink()) == ("mine", "[1]", False)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["README.md", "precious"]
