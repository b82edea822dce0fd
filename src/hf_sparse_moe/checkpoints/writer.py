"""Safetensors written in pieces, in any order, with nothing of them in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


# The format's own names (https://github.com/huggingface/safetensors).
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WRITE_BYTES = 2**20  # one call's; larger ones have the kernel look for larger pages, which takes longer


class ShardWriter:
    """
    Writes a model's tensors as `model.safetensors`, or as numbered shards with their index.

    A shard has another name until all its bytes are on the disk, so that one with its own name is finished, whatever
    happens to the process or the machine.

    Args:
        folder (`Path`): Where to; shards that are finished there are not written again.
        tensors (`Mapping[str, torch.Tensor]`): Every tensor in its order, without storage.
        max_shard_size (`int` or `str`): As `save_pretrained` takes it; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: int | str):
        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self.folder = folder
        self.shards = {name: _Shard(folder / name, keys, tensors) for name, keys in split.filename_to_tensors.items()}
        self.total_bytes = sum(shard.size for shard in self.shards.values())
        self._shard_of = {key: self.shards[name] for name, shard in self.shards.items() for key in shard.begins}
        self._weight_map = split.tensor_to_filename
        self._total_parameters = sum(tensor.numel() for tensor in tensors.values())
        self._disk = ThreadPoolExecutor(max_workers=1)  # waits for the disk while the next shard is made
        self._finishing: Future | None = None
        self._one_finishes = Lock()

    @property
    def missing_bytes(self) -> int:
        """What is still to be written."""
        return sum(shard.size for shard in self.shards.values() if not shard.path.exists())

    def wants(self, key: str) -> bool:
        """Whether the tensor is still to be written."""
        return not self._shard_of[key].finished

    def write(self, key: str, piece: torch.Tensor, begin: int = 0) -> int:
        """Write a piece of a tensor, from its byte `begin` on, in any thread; returns how many bytes that are."""
        shard = self._shard_of[key]
        data = memoryview(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if shard.write(key, data, begin):
            self._finish(shard)
        return len(data)

    def close(self) -> None:
        """Wait for the disk, and write the index if there are several shards."""
        for shard in self.shards.values():
            if shard.size == 0 and not shard.finished:  # nothing was written to it
                self._finish(shard)
        self._wait()
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_parameters": self._total_parameters, "total_size": self.total_bytes},
                "weight_map": self._weight_map,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

    def _finish(self, shard: _Shard) -> None:
        with self._one_finishes:
            self._wait()  # so that no more than one shard waits for the disk
            self._finishing = self._disk.submit(shard.finish)

    def _wait(self) -> None:
        if self._finishing is not None:
            self._finishing.result()

    def abandon(self) -> None:
        """Let go of the files, as they are."""
        self._disk.shutdown()
        for shard in self.shards.values():
            shard.close()


class _Shard:
    """One file: 8 bytes with the header's length, the header in JSON, the tensors one after the other."""

    def __init__(self, path: Path, keys: list[str], tensors: Mapping[str, torch.Tensor]):
        self.path = path
        self.begins: dict[str, int] = {}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for key in sorted(keys, key=lambda key: -tensors[key].element_size()):  # which keeps every one aligned
            tensor = tensors[key]
            end = begin + tensor.numel() * tensor.element_size()
            header[key] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            self.begins[key] = begin
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.size = begin
        self.finished = path.exists()
        self.left = 0 if self.finished else begin
        self._file: BinaryIO | None = None
        self._lock = Lock()

    def write(self, key: str, data: memoryview, begin: int) -> bool:
        """Returns whether these were the last bytes that the shard lacked."""
        file, place = self._open(), len(self._head) + self.begins[key] + begin
        for start in range(0, len(data), WRITE_BYTES):
            _write_all(file, data[start : start + WRITE_BYTES], place + start)
        with self._lock:
            self.left -= len(data)
            return self.left == 0

    def finish(self) -> None:
        """Have the disk hold the file, then give it its name."""
        file = self._open()
        os.fsync(file.fileno())
        self.close()
        os.replace(self._part, self.path)
        self.finished = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def _open(self) -> BinaryIO:
        with self._lock:
            if self._file is None:
                self._file = self._part.open("wb", buffering=0)
                self._file.write(self._head)
            return self._file


def _write_all(file: BinaryIO, data: memoryview, place: int) -> None:
    while data:  # a disk that fills up takes a part first, and says so at the next call
        written = os.pwrite(file.fileno(), data, place)
        data, place = data[written:], place + written
