"""Writing a checkpoint's folder whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_checkpoint(model: SparseMoePreTrainedModel, target: str | Path, source: Path | None = None) -> Path:
    """
    Save a mixture with the tokenizer and licence of its dense source; the folder appears when it is complete.

    Args:
        model (`SparseMoePreTrainedModel`): The mixture.
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        source (`Path`, *optional*): The folder of the dense checkpoint.

    Returns:
        `Path`: the folder.

    Raises:
        OSError: the target is taken, or the disk is full; nothing is left at the target.
    """
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with new_folder(target, needed_bytes=needed) as folder:
        model.save_pretrained(folder)
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
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise OSError(
                f"`{target}` cannot be created ({error.strerror}). Choose a folder where you may write."
            ) from error
        free = shutil.disk_usage(partial).free
        if free < needed_bytes:
            raise OSError(
                f"`{target}` needs {_megabytes(needed_bytes)} and its disk has {_megabytes(free)} left. Free "
                "some space, or choose another disk."
            )
        yield partial
        _flush(partial)
        os.replace(partial, path)
        complete = True
    except (OSError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        raise OSError(
            f"The disk of `{target}` is full, so nothing was written there. Free some space, or choose another disk."
        ) from error
    finally:
        if not complete:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in missing:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


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
