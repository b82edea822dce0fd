"""
Which of several equal ways is the fastest on this machine: the first calls of a kind take turns and are timed, and the
winner is remembered by the process and, for the next one, in a file.

`HF_SPARSE_MOE_MEASURE=0` and torch's deterministic mode switch it off: the first way is taken. The file is in the
folder `HF_SPARSE_MOE_CACHE`, by default `~/.cache/hf_sparse_moe`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

Result = TypeVar("Result")
TIMED = 5  # calls of each way, after one that warms it up; the fastest counts, since what else happens only adds time
HOPELESS = 2  # a way that takes so many times as long as another gets no more turns
MARGIN = 0.97  # another way than the first must take so much of its time
MOST_KINDS = 256  # of calls that a process measures; the others take the first way
VERSION = f"1, torch {torch.__version__}"


class Contest:
    """The ways to compute calls of one kind. The first is right where nothing is known."""

    def __init__(self, kind: str, ways: tuple[str, ...], winner: str | None):
        self.kind, self.ways, self.winner = kind, ways, winner
        self.running = list(ways)
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}  # a row, of each call; the first warms up

    def next_way(self) -> str:
        """The one with the fewest calls."""
        return min(self.running, key=lambda way: len(self.seconds[way]))

    def note(self, way: str, seconds: float) -> None:
        """Take down a call, and decide if it was the last."""
        self.seconds[way].append(seconds)
        best = {way: min(self.seconds[way][1:]) for way in self.running if len(self.seconds[way]) > 1}
        if not best or self.winner is not None:
            return
        limit = HOPELESS * min(best.values())
        self.running = [way for way in self.running if way not in best or best[way] <= limit]
        if all(len(self.seconds[way]) > TIMED for way in self.running):
            self.winner = min(self.running, key=lambda way: best[way] * (MARGIN if way == self.ways[0] else 1))
            _write(self.kind, self.winner)

    def drop(self, way: str, error: RuntimeError) -> None:
        """Never take this way again."""
        logger.warning_once(f"The experts no longer compute by the way `{way}`, which raised: {error}")
        self.running = [one for one in self.running if one != way]
        if self.winner == way or len(self.running) < 2:
            self.winner = self.ways[0]


@dataclass
class Turn:
    """One call, by the way that was chosen for it."""

    way: str
    contest: Contest | None = None
    rows: int = 0  # 0 where it is not timed
    _seconds: float = 0.0

    def run(self, compute: Callable[[str], Result]) -> Result:
        """`compute(way)`; by the first way where another one raises."""
        try:
            return compute(self.way)
        except RuntimeError as error:
            if self.contest is None or self.way == self.contest.ways[0]:
                raise
            self.contest.drop(self.way, error)
            self.way, self.rows = self.contest.ways[0], 0
            return compute(self.way)

    def timed(self, last: bool) -> AbstractContextManager[None]:
        """
        Count the time inside; after the `last` part of a call, note the sum. It is the CPU time of this thread, which
        has a part in all that torch splits up: other processes may keep it waiting longer than it works.
        """
        return self._timed(last) if self.rows else nullcontext()

    @contextmanager
    def _timed(self, last: bool) -> Iterator[None]:
        start = time.thread_time()
        yield
        self._seconds += time.thread_time() - start
        if last and self.rows and self.contest:
            self.contest.note(self.way, self._seconds / self.rows)
            self.rows = 0


def choose(kind: tuple[Hashable, ...], ways: tuple[str, ...], rows: int) -> Turn:
    """
    The way to compute a call of `rows` rows. Calls of one `kind` differ in little but their rows, and not in `ways`.

    Inside of a backward pass, where a gradient checkpoint computes again, nothing is timed.
    """
    if (
        len(ways) == 1
        or _is_fixed.get()
        or torch.are_deterministic_algorithms_enabled()
        or os.environ.get("HF_SPARSE_MOE_MEASURE") == "0"
    ):
        return Turn(ways[0])
    contest = _contests.get(kind)
    if contest is None:
        if len(_contests) >= MOST_KINDS:
            logger.warning_once(f"The experts measure what is fastest for {MOST_KINDS} kinds of calls, no more.")
            return Turn(ways[0])
        text = " ".join(map(str, kind))
        known = _read().get(text)
        contest = _contests[kind] = Contest(text, ways, known if known in ways else None)
    if contest.winner is not None or torch._C._current_graph_task_id() != -1:
        return Turn(contest.winner or contest.ways[0], contest)
    return Turn(contest.next_way(), contest, rows)


_contests: dict[tuple[Hashable, ...], Contest] = {}
_is_fixed = ContextVar("_is_fixed", default=False)


@contextmanager
def fixed_choice() -> Iterator[None]:
    """Inside, the first way computes every call, so that outputs that are kept or compared are the same bits."""
    token = _is_fixed.set(True)
    try:
        yield
    finally:
        _is_fixed.reset(token)


def cache_file() -> Path:
    """The winners of this machine, or of another one with as many processors of the same kind."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("HF_SPARSE_MOE_CACHE") or f"{caches}/hf_sparse_moe"
    return Path(folder).expanduser() / f"fastest-{_machine()}.json"


@cache
def _machine() -> str:
    names = (platform.machine(), str(os.cpu_count()), *sorted(cpu_flags()))
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]


@cache
def cpu_flags() -> frozenset[str]:
    """What the processor knows, by /proc/cpuinfo; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split()[2:])


def _read() -> dict[str, str]:
    """The winners by kind; none of a file that this version did not write."""
    path = cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] == VERSION:
            return {str(kind): str(way) for kind, way in content["winners"].items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning_once(f"`{path}` cannot be read ({error!r}): the experts measure again what is fastest.")
    return {}


def _write(kind: str, winner: str) -> None:
    """Add a winner to the file. Of two processes that write at once, one may lose what it measured."""
    path = cache_file()
    content = {"version": VERSION, "winners": _read() | {kind: winner}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning_once(f"What is fastest on this machine cannot be kept in `{path}` ({error}).")
