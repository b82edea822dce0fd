"""From a checkpoint on disk to shards on disk: what every command that streams does beside the conversion."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from .folder import check_free_space, new_folder, write_journal
from .hashes import source_files
from .source import Source
from .writer import ShardWriter


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


@contextmanager
def written_shards(
    output: str | Path,
    tensors: Mapping[str, torch.Tensor],
    write: Callable[[ShardWriter], Generator[int]],
    source: WatchedSource | None,
    made_from: dict[str, Any],
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
) -> Iterator[tuple[Path, dict[str, str]]]:
    """
    A [`new_folder`] that holds all shards of a checkpoint, for the block to put the small files into, and the sha256
    of the source's files. Raises a `ValueError` where the source changed while it was read.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): All that is to be written, without storage.
        write (`Callable`): Writes what the [`ShardWriter`] wants, and yields the bytes of each piece.
        source ([`WatchedSource`], *optional*): What the pieces are made of; None for a model in memory.
        made_from (`dict`): What else they are made of. With the source's hashes it is the journal to resume from.
        show_progress (`bool`, defaults to `False`): A bar with rate and time left, on stderr.
    """
    known = source.sha256() if source is not None and resume else None
    with new_folder(output, journal=None if known is None else made_from | {"sha256": known}) as folder:
        writer = ShardWriter(folder, tensors, max_shard_size)
        check_free_space(folder, writer.missing_bytes, output)

        def hash_source() -> dict[str, str]:
            if source is None:
                return {}
            digests = source.sha256() if known is None else known
            write_journal(folder, made_from | {"sha256": digests})
            return digests

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        # The hash of the source takes a second core, not time. Without it there is nothing to resume from.
        with (
            ThreadPoolExecutor(max_workers=1) as hashing,
            Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress,
        ):
            task = progress.add_task("write", total=writer.total_bytes)
            progress.advance(task, writer.total_bytes - writer.missing_bytes)
            hashed = hashing.submit(hash_source)
            try:
                with closing(write(writer)) as pieces:
                    for written in pieces:
                        progress.advance(task, written)
                writer.close()
            finally:
                writer.abandon()
            digests = hashed.result()
        if source is not None:
            source.check_unchanged()
        yield folder, digests
