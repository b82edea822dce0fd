"""Other processes for a test: as ranks of a process group, or killed at any moment."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch


PATIENCE = 100.0  # seconds
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"}  # of Python's audit events
# Forks of a process that has imported these packages and started no thread: a fork of pytest's own may hang in OpenMP.
_PROCESSES = get_context("forkserver")
_PROCESSES.set_forkserver_preload(["peft", "transformers.trainer", "hf_sparse_moe.adapters", "hf_sparse_moe.routing"])


def in_processes(ranks: int, function: Callable, *arguments, **named) -> list[int]:
    """
    Run a function of a module as so many ranks, each in a process of its own; returns their exit codes (-9 is a
    SIGKILL).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        _PROCESSES.Process(target=_rank, args=(rank, ranks, port, function, arguments, named)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    assert not stuck, f"{len(stuck)} of {ranks} ranks hung for {PATIENCE} s"
    return [process.exitcode for process in processes]


def kill_at_file(folder: Path, number: int) -> None:
    """SIGKILL to this process at the `number`-th file that it opens, makes, moves or removes in `folder`, from 0."""
    operations = itertools.count()

    def look(event: str, arguments: tuple) -> None:
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(str(folder)) and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def anonymous_bytes() -> int:
    """Of this process; pages of a mapped file, which the system may drop, are not in it. Linux alone."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that this process holds during a call, beside what it held before."""
    gc.collect()
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def _rank(rank: int, ranks: int, port: int, function: Callable, arguments: tuple, named: dict) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if ranks > 1:
        os.environ["LOCAL_RANK"] = str(rank)  # its presence is what makes a training a distributed one
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before the fork is no garbage
    function(*arguments, **named)
