"""What the benchmarks share: interleaved timing, memory, and the results file of this device."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_sparse_moe.experts import tuning


# No choice of an earlier run counts.
os.environ.setdefault("HF_SPARSE_MOE_CACHE", tempfile.mkdtemp())
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))
# Untimed and timed calls of a contender in a row, where a call asks for much fresh memory: see `interleave`.
SETTLE, TURN = 1, 2
INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "asimd": "NEON",
}
# They change the times: how torch asks for memory (in huge pages, where 1), and how many threads there are.
ENVIRONMENT = ("THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD")


def device_name(device: str) -> str:
    """The name of the processor as its maker writes it, and for a CPU its instructions and the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    instructions = [title for flag, title in INSTRUCTIONS.items() if flag in tuning.cpu_flags()][:1]
    return ", ".join([name, *instructions, f"{torch.get_num_threads()} threads"])


def file_name(device: str) -> str:
    """Of [`device_name`], what a file may be called."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def settle(call: Callable[[int], Any]) -> None:
    """Until ours has measured which way is the fastest here."""
    for number in range(40):
        call(10**6 + number)
        if all(contest.winner for contest in tuning._contests.values()):
            break


def interleave(
    contenders: dict[Any, Callable[[int], Any]],
    device: str,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    turn: int = 1,
    settle: int = 0,
) -> dict[Any, float]:
    """
    The median seconds of each contender, each called with the number of its call, from 0.

    A round gives each a turn of `turn` timed calls, so that what slows the machine for a while slows all of them. The
    `settle` calls before them are not timed: they meet the caches, those of compiled products among them, and the free
    memory as others left them, and a hypervisor may have taken back what was free for some seconds, all of which a
    training loop does not meet. Where a call asks for hundreds of megabytes, a whole turn after others that asked for
    little may take several times as long: each round begins with another contender, so that it is not always the same
    one's. With one thread, `time.process_time` as `clock` counts nobody else's work.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in contenders}
    names, calls = list(contenders), settle + turn
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for part in range(calls):
                synchronize(device)
                start = clock()
                contenders[name](number * calls + part)
                synchronize(device)
                if number >= warmup and part >= settle:
                    seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def saved_bytes(forward: Callable[[], torch.Tensor], without: Sequence[torch.Tensor]) -> int:
    """What autograd keeps between forward and backward, each storage once, without those of `without`."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    total = sum(size for storage, size in storages.items() if storage not in known)
    del output
    return total


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that `call` held at once beyond what there was before it: on a CPU by the system's own count."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from here
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def save(section: str, device: str, content: dict[str, Any]) -> Path:
    """Write `content` as a section of the device's results file; the file's other sections stay."""
    path = RESULTS / f"{file_name(device)}.json"
    results = json.loads(path.read_text()) if path.is_file() else {"device": device_name(device)}
    results[section] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *(part.removeprefix(f"{Path.cwd()}/") for part in sys.argv)]),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers")},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        **content,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path
