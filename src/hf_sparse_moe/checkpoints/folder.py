"""Writing a checkpoint's folder whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .companions import copy_companions
from .files import is_own, read_json


_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and a distributed save pass on the system's error as text, torch.save names no number.
_WRITE_FAILED = re.compile(
    rf"inline_container|PytorchStreamWriter|iostream error|\b(os error|Errno) ({'|'.join(map(str, _DISK_IS_FULL))})\b"
)
_JOURNAL = "journal.json"


def write_checkpoint(
    model: SparseMoePreTrainedModel, output: str | Path, source: Path | None = None, **save_arguments: Any
) -> Path:
    """Save a mixture with what else belongs to its dense source; the folder appears when it is complete."""
    with new_folder(output, needed_bytes=sum(parameter.nbytes for parameter in model.parameters())) as folder:
        model.save_pretrained(folder, **save_arguments)
        if source is not None:
            copy_companions(source, folder)
    return Path(output)


def write_description(model: PreTrainedModel, folder: Path) -> None:
    """All that `save_pretrained` writes of a model but its weights, which may have no storage."""
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # transformers shows one even for no weights
    try:
        with TemporaryDirectory(dir=folder) as described:
            model.save_pretrained(described, state_dict={})
            for path in Path(described).iterdir():
                if path.name != SAFE_WEIGHTS_NAME:
                    path.replace(folder / path.name)
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def check_target(output: str | Path) -> Path:
    """The absolute path of `output`; raises an `OSError` unless it is free to become a folder."""
    path = Path(output).resolve()
    if os.path.ismount(path):
        raise OSError(f"`{output}` is where a disk is mounted. Choose a folder below it.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"`{output}` is a file. Choose a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"`{output}` is not empty. Choose a folder that does not exist yet, or empty it first.")
    return path


@contextmanager
def new_folder(
    output: str | Path, needed_bytes: int = 0, journal: dict[str, Any] | None = None, keep_failed: bool = False
) -> Iterator[Path]:
    """
    A folder to write to, which takes the name `output` when the block ends.

    Until then it lies in a private folder beside `output` whose name nobody can foresee. Only one call at a time
    writes an output; what calls that were killed left of it goes when the next one begins, unless that resumes it.

    Args:
        output (`str` or `Path`): A folder that does not exist yet, or is empty.
        needed_bytes (`int`, defaults to 0): What will be written, at least; a disk without that is refused at once.
        journal (`dict`, *optional*): Resume what a call left that had [`write_journal`] write the same: the finished
            `*.safetensors` are there, all else is cleared. Another journal is a `ValueError`.
        keep_failed (`bool`, defaults to `False`): Keep all that was written where the block fails too, for the next
            call with the same `journal`; another one starts afresh.
    """
    path = check_target(output)
    missing = [folder for folder in path.parents if not folder.exists()]
    advice = (
        "and run the same again: what is there is kept" if keep_failed else "or choose another; nothing was written"
    )
    try:
        with full_disk_told(output, f"Free some space, {advice}."), _lock(path, output):
            check_target(output)  # another call may have finished in the meantime
            with _content(path, output, journal, keep_failed) as folder:
                check_free_space(folder, needed_bytes, output)
                yield folder
                flush(folder)
                os.replace(folder, path)
    finally:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def write_journal(folder: Path, journal: dict[str, Any]) -> None:
    """Say what a [`new_folder`] is being written from, so that the finished files in it may be used again."""
    new = folder.parent / f"{_JOURNAL}.new"
    new.write_text(json.dumps(journal), encoding="utf-8")
    os.replace(new, folder.parent / _JOURNAL)


def check_free_space(folder: Path, needed_bytes: int, output: str | Path) -> None:
    """Raise an `OSError` unless the disk of `folder` has room for what `output` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"`{output}` needs {needed_bytes / 1e6:,.1f} MB and its disk has {free / 1e6:,.1f} MB left. Free some "
            "space, or choose another disk."
        )


@contextmanager
def full_disk_told(output: str | Path, advice: str) -> Iterator[None]:
    """Say in one sentence, which ends in `advice`, that the disk is full, whatever library noticed it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if not _WRITE_FAILED.search(str(error)):
            raise
        raise OSError(f"The disk of `{output}` is full. {advice}") from error


def flush(folder: Path) -> None:
    """Have the disk hold what is in a folder, and the folder's entry: a full disk may show only now."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _content(path: Path, output: str | Path, journal: dict[str, Any] | None, keep_failed: bool) -> Iterator[Path]:
    """The folder inside a private one: a new one, or the one to resume."""
    work = None
    for left in _left_behind(path):
        if work is None and journal is not None and _is_resumed(left, journal, output, keep_failed):
            work = left
        else:
            shutil.rmtree(left, ignore_errors=True)
    if work is None:
        work = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        work.mkdir(mode=0o700)
        (work / _JOURNAL).write_text("{}", encoding="utf-8")
    folder, keep = work / "content", False
    try:
        folder.mkdir(exist_ok=True)
        if keep_failed:
            write_journal(folder, journal or {})
        else:
            _clear(folder)
        yield folder
    except BaseException as error:
        keep = keep_failed or (not isinstance(error, Exception) and read_json(work / _JOURNAL) != {})
        raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _lock(path: Path, output: str | Path) -> Iterator[None]:
    """Keep other processes from writing to `path`, until the block has ended. The lock file is never written to."""
    name = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _DISK_IS_FULL:
            raise
        raise OSError(
            f"`{output}` cannot be created: `{name}` cannot be opened ({error.strerror}). Choose a folder where you "
            "may write, or remove that file."
        ) from error
    try:
        if not _take(file, name):
            raise OSError(f"Another process is writing `{output}`. Wait for it, or choose another folder.")
        try:
            yield
        finally:
            if os.fstat(file).st_size == 0:  # a file with something in it is not ours
                name.unlink(missing_ok=True)
    finally:
        os.close(file)


def _take(file: int, name: Path) -> bool:
    """Lock an open file; False where another process has it, or has just finished with it and removed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return name.is_file() and not name.is_symlink() and os.path.samestat(name.stat(), os.fstat(file))


def _left_behind(path: Path) -> list[Path]:
    """The private folders that killed calls left beside `path`: this user's, and no links."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    return [folder for folder in sorted(path.parent.iterdir()) if pattern.fullmatch(folder.name) and _is_ours(folder)]


def _is_ours(folder: Path) -> bool:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    return is_own(folder / _JOURNAL, folder) or not any(folder.iterdir())


def _is_resumed(work: Path, journal: dict[str, Any], output: str | Path, keep_failed: bool) -> bool:
    begun = read_json(work / _JOURNAL, optional=True)
    different = _first_difference(begun, json.loads(json.dumps(journal)))  # as the file has it: no tuples
    if begun and different is not None and not keep_failed:
        raise ValueError(
            f"What was written of `{output}` cannot be resumed: {different}. Give the same arguments, or start afresh "
            "without `resume` (`--resume`)."
        )
    return bool(begun) and different is None


def _first_difference(begun: dict[str, Any], now: dict[str, Any]) -> str | None:
    for name in begun | now:
        then, here = begun.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(here, dict):
            if (inside := _first_difference(then, here)) is not None:
                return inside
        elif then != here:
            return f"`{name}` was {then!r} and is {here!r}"
    return None


def _clear(folder: Path) -> None:
    """Leave the finished shards of a call that is resumed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.suffix != ".safetensors":
            path.unlink()
