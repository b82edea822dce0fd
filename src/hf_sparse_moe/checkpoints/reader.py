"""The tensors of a dense checkpoint, by the dense model's keys, read piece by piece."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import str_to_torch_dtype

from .source import Source, missing_weight, tensor_names, weight_files


PIECE_BYTES = 2**20  # small enough for a processor's cache


class NotStreamableError(Exception):
    """The checkpoint must be loaded as a model; the message says why."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: torch.dtype
    shape: list[int]
    begin: int  # in the file

    @property
    def elements(self) -> int:
        return prod(self.shape)


class TensorFiles:
    """
    The tensors of some safetensors files. Nothing is mapped into memory: what was read is gone with its tensor, and a
    file that is cut short ends in an error and not in a signal.
    """

    def __init__(self, paths: list[Path]):
        self._entries: dict[str, _Entry] = {}
        for path in paths:
            tensor_names(path)  # holds the header against the file's size and itself
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if entry["dtype"] not in str_to_torch_dtype:
                    raise NotStreamableError(f"`{name}` is stored as {entry['dtype']}")
                begin = 8 + length + entry["data_offsets"][0]
                self._entries[name] = _Entry(path, str_to_torch_dtype[entry["dtype"]], entry["shape"], begin)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> list[int]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def pieces(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The elements of one tensor in their order, flat, about `PIECE_BYTES` at a time."""
        entry = self._entries[name]
        left, size = entry.elements, PIECE_BYTES // entry.dtype.itemsize
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            while left:
                piece = torch.empty(min(left, size), dtype=entry.dtype)
                _fill(piece, file)
                left -= len(piece)
                yield piece.to(dtype)

    def read(self, name: str, dtype: torch.dtype | None = None, memory: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, in its own dtype or another, in new memory or in bytes that are there."""
        entry, dtype = self._entries[name], dtype or self.dtype(name)
        size = entry.elements * dtype.itemsize
        memory = torch.empty(size, dtype=torch.uint8) if memory is None else memory
        tensor = memory[:size].view(dtype)
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            for part in tensor.split(PIECE_BYTES // entry.dtype.itemsize):
                piece = part if dtype == entry.dtype else torch.empty(part.shape, dtype=entry.dtype)
                _fill(piece, file)
                if piece is not part:
                    part.copy_(piece)
        return tensor.reshape(entry.shape)

    def take(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of one tensor, given a slice for each dimension; the exception to the rule above: it is mapped."""
        with safe_open(self._entries[name].path, framework="pt") as file:
            return file.get_slice(name)[index]

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        kind, others = ((self.dtype(each), self.shape(each)) for each in (name, other))
        pieces = (self.pieces(each, self.dtype(each)) for each in (name, other))
        return kind == others and all(torch.equal(*pair) for pair in zip(*pieces, strict=True))


class DenseTensors:
    """
    The tensors that `dense.state_dict()` would hold were the checkpoint loaded in `dtype`, tied ones once. `dense` has
    no storage. Raises a `ValueError` for a missing weight or one of another shape, and a `NotStreamableError` where
    loading does more than renaming.
    """

    def __init__(self, source: Source, dense: PreTrainedModel, dtype: torch.dtype):
        self._files = TensorFiles(weight_files(source))
        self._dtypes = loaded_dtypes(dense, dtype)
        self._names = _renamed(self._files.names, dense)
        tie(self._names, self._files, dense)
        check_complete(source, dense, {key: self._files.shape(name) for key, name in self._names.items()})
        self._memory: tuple[list[torch.Tensor], ...] = ([], [])

    def reader(self, reuse: bool = True) -> Callable[..., torch.Tensor]:
        """
        A function that reads a tensor by its key, or by several keys those tensors one below the other. With `reuse`
        the next reader but one takes the memory of what this one read: memory that is new to a process costs it more
        time than the reading.
        """
        memory: list[torch.Tensor] = self._memory[0] if reuse else []
        if reuse:
            self._memory = self._memory[::-1]
        position = itertools.count()

        def read(*keys: str) -> torch.Tensor:
            names, dtype, place = [self._names[key] for key in keys], self._dtypes[keys[0]], next(position)
            shapes = [self._files.shape(name) for name in names]
            sizes = [prod(shape) * dtype.itemsize for shape in shapes]
            if place == len(memory) or len(memory[place]) < sum(sizes):
                memory[place : place + 1] = [torch.empty(sum(sizes), dtype=torch.uint8)]
            whole = memory[place][: sum(sizes)]
            parts = zip(names, whole.split(sizes), strict=True)
            tensors = [self._files.read(name, dtype, part) for name, part in parts]
            return tensors[0] if len(tensors) == 1 else whole.view(dtype).reshape(-1, *shapes[0][1:])

        return read

    def pieces(self, key: str) -> Iterator[torch.Tensor]:
        return self._files.pieces(self._names[key], self._dtypes[key])

    def take(self, key: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor, given a slice for each dimension. Mapped, where it is stored in its dtype."""
        return self._files.take(self._names[key], index).to(self._dtypes[key])


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What `from_pretrained(dtype=dtype)` gives each tensor of a model that was built in `dtype`."""
    dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    plan = model._get_dtype_plan(dtype)
    if plan:
        kept, by_group, _ = build_glob_alternation(list(plan))
        for key in dtypes:
            match = kept.search(key)
            if match is not None and match.lastgroup is not None:
                dtypes[key] = plan[by_group[match.lastgroup]]
    return dtypes


def stored_dtype(source: Source) -> torch.dtype:
    """The first floating-point dtype in a checkpoint, which is the model's where the config names none."""
    files = TensorFiles(weight_files(source)[:1])
    return next((dtype for name in files.names if (dtype := files.dtype(name)).is_floating_point), torch.float32)


def model_keys(names: list[str], model: PreTrainedModel) -> Iterator[tuple[str, str, WeightConverter | None, str]]:
    """
    For each name in a checkpoint that has a place in the model, by transformers' own rules: the model's key, the name,
    and where the model has another form of it, what converts it and the name's part in that.
    """
    state, prefix = model.state_dict(), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key in state:
            yield key, name, None if pattern is None else by_pattern[pattern], pattern or ""


def tie(names: dict[str, str], files: TensorFiles, model: PreTrainedModel) -> None:
    """
    Tied weights may be stored under any of their names, given by the model's keys; raises a `NotStreamableError` where
    they are stored twice and different, and thus not tied.
    """
    groups: dict[str, list[str]] = {}
    for target, first in model.all_tied_weights_keys.items():
        groups.setdefault(first, [first]).append(target)
    for first, keys in groups.items():
        stored = [key for key in keys if key in names]
        if any(not files.equal(names[stored[0]], names[key]) for key in stored[1:]):
            raise NotStreamableError(f"`{stored[0]}` and `{stored[1]}` should be one weight, but differ")
        if stored:
            names[first] = names[stored[0]]


def check_complete(source: Source, model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> None:
    """
    Raise where a checkpoint, given the shapes of what it holds by the model's keys, lacks a weight, has one of another
    shape (`ValueError`), or one that transformers computes (`NotStreamableError`).
    """
    state = model.state_dict()
    missing = sorted(state.keys() - shapes.keys() - model.all_tied_weights_keys.keys())
    computed = model._keys_to_ignore_on_load_missing or []
    for key in missing:
        if not any(re.search(pattern, key) for pattern in computed):
            raise missing_weight(source.name, model, key)
    if missing:
        raise NotStreamableError(f"`{missing[0]}` is not stored but computed")
    for key, shape in shapes.items():
        if shape != list(state[key].shape):
            raise ValueError(
                f"`{key}` has the shape {shape} in `{source.name}`, but its config.json asks for "
                f"{list(state[key].shape)}. Pass a checkpoint whose config and weights belong together."
            )


def _renamed(names: list[str], dense: PreTrainedModel) -> dict[str, str]:
    """The checkpoint's name of each of the model's keys."""
    found: dict[str, str] = {}
    for key, name, converter, _ in model_keys(names, dense):
        if converter is not None:
            raise NotStreamableError(f"`{name}` is stored in another form than the model has it")
        if key in found:
            raise NotStreamableError(f"`{name}` and `{found[key]}` are the same weight of the model")
        found[key] = name
    return found


def _fill(piece: torch.Tensor, file: FileIO) -> None:
    data = memoryview(piece.view(torch.uint8).numpy().data)
    if file.readinto(data) != len(data):
        raise ValueError(f"`{file.name}` was cut short while it was read. Fetch it again.")
