"""The weights in a checkpoint that FSDP wrote: sharded by `torch.distributed.checkpoint`, or one `.bin` file."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .consolidate_parts import Chunk, Run, StoredTensor, incomplete


PREFIX = "model."  # accelerate saves {"model": state_dict}
_FILE_NAME = re.compile(r"[A-Za-z0-9_]+\.distcp")
# All that `torch.distributed.checkpoint` itself puts into its metadata. A pickle that names anything else is refused:
# it could run code.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names `{module}.{name}`, which is none of its own types")


def sharded_tensors(folder: Path) -> dict[str, StoredTensor]:
    """
    The model's tensors in a folder `pytorch_model_fsdp_0`, by their keys.

    Raises:
        ValueError: metadata that cannot be read or would run code, a file that is missing or cut short.
    """
    metadata = _read_metadata(folder / ".metadata")
    chunks: dict[str, list[Chunk]] = {}
    for index, place in metadata.storage_data.items():
        described = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(described, TensorStorageMetadata):
            file = _file(folder, place)
            offsets = tuple(index.offset or (0,) * len(described.size))
            sizes = next((tuple(chunk.sizes) for chunk in described.chunks if tuple(chunk.offsets) == offsets), None)
            if sizes is None:
                raise incomplete(folder, f"its metadata does not describe a part of `{index.fqn}`")
            chunks.setdefault(index.fqn, []).append(Chunk(offsets, sizes, partial(_read, file, place, sizes)))
    found = {}
    for key, described in metadata.state_dict_metadata.items():
        if isinstance(described, TensorStorageMetadata):
            found[key.removeprefix(PREFIX)] = StoredTensor.from_chunks(
                described.size, described.properties.dtype, chunks.get(key, [])
            )
    return found


def full_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors in `pytorch_model_fsdp.bin`, by their keys."""
    weights = load_pickle(path)
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise incomplete(path, "it holds more than tensors")
    return {key: in_memory(tensor) for key, tensor in weights.items()}


def in_memory(tensor: torch.Tensor) -> StoredTensor:
    """One that is there already, or mapped from a file."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, [Run(0, tensor.numel(), lambda: [tensor])])


def load_pickle(path: Path, types: Iterable[tuple[Callable, str]] = ()) -> dict[str, Any]:
    """
    What `torch.save` wrote, mapped into memory and not read; nothing in it can run code.

    Args:
        types (`Iterable[tuple[Callable, str]]`): Stand-ins for other packages' types, and those types' names.
    """
    try:
        with torch.serialization.safe_globals(list(types)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"names `{name[1]}`" if name else "is no file of tensors"
        raise ValueError(
            f"`{path}` {reason}, and could run code when it is read: it is refused. Consolidate it with the engine's "
            "own tool if you trust where it comes from."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise incomplete(path, "it is cut short") from error


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise incomplete(path.parent, "it has no .metadata, which is written last") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise incomplete(
            path.parent, f"its .metadata cannot be read ({' '.join(str(error).split())[:200]})"
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise incomplete(path.parent, "its .metadata describes no tensors")
    return metadata


def _file(folder: Path, place: _StorageInfo) -> Path:
    path = folder / place.relative_path
    if _FILE_NAME.fullmatch(place.relative_path) is None:
        raise incomplete(folder, f"its metadata names the file `{place.relative_path}`")
    if not path.is_file():
        raise incomplete(folder, f"it lacks `{path.name}`")
    if path.stat().st_size < place.offset + place.length:
        raise incomplete(folder, f"`{path.name}` is cut short")
    return path


def _read(path: Path, place: _StorageInfo, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    with path.open("rb") as file:
        file.seek(place.offset)
        data = io.BytesIO(file.read(place.length))
    try:
        tensor = torch.load(data, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise incomplete(path.parent, f"a tensor in `{path.name}` cannot be read") from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != sizes:
        raise incomplete(path.parent, f"a tensor in `{path.name}` is not the one that its metadata describes")
    return [tensor]
