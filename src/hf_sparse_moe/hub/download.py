"""Fetching a checkpoint: all of one commit, each file as the Hub announced it, or nothing under the target's name."""

from __future__ import annotations

import glob
import re
import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, snapshot_download

from hf_sparse_moe.checkpoints.folder import check_free_space, check_target, new_folder

from .errors import HubUnavailableError, raise_hub_error, retried
from .publishable import is_pickle


CLIENT_FOLDER = ".cache"  # where huggingface_hub keeps what it knows of the files beside it
# What could lead out of a folder, or is no file on Windows.
_UNSAFE = re.compile(r"(?i)|\.|\.\.|\.git|\.cache|.*[\\:\x00-\x1f].*|(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.DOTALL)


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
    hash that the Hub announced.

    The branch or tag is resolved once, and all files are of that commit. A call that failed or was interrupted leaves
    what it fetched in a hidden folder beside the output, and the next one resumes from there. Pickles are left out.
    No code is run.

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
    with raise_hub_error(repo_id, revision):
        check_target(output)
        head = read_head(repo_id, revision, token)
        commit, sizes = str(head.sha), {file.rfilename: file.size or 0 for file in head.siblings or ()}
        wanted = _wanted(sizes, repo_id)
        with new_folder(output, journal={"pull": repo_id}, keep_failed=True) as folder:
            check_free_space(folder, sum(sizes[name] for name in wanted if not (folder / name).is_file()), output)
            with warnings.catch_warnings(action="ignore"):  # of a full disk, which is an error of ours
                patterns = [glob.escape(name) for name in wanted]
                snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=patterns, token=token)
            _check_hashes(folder, wanted, repo_id, commit, token)
            shutil.rmtree(folder / CLIENT_FOLDER, ignore_errors=True)
    return PullReport(Path(output), commit, wanted, sorted(filter(is_pickle, sizes)))


def read_head(repo_id: str, revision: str | None, token: bool | str | None) -> ModelInfo:
    """The commit that a branch or tag stands at, and the sizes and hashes of its files."""
    return retried(partial(HfApi(token=token).model_info, repo_id, revision=revision, files_metadata=True))


def _wanted(names: Collection[str], repo_id: str) -> list[str]:
    """The files to fetch. Raises a `ValueError` for a name that is not safe on every disk, or no safetensors."""
    for name in names:
        if any(_UNSAFE.fullmatch(part) for part in name.split("/")):
            raise ValueError(
                f"`{repo_id}` names a file {name!r}, which could be written outside the target folder. Nothing was "
                "fetched; do not trust that repository."
            )
    if len({name.casefold() for name in names}) < len(names):
        raise ValueError(f"`{repo_id}` has files whose names differ by case alone, which are one file on some disks.")
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"`{repo_id}` has no safetensors, and weights in a pickle are not fetched: they may run code when they "
            "are read. Ask its owner for safetensors."
        )
    return sorted(name for name in names if not is_pickle(name) and name not in (".gitattributes", ".gitignore"))


def _check_hashes(folder: Path, wanted: list[str], repo_id: str, commit: str, token: bool | str | None) -> None:
    """Remove what is not of the commit; a [`HubUnavailableError`] for a file without the hash that the Hub names."""
    verify = partial(HfApi(token=token).verify_repo_checksums, repo_id, revision=commit, local_dir=folder)
    verified = retried(verify)
    damaged = [mismatch["path"] for mismatch in verified.mismatches]
    damaged += sorted({*wanted} & {*verified.missing_paths, *verified.extra_paths})
    for name in (*damaged, *verified.extra_paths):  # an earlier call may have fetched another commit
        (folder / name).unlink(missing_ok=True)
    if damaged:
        raise HubUnavailableError(
            f"`{damaged[0]}` of `{repo_id}` arrived damaged: its hash is not the one that the Hub announces. "
            "It was removed. Run the same command again."
        )
