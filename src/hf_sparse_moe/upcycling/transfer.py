"""From a checkpoint on disk to shards on disk: what every command that streams does beside the conversion."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from hf_sparse_moe.checkpoints.folder import check_free_space, write_journal
from hf_sparse_moe.checkpoints.hashes import source_files
from hf_sparse_moe.checkpoints.source import Source
from hf_sparse_moe.checkpoints.writer import ShardWriter


class WatchedSource:
    """A checkpoint that must stay as it is while it is read; size and time of change of its files tell."""

    def __init__(self, source: Source):
        self._source = source
        self._stamps = self._now()

    def check_unchanged(self) -> None:
        now = self._now()
        changed = sorted(name for name in self._stamps | now if self._stamps.get(name) != now.get(name))
        if changed:
            raise ValueError(
                f"`{self._source.name}` changed while it was read (`{changed[0]}`), so nothing was written. Wait "
                "until it is complete, and start again."
            )

    def sha256(self) -> dict[str, str]:
        return source_files(self._source.folder)

    def _now(self) -> dict[str, tuple[int, int]]:
        files = [*self._source.folder.glob("*.safetensors"), *self._source.folder.glob("*.json")]
        return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def write_weights(
    writer: ShardWriter,
    pieces: Iterator[int],
    target: str | Path,
    source: WatchedSource | None,
    made_from: dict[str, Any],
    sha256: dict[str, str] | None = None,
    show_progress: bool = False,
) -> dict[str, str]:
    """
    Write all that is missing of a checkpoint's shards, and, for a source on disk, the journal to resume from.

    Args:
        writer ([`ShardWriter`]): In a `new_folder`.
        pieces (`Iterator[int]`): Writes with `writer`, and yields the bytes of each piece.
        target (`str` or `Path`): What the folder will be called.
        source ([`WatchedSource`], *optional*): What the pieces are made of; None for a model in memory.
        made_from (`dict`): The journal, without the source's hashes.
        sha256 (`dict`, *optional*): The source's hashes, where they are known. Else they are computed meanwhile.
        show_progress (`bool`, defaults to `False`): A bar with rate and time left, on stderr.

    Returns:
        `dict`: the source's hashes.

    Raises:
        ValueError: the source changed.
        OSError: the disk is too small.
    """
    check_free_space(writer.folder, writer.missing_bytes, target)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # The hash of the source takes a second core, not time. Without it there is nothing to resume from.
    with (
        ThreadPoolExecutor(max_workers=1) as hashing,
        Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress,
    ):
        task = progress.add_task("write", total=writer.total_bytes)
        progress.advance(task, writer.total_bytes - writer.missing_bytes)

        def hash_source() -> dict[str, str]:
            if source is None:
                return {}
            digests = source.sha256() if sha256 is None else sha256
            write_journal(writer.folder, made_from | {"sha256": digests})
            return digests

        hashed = hashing.submit(hash_source)
        try:
            for written in pieces:
                progress.advance(task, written)
            writer.close()
        finally:
            if isinstance(pieces, Generator):
                pieces.close()  # no thread of its own writes any more
            writer.abandon()
        digests = hashed.result()
    if source is not None:
        source.check_unchanged()
    return digests
