"""Writing a checkpoint's folder whole, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel


# What belongs to a checkpoint beside its weights and config: the tokenizer, as it is, and the licence.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
)

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_checkpoint(
    model: SparseMoePreTrainedModel, target: str | Path, source: Path | None = None, **save_arguments: Any
) -> Path:
    """
    Save a mixture with the tokenizer and licence of its dense source; the folder appears when it is complete.

    Args:
        model (`SparseMoePreTrainedModel`): The mixture.
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        source (`Path`, *optional*): The folder of the dense checkpoint.
        **save_arguments: As `save_pretrained` takes them, such as `max_shard_size="4GB"`.

    Returns:
        `Path`: the folder.

    Raises:
        OSError: the target is taken, or the disk is full; nothing is left at the target.
    """
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with new_folder(target, needed_bytes=needed) as folder:
        model.save_pretrained(folder, **save_arguments)
        if source is not None:
            copy_companions(source, folder)
    return Path(target)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer files and licences of a checkpoint, byte for byte; does not replace what `folder` has."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def check_target(target: str | Path) -> Path:
    """The absolute path of `target`; raises an `OSError` unless it is free to become a folder."""
    path = Path(target).resolve()
    if os.path.ismount(path):
        raise OSError(f"`{target}` is where a disk is mounted. Choose a folder below it.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"`{target}` is a file. Choose a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"`{target}` is not empty. Choose a folder that does not exist yet, or empty it first.")
    return path


@contextmanager
def new_folder(target: str | Path, needed_bytes: int = 0) -> Iterator[Path]:
    """
    A hidden folder beside `target` to write to; it takes the name `target` when the block ends, and is removed with
    all that is in it when the block fails.

    Args:
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        needed_bytes (`int`, defaults to 0): What will be written, at least; a disk without that is refused at once.

    Raises:
        OSError: the target is taken or may not be written, or the disk is full.
    """
    path = check_target(target)
    missing = [folder for folder in path.parents if not folder.exists()]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    complete = False
    try:
        with _told_in_one_sentence(target):
            _make(partial, target)
            check_free_space(partial, needed_bytes, target)
            yield partial
            _flush(partial)
            os.replace(partial, path)
        complete = True
    finally:
        if not complete:
            _remove(partial, missing)


@contextmanager
def resumable_folder(target: str | Path, journal: dict[str, Any] | None = None) -> Iterator[Path]:
    """
    As [`new_folder`], but what is written so far stays where the block is interrupted (by a signal, by Ctrl-C, by
    power), for another call to go on with. An error removes it.

    Args:
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        journal (`dict`, *optional*): Go on with what a call left that had [`write_journal`] write the same. Without,
            start afresh.

    Raises:
        ValueError: another journal.
        OSError: the target is taken, being written by another process or may not be written, or the disk is full.
    """
    path = check_target(target)
    missing = [folder for folder in path.parents if not folder.exists()]
    partial = path.with_name(f".{path.name}.partial")
    _make(partial, target)
    lock = FileLock(partial / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OSError(f"Another process is writing `{target}`. Wait for it, or choose another folder.") from None
    removable = False
    try:
        begun = None if journal is None else _read_journal(partial)
        if journal is not None and begun is not None:
            different = _first_difference(begun, journal)
            if different is not None:
                raise ValueError(
                    f"What was written of `{target}` cannot be gone on with: {different}. Give the same arguments, or "
                    "start afresh without `resume` (`--resume`)."
                )
        _clear(partial, keep=(_LOCK,) if begun is None else (_LOCK, _JOURNAL, "*.safetensors"))
        removable = True
        with _told_in_one_sentence(target):
            yield partial
            (partial / _JOURNAL).unlink()
            _flush(partial)
            lock.release()
            (partial / _LOCK).unlink(missing_ok=True)
            os.replace(partial, path)
        removable = False
    except (KeyboardInterrupt, SystemExit):
        removable = False
        raise
    finally:
        lock.release()
        if removable:
            _remove(partial, missing)


def write_journal(folder: Path, journal: dict[str, Any]) -> None:
    """Say what a [`resumable_folder`] is being written from, so that the finished files in it may be used again."""
    new = folder / f"{_JOURNAL}.new"
    new.write_text(json.dumps(journal), encoding="utf-8")
    os.replace(new, folder / _JOURNAL)


_JOURNAL, _LOCK = ".journal.json", ".lock"


def check_free_space(folder: Path, needed_bytes: int, target: str | Path) -> None:
    """Raise an `OSError` unless the disk of `folder` has room for what `target` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"`{target}` needs {_megabytes(needed_bytes)} and its disk has {_megabytes(free)} left. Free some space, "
            "or choose another disk."
        )


def _make(partial: Path, target: str | Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"`{target}` cannot be created ({error.strerror}). Choose a folder where you may write."
        ) from error


@contextmanager
def _told_in_one_sentence(target: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        raise OSError(
            f"The disk of `{target}` is full, so nothing was written there. Free some space, or choose another disk."
        ) from error


def _remove(partial: Path, missing: list[Path]) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for folder in missing:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _clear(partial: Path, keep: tuple[str, ...]) -> None:
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not any(path.match(pattern) for pattern in keep):
            path.unlink()


def _read_journal(partial: Path) -> dict[str, Any] | None:
    path = partial / _JOURNAL
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _first_difference(begun: dict[str, Any], now: dict[str, Any]) -> str | None:
    now = json.loads(json.dumps(now))  # as the file has it: no tuples
    for name in begun | now:
        then, here = begun.get(name), now.get(name)
        if then == here:
            continue
        if isinstance(then, dict) and isinstance(here, dict):
            return _first_difference(then, here)
        return f"`{name}` was {then!r} and is {here!r}"
    return None


def _is_full_disk(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_IS_FULL
    # safetensors passes on the number of the system's error in its text alone.
    return any(f"(os error {number})" in str(error) for number in _DISK_IS_FULL)


def _flush(folder: Path) -> None:
    """Have the disk hold the files before the folder gets its name: a full disk may show only now."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
