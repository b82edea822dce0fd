"""Safetensors written in pieces, in any order, with nothing of them in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}
_WRITE_BYTES = 2**20  # one call's; larger ones have the kernel look for larger pages, which takes longer


class ShardWriter:
    """
    Writes a model's tensors as `model.safetensors`, or as numbered shards with their index.

    A shard has another name until all its bytes are on the disk, so that one with its own name is finished, whatever
    happens to the process or the machine; it is not written again. The `tensors` may have no storage.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: int | str):
        split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self.folder = folder
        self.shards = {name: _Shard(folder / name, keys, tensors) for name, keys in split.filename_to_tensors.items()}
        self.total_bytes = sum(shard.size for shard in self.shards.values())
        self._weight_map = split.tensor_to_filename
        self._total_parameters = sum(tensor.numel() for tensor in tensors.values())

    @property
    def missing_bytes(self) -> int:
        """What is still to be written."""
        return sum(shard.size for shard in self.shards.values() if not shard.finished)

    def wants(self, key: str) -> bool:
        """Whether the tensor is still to be written."""
        return not self.shards[self._weight_map[key]].finished

    def write(self, key: str, piece: torch.Tensor, begin: int = 0) -> int:
        """Write a piece of a tensor, from its byte `begin` on, in any thread; returns how many bytes that are."""
        data = memoryview(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.shards[self._weight_map[key]].write(key, data, begin)
        return len(data)

    def close(self) -> None:
        """Finish the shards that nothing was written to, and write the index if there are several."""
        for shard in self.shards.values():
            if shard.size == 0 and not shard.finished:
                shard.finish()
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_parameters": self._total_parameters, "total_size": self.total_bytes},
                "weight_map": self._weight_map,
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Let go of the files, as they are."""
        for shard in self.shards.values():
            shard.close()


class _Shard:
    """One file: 8 bytes with the header's length, the header in JSON, the tensors one after the other."""

    def __init__(self, path: Path, keys: list[str], tensors: Mapping[str, torch.Tensor]):
        self.path, self._part = path, path.with_name(f"{path.name}.part")
        self.begins: dict[str, int] = {}
        self.size = 0
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        for key in sorted(keys, key=lambda key: -tensors[key].element_size()):  # which keeps every one aligned
            tensor, begin = tensors[key], self.size
            self.size += tensor.nbytes
            self.begins[key] = begin
            header[key] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, self.size],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.finished = path.exists()
        self._left = self.size
        self._file: int | None = None
        self._lock = Lock()

    def write(self, key: str, data: memoryview, begin: int) -> None:
        file, place, size = self._open(), len(self._head) + self.begins[key] + begin, len(data)
        while data:  # a disk that fills up takes a part first, and says so at the next call
            written = os.pwrite(file, data[:_WRITE_BYTES], place)
            data, place = data[written:], place + written
        with self._lock:
            self._left -= size
            is_last = self._left == 0
        if is_last:
            self.finish()

    def finish(self) -> None:
        """Have the disk hold the file, then give it its name."""
        os.fsync(self._open())
        self.close()
        os.replace(self._part, self.path)
        self.finished = True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                os.write(self._file, self._head)
            return self._file
