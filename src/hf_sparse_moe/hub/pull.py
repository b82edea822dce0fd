"""Fetching a checkpoint: all of one commit, each file as the Hub announced it, or nothing under the target's name."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from hf_sparse_moe.checkpoints.folder import check_free_space, check_target
from hf_sparse_moe.checkpoints.source import Source, weight_files

from .adapter_folder import ADAPTER_WEIGHTS
from .errors import HubUnavailableError, check_repo_id, told_by_the_hub, with_retries
from .publishable import is_pickle


LOCK, CLIENT_FOLDER = ".lock", ".cache"
NO_CHECKPOINT_FILES = (".gitattributes", ".gitignore")
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # names that are no files on Windows


@dataclass(frozen=True)
class Pulled:
    """
    What a pull fetched.

    Args:
        path (`Path`): The folder.
        revision (`str`): The commit that the branch or tag stood at.
        files (`list[str]`): What is in the folder.
        left_out (`list[str]`): Pickles, which may run code when they are read.
    """

    path: Path
    revision: str
    files: list[str]
    left_out: list[str]


@dataclass(frozen=True)
class _Announced:
    """Size and hash of a file: sha256 for a large one, git's sha1 for another."""

    size: int
    digest: str

    def describes(self, path: Path) -> bool:
        if path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            if len(self.digest) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.digest
            git = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
            return hashlib.file_digest(file, lambda: git).hexdigest() == self.digest


def pull(repo_id: str, target: str | Path, *, revision: str | None = None, token: bool | str | None = None) -> Pulled:
    """
    Fetch a checkpoint from the Hub into a new folder, which appears when it is complete and each of its files has the
    size and the hash that the Hub announced.

    The branch or tag is resolved once, and all files are of that commit. A call that failed or was interrupted leaves
    the finished files in a hidden folder beside the target, and the next one goes on with them. Pickles are left out.
    Where the machine is offline (`HF_HUB_OFFLINE`), the cache of `huggingface_hub` is copied. Nothing is run.

    Args:
        repo_id (`str`): `"user/name"`.
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        revision (`str`, *optional*): Branch, tag or commit. Defaults to main.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.

    Returns:
        [`Pulled`]

    Raises:
        ValueError: no such repository or revision, or one whose files would land outside the target.
        PermissionError: a gated or private repository, or a wrong token.
        OSError: the target is taken, being written by another process, or its disk is full.
        HubUnavailableError: the Hub could not do it now, or a file arrived damaged.
    """
    check_repo_id(repo_id)
    path = check_target(target)
    if constants.is_offline_mode():
        return _copy_from_cache(repo_id, path, revision)
    api = HfApi(token=token)
    with told_by_the_hub(repo_id, revision):
        info = with_retries(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        announced = {}
        for file in info.siblings or ():
            check_path(file.rfilename, repo_id)
            digest = file.lfs.sha256 if file.lfs else file.blob_id
            announced[file.rfilename] = _Announced(file.size or 0, digest or "")
        _check_collisions(announced, repo_id)
        wanted = {name: file for name, file in announced.items() if not _is_left_out(name)}
        if not any(name.endswith(".safetensors") for name in wanted):
            raise ValueError(
                f"`{repo_id}` has no safetensors, and weights in a pickle are not fetched: they may run code when "
                "they are read. Ask its owner for safetensors."
            )
        commit = str(info.sha)
        with _partial_folder(path) as partial:
            missing = sum(file.size for name, file in wanted.items() if not (partial / name).is_file())
            check_free_space(partial, missing, target)
            _remove_others(partial, wanted)
            for name in wanted:
                _fetch(repo_id, commit, name, wanted[name], partial, token)
            shutil.rmtree(partial / CLIENT_FOLDER, ignore_errors=True)
    return Pulled(Path(target), commit, sorted(wanted), sorted(filter(is_pickle, announced)))


def check_path(name: str, repo_id: str) -> None:
    """Raise a `ValueError` for a name that could land outside a folder, or on something that is no file."""
    parts = name.split("/")
    odd = "\\" in name or ":" in name or any(ord(letter) < 32 for letter in name)
    unsafe = any(part in ("", ".", "..", ".git", CLIENT_FOLDER) or _DEVICE.fullmatch(part) for part in parts)
    if odd or unsafe or parts == [LOCK] or PurePosixPath(name).is_absolute():
        raise ValueError(
            f"`{repo_id}` names a file {name!r}, which could be written outside the target folder. Nothing was "
            "fetched; do not trust that repository."
        )


def _check_collisions(names: Mapping[str, object], repo_id: str) -> None:
    """Some disks know no difference of case: a file could take the place of another."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"`{repo_id}` has both {other!r} and {name!r}, which are one file on some disks.")


def _is_left_out(name: str) -> bool:
    return is_pickle(name) or name in NO_CHECKPOINT_FILES


def _fetch(
    repo_id: str, commit: str, name: str, announced: _Announced, partial: Path, token: bool | str | None
) -> None:
    path = partial / name
    for again in (False, True):
        if not again and path.is_file() and announced.describes(path):
            return
        hf_hub_download(repo_id, name, revision=commit, local_dir=partial, token=token, force_download=again)
        if announced.describes(path):
            return
        path.unlink()
    raise HubUnavailableError(
        f"`{name}` of `{repo_id}` arrived damaged twice: it has not the size and hash that the Hub announces. It was "
        "removed; run the same again."
    )


def _remove_others(partial: Path, wanted: Mapping[str, object]) -> None:
    """Files of another commit, which an earlier call fetched."""
    for path in partial.rglob("*"):
        name = path.relative_to(partial)
        if path.is_file() and name.parts[0] not in (CLIENT_FOLDER, LOCK) and name.as_posix() not in wanted:
            path.unlink()


@contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, which takes that name at the end, and stays for the next call at a failure."""
    partial = path.with_name(f".{path.name}.pull")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"`{path}` cannot be created ({error.strerror}). Choose a folder where you may write."
        ) from error
    lock = FileLock(partial / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OSError(f"Another process is fetching `{path}`. Wait for it, or choose another folder.") from None
    try:
        yield partial
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"The disk of `{path}` is full. Free some space and run the same again: what is there is not fetched "
            "twice."
        ) from error
    finally:
        lock.release()
    (partial / LOCK).unlink(missing_ok=True)
    os.replace(partial, path)


