"""Fetching a checkpoint: all of one commit, each file as the Hub announced it, or nothing under the target's name."""

from __future__ import annotations

import glob
import re
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from hf_sparse_moe.checkpoints.folder import check_free_space, check_target, new_folder
from hf_sparse_moe.checkpoints.source import Source, weight_files

from .adapter_folder import ADAPTER_WEIGHTS
from .errors import HubUnavailableError, check_repo_id, raise_hub_error
from .publishable import is_pickle


CLIENT_FOLDER = ".cache"  # where huggingface_hub keeps what it knows of the files beside it
NO_CHECKPOINT_FILES = (".gitattributes", ".gitignore")
_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # names that are no files on Windows


@dataclass(frozen=True)
class PullReport:
    """
    What [`pull`] fetched.

    Args:
        path (`Path`): The folder.
        revision (`str`): The commit that the branch or tag stood at.
        files (`list[str]`): The files in the folder.
        left_out (`list[str]`): Pickles, which may run code when they are read.
    """

    path: Path
    revision: str
    files: list[str]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values."""
        return {**vars(self), "path": str(self.path)}


def pull(
    repo_id: str, output: str | Path, *, revision: str | None = None, token: bool | str | None = None
) -> PullReport:
    """
    Fetch a checkpoint from the Hub into a new folder, which appears when it is complete and each of its files has the
    size and the hash that the Hub announced.

    The branch or tag is resolved once, and all files are of that commit. A call that failed or was interrupted leaves
    what it fetched in a hidden folder beside the output, and the next one resumes from there. Pickles are left out.
    Where the machine is offline (`HF_HUB_OFFLINE`), the cache of `huggingface_hub` is copied. No code is run.

    Args:
        repo_id (`str`): `"user/name"`.
        output (`str` or `Path`): A folder that does not exist yet, or is empty.
        revision (`str`, *optional*): Branch, tag or commit. Defaults to main.
        token (`bool` or `str`, *optional*): Defaults to that of `hf auth login`.

    Returns:
        [`PullReport`]

    Raises:
        ValueError: no such repository or revision, or one whose files would land outside the output folder.
        PermissionError: a gated or private repository, or a wrong token.
        OSError: the output folder is taken, being written by another process, or its disk is full.
        HubUnavailableError: the Hub could not do it now, or a file arrived damaged.
    """
    check_repo_id(repo_id)
    check_target(output)
    if constants.is_offline_mode():
        return _copy_from_cache(repo_id, Path(output), revision)
    with raise_hub_error(repo_id, revision):
        info = read_head(repo_id, revision, token)
        commit, sizes = str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = _wanted(sizes, repo_id)
        if not any(name.endswith(".safetensors") for name in wanted):
            raise ValueError(
                f"`{repo_id}` has no safetensors, and weights in a pickle are not fetched: they may run code when "
                "they are read. Ask its owner for safetensors."
            )
        with new_folder(output, journal={"pull": repo_id}, keep_failed=True) as folder:
            missing = sum(sizes[name] for name in wanted if not (folder / name).is_file())
            check_free_space(folder, missing, output)
            _download(repo_id, commit, wanted, folder, token)
    return PullReport(Path(output), commit, wanted, sorted(filter(is_pickle, sizes)))


def read_head(repo_id: str, revision: str | None, token: bool | str | None) -> ModelInfo:
    """
    The commit that a branch or tag stands at, and the sizes and hashes of its files: `HfApi.model_info` with the
    backoff that `huggingface_hub` has for its other requests.
    """
    url = f"{constants.ENDPOINT}/api/models/{repo_id}"
    url += "" if revision is None else f"/revision/{quote(revision, safe='')}"
    answer = http_backoff("GET", url, params={"blobs": True}, headers=build_hf_headers(token=token))
    hf_raise_for_status(answer)
    return ModelInfo(**answer.json())


def check_path(name: str, repo_id: str) -> None:
    """Raise a `ValueError` for a name that could land outside a folder, or on something that is no file."""
    parts = name.split("/")
    odd = "\\" in name or ":" in name or any(ord(letter) < 32 for letter in name)
    unsafe = any(part in ("", ".", "..", ".git", CLIENT_FOLDER) or _DEVICE.fullmatch(part) for part in parts)
    if odd or unsafe or PurePosixPath(name).is_absolute():
        raise ValueError(
            f"`{repo_id}` names a file {name!r}, which could be written outside the target folder. Nothing was "
            "fetched; do not trust that repository."
        )


def _wanted(names: Iterable[str], repo_id: str) -> list[str]:
    """The files to fetch. Raises a `ValueError` for a name that is not safe on every disk."""
    seen: dict[str, str] = {}
    for name in names:
        check_path(name, repo_id)
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(f"`{repo_id}` has both {other!r} and {name!r}, which are one file on some disks.")
    return sorted(name for name in seen.values() if not is_pickle(name) and name not in NO_CHECKPOINT_FILES)


def _download(repo_id: str, commit: str, wanted: list[str], folder: Path, token: bool | str | None) -> None:
    """Fetch what is not there yet, and hold all of it against the hashes of the Hub; twice where some is damaged."""
    patterns = [glob.escape(name) for name in wanted]
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Not enough free disk space")  # it is an error of ours
            snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=patterns, token=token)
        verified = HfApi(token=token).verify_repo_checksums(repo_id, revision=commit, local_dir=folder)
        damaged = [mismatch["path"] for mismatch in verified.mismatches]
        for name in (*damaged, *verified.extra_paths):  # those of another commit, which an earlier call fetched
            (folder / name).unlink()
        if not damaged:
            shutil.rmtree(folder / CLIENT_FOLDER, ignore_errors=True)
            return
    raise HubUnavailableError(
        f"`{damaged[0]}` of `{repo_id}` arrived damaged twice: its hash is not the one that the Hub announces. It was "
        "removed. Run the same command again."
    )


def _is_whole(snapshot: Path) -> bool:
    """Whether a snapshot holds all the weights: a cache may have the config alone, or some shards."""
    try:
        return (snapshot / ADAPTER_WEIGHTS).is_file() or bool(weight_files(Source(snapshot.name, snapshot, None)))
    except ValueError:
        return False


def _copy_from_cache(repo_id: str, output: Path, revision: str | None) -> PullReport:
    try:
        snapshot = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        snapshot = None
    if snapshot is None or not _is_whole(snapshot):
        raise HubUnavailableError(
            f"`{repo_id}` is not complete in the cache of this machine, which is set to stay offline "
            "(`HF_HUB_OFFLINE`). Unset that, or fetch it once while the machine is online."
        )
    files = {file.relative_to(snapshot).as_posix(): file.resolve() for file in snapshot.rglob("*") if file.is_file()}
    wanted = _wanted(files, repo_id)
    with new_folder(output, needed_bytes=sum(files[name].stat().st_size for name in wanted)) as folder:
        for name in wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files[name], folder / name)
            if not _has_announced_hash(files[name].name, folder / name):
                raise HubUnavailableError(
                    f"`{name}` of `{repo_id}` is damaged in the cache of this machine (`{files[name]}`). Delete it, "
                    "and fetch it again while the machine is online."
                )
    return PullReport(output, snapshot.name, wanted, sorted(filter(is_pickle, files)))


def _has_announced_hash(announced: str, path: Path) -> bool:
    """The cache names a file by the hash that the Hub announced for it: sha256 of a large one, git's of another."""
    if re.fullmatch(r"[0-9a-f]{64}", announced):
        with path.open("rb") as file:
            return sha_fileobj(file).hex() == announced
    return not re.fullmatch(r"[0-9a-f]{40}", announced) or git_hash(path.read_bytes()) == announced
