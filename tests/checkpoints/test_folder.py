"""One atomic folder: whole or not there, private until then, one writer at a time."""

import os

import pytest

from hf_sparse_moe.checkpoints.folder import new_folder, write_journal
from processes import in_processes


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_private_until_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "weights").write_text("1")
        work = folder.parent
        assert work.stat().st_mode & 0o777 == 0o700
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert os.listdir(tmp_path / "out") == ["weights"]


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_two_names_are_never_the_same(tmp_path):
    names = set()
    for number in range(3):
        with new_folder(tmp_path / f"out{number}") as folder:
            names.add(folder.parent.name.split(".")[2])
    assert len(names) == 3


@pytest.mark.parametrize("name", [".t.partial", ".t.pull", ".t.0123456789abcdef.partial"])
def test_no_link_and_no_folder_of_another_is_cleared(name, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "journal.json").write_text("{}")
    (tmp_path / name).symlink_to(precious, target_is_directory=True)
    foreign = tmp_path / ".t.fedcba9876543210.partial"
    foreign.mkdir()
    (foreign / "thesis").write_text("mine")
    with new_folder(tmp_path / "t") as folder:
        (folder / "weights").write_text("1")
    assert (precious / "journal.json").exists()
    assert (foreign / "thesis").read_text() == "mine"


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".t.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"\.t\.lock` cannot be opened"):
        whole(tmp_path / "t")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_that_looks_like_a_lock_stays(tmp_path):
    (tmp_path / ".t.lock").write_text("mine")
    with new_folder(tmp_path / "t"):
        pass
    assert (tmp_path / ".t.lock").read_text() == "mine"


def test_the_lock_is_held_until_the_name_is_given(tmp_path, monkeypatch):
    replace = os.replace

    def another_call(source, target):
        with pytest.raises(OSError, match="Another process is writing"):
            whole(tmp_path / "t")
        replace(source, target)

    with new_folder(tmp_path / "t") as folder:
        (folder / "weights").write_text("1")
        monkeypatch.setattr("os.replace", another_call)
    assert (tmp_path / "t" / "weights").read_text() == "1"
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="is not empty"):
        whole(tmp_path / "t")
    assert hidden(tmp_path) == []


def end_with(error, target, files=(), journal=None, **arguments):
    """A call that writes `files` and ends with `error`; returns what it was given to start with."""
    found = []

    def write():
        with new_folder(target, **arguments) as folder:
            found.extend(os.listdir(folder))
            for name in files:
                (folder / name).write_text("1")
            if journal:
                write_journal(folder, journal)
            raise error

    with pytest.raises(error):
        write()
    return found


def whole(target, **arguments):
    """A call that ends well; returns what it was given to start with."""
    with new_folder(target, **arguments) as folder:
        return os.listdir(folder)


def test_what_failed_is_removed_and_what_was_interrupted_is_resumed(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        end_with(error, tmp_path / "a" / "t")
        assert not (tmp_path / "a").exists()
    end_with(KeyboardInterrupt, tmp_path / "t", ("model.safetensors", "half.part"), {"seed": 0})
    assert len(hidden(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"`seed` was 0 and is 1.*without `resume`"):
        whole(tmp_path / "t", journal={"seed": 1})
    assert whole(tmp_path / "t", journal={"seed": 0}) == ["model.safetensors"]
    assert hidden(tmp_path) == []


def test_what_failed_is_kept_where_it_was_asked_for(tmp_path):
    kept = {"journal": {"a": 1}, "keep_failed": True}

    def fail(target):
        with new_folder(target, **kept) as folder:
            (folder / "README.md").write_text("1")
            raise ConnectionError

    for name in ("t", "t", "u"):
        with pytest.raises(ConnectionError):
            fail(tmp_path / name)
    assert whole(tmp_path / "t", **kept) == ["README.md"]
    assert whole(tmp_path / "u", journal={"a": 2}, keep_failed=True) == []


def die_while_writing(target):
    with new_folder(target) as folder:
        (folder / "weights").write_text("1")
        os.kill(os.getpid(), 9)


@pytest.mark.slow
def test_what_a_killed_call_left_goes_with_the_next(tmp_path):
    assert in_processes(1, die_while_writing, tmp_path / "t") == [-9]
    assert hidden(tmp_path)
    with new_folder(tmp_path / "t"):
        pass
    assert hidden(tmp_path) == []
