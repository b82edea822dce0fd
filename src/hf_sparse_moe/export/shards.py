"""Safetensors written as the tensors come, one shard in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


class ShardWriter:
    """
    Writes `model.safetensors`, or numbered shards with their index, into a folder.

    Args:
        folder (`Path`): Where to.
        max_shard_bytes (`int`): A shard is written before a tensor would make it larger.
    """

    def __init__(self, folder: Path, max_shard_bytes: int):
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it is written at the latest by [`close`]."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.max_shard_bytes:
            self._write()
        self.pending[name] = tensor
        self.pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write the last shard, give the shards their final names, and write the index if there are several."""
        self._write()
        count = len(self.shards)
        if count == 1:
            self._part(1).rename(self.folder / WEIGHTS_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards, start=1):
            file_name = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        if not self.pending:
            return
        self.shards.append(list(self.pending))
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.pending.items()}
        save_file(tensors, self._part(len(self.shards)), metadata={"format": "pt"})
        self.pending, self.pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"
