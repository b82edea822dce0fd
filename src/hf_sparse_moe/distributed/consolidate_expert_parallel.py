"""The weights in a checkpoint whose ranks each wrote safetensors of their own, as expert parallelism does."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from safetensors import safe_open

from hf_sparse_moe.checkpoints.reader import TensorFiles

from .consolidate_parts import Chunk, StoredTensor, incomplete


PATTERN = "shard-*.safetensors"


def expert_parallel_tensors(folder: Path) -> dict[str, StoredTensor]:
    """
    The tensors in the files `shard-00001-model-00001-of-00001.safetensors` that
    `save_pretrained(distributed_checkpoint=True)` of transformers writes, by their keys.

    Raises:
        ValueError: a file that is missing, cut short, or does not say where its tensors belong.
    """
    chunks: dict[str, list[Chunk]] = {}
    dtypes = {}
    for path in sorted(folder.glob(PATTERN)):
        files, begins = TensorFiles([path]), _offsets(path)
        for name in files.names:
            if name not in begins:
                raise incomplete(folder, f"`{path.name}` does not say where its `{name}` belongs")
            dtypes[name] = files.dtype(name)
            read = partial(files.pieces, name, dtypes[name])
            chunks.setdefault(name, []).append(Chunk(begins[name], tuple(files.shape(name)), read))
    found = {}
    for name, parts in chunks.items():
        ends = [[begin + size for begin, size in zip(*part[:2], strict=True)] for part in parts]
        found[name] = StoredTensor.from_chunks([max(end) for end in zip(*ends, strict=True)], dtypes[name], parts)
    return found


def plain_tensors(paths: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint that is a normal one already."""
    files, found = TensorFiles(paths), {}
    for name in files.names:
        shape, dtype = tuple(files.shape(name)), files.dtype(name)
        chunk = Chunk((0,) * len(shape), shape, partial(files.pieces, name, dtype))
        found[name] = StoredTensor.from_chunks(shape, dtype, [chunk])
    return found


def _offsets(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        placed = json.loads(metadata["DCP_SHARDING_INFO"])
        return {name: tuple(map(int, place["saved_offsets"])) for name, place in placed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise incomplete(path.parent, f"`{path.name}` does not say where its tensors belong") from error
