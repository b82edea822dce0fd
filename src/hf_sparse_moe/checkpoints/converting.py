"""The tensors of a checkpoint as its model has them, whose files may hold them in another form; read one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from .config import sensible_config
from .reader import NotStreamableError, TensorFiles, check_complete, loaded_dtypes, model_keys, tie
from .source import Source, weight_files


class _Stored(NamedTuple):
    """What one or more tensors of the model are made of: names in the files, with their part in the conversion."""

    key: str
    names: list[tuple[str, str]]
    converter: WeightConverter | None

    def made(self, model: PreTrainedModel, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.converter is None:
            return {self.key: read(self.names[0][0])}
        converter: Any = copy.deepcopy(self.converter)  # it keeps what it is given
        for name, pattern in self.names:
            converter.add_tensor(self.key, name, pattern, read(name))
        made = converter.convert(self.key, model=model, config=model.config)
        return {key: tensor[0] if isinstance(tensor, list) else tensor for key, tensor in made.items()}


class ModelTensors(Mapping[str, torch.Tensor]):
    """
    The tensors that `model.state_dict()` would hold were the checkpoint loaded in `dtype`, tied ones once, by
    transformers' own rules. Each is read when it is asked for, and not kept. `model` has no storage.

    Raises:
        ValueError: a missing weight, or one of another shape.
        NotStreamableError: two tensors for one weight, or one that loading computes.
    """

    def __init__(self, source: Source, model: PreTrainedModel, dtype: torch.dtype):
        self._model, self._files = model, TensorFiles(weight_files(source))
        self._dtypes = loaded_dtypes(model, dtype)
        stored: dict[str, _Stored] = {}
        for key, name, converter, pattern in model_keys(self._files.names, model):
            if converter is None and key in stored:
                raise NotStreamableError(f"`{name}` and `{stored[key].names[0][0]}` are the same weight of the model")
            stored.setdefault(key, _Stored(key, [], converter)).names.append((name, pattern))
        names = {key: each.names[0][0] for key, each in stored.items() if each.converter is None}
        tie(names, self._files, model)
        stored |= {key: _Stored(key, [(name, "")], None) for key, name in names.items()}
        with sensible_config(source):
            made = {key: each.made(model, self._without_storage) for key, each in stored.items()}
        self._stored = {key: stored[first] for first, tensors in made.items() for key in tensors}
        shapes = {key: list(tensor.shape) for tensors in made.values() for key, tensor in tensors.items()}
        check_complete(source, model, shapes)
        for key in model.all_tied_weights_keys:
            self._stored.pop(key, None)

    def __getitem__(self, key: str) -> torch.Tensor:
        stored = self._stored[key]
        return stored.made(self._model, lambda name: self._files.read(name, self._dtypes[stored.key]))[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, key: object) -> bool:
        return key in self._stored

    def _without_storage(self, name: str) -> torch.Tensor:
        return torch.empty(self._files.shape(name), dtype=self._files.dtype(name), device="meta")