def _is_whole(snapshot: Path) -> bool:
    """Whether a snapshot holds all the weights: a cache may have the config alone, or some shards."""
    if (snapshot / ADAPTER_WEIGHTS).is_file():
        return True
    try:
        return bool(weight_files(Source(snapshot.name, snapshot, None)))
    except ValueError:
        return False


def _copy_from_cache(repo_id: str, path: Path, revision: str | None) -> Pulled:
    missing = HubUnavailableError(
        f"`{repo_id}` is not, or not wholly, in the cache of this machine, which is told to stay offline "
        "(`HF_HUB_OFFLINE`). Unset that, or fetch it once on a machine that is online."
    )
    try:
        snapshot = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise missing from None
    files = {file.relative_to(snapshot).as_posix(): file for file in snapshot.rglob("*") if file.is_file()}
    for name in files:
        check_path(name, repo_id)
    wanted = {name: file.resolve() for name, file in files.items() if not _is_left_out(name)}
    if not _is_whole(snapshot):
        raise missing
    with _partial_folder(path) as partial:
        check_free_space(partial, sum(file.stat().st_size for file in wanted.values()), path)
        _remove_others(partial, wanted)
        for name, file in wanted.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial / name)
            # The cache names a file by the hash that the Hub announced for it, and the snapshot links to it.
            hashed = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.name)
            if hashed and not _Announced(file.stat().st_size, file.name).describes(partial / name):
                raise HubUnavailableError(
                    f"`{name}` of `{repo_id}` is damaged in the cache of this machine (`{file}`). Delete it, and "
                    "fetch it again where the machine is online."
                )
    return Pulled(path, snapshot.name, sorted(wanted), sorted(filter(is_pickle, files)))
