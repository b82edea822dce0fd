"""A stock mixture in this package's names, read from its files tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from hf_sparse_moe.checkpoints.config import read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.converting import ModelTensors
from hf_sparse_moe.checkpoints.reader import loaded_dtypes, stored_dtype
from hf_sparse_moe.checkpoints.source import Source
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.upcycling.conversion import set_dtype

from .fit import empty_model
from .from_stock import class_of, import_facts, layers_of, our_block, row_of, sparse_config
from .tensors import SCORE_BIAS, in_layer, our_name, places_of


class StockTensors:
    """
    What [`import_stock`] would make of a checkpoint, without storage (`sparse`), and what reads its tensors as
    [`DenseTensors`] reads those of a checkpoint. `stock_config` is the checkpoint's.

    Raises:
        ValueError: as [`import_stock`], and for an incomplete checkpoint.
        NotStreamableError: its files hold the model in a form that must be loaded.
    """

    def __init__(self, source: Source, stock_config: Any):
        self._row = row_of(stock_config)
        stock_config = copy.deepcopy(stock_config)
        with sensible_config(source):
            self.dtype: torch.dtype = stock_config.dtype or stored_dtype(source)
            set_dtype(stock_config, self.dtype)
            stock = empty_model(stock_config)
        self._state = ModelTensors(source, stock, self.dtype)
        layers = layers_of(self._row, self._state)
        self._config: Any = sparse_config(self._row, stock.config, self._state, layers, {})
        set_dtype(self._config, self.dtype)
        with torch.device("meta"):
            sparse: Any = class_of(stock.config)._from_config(self._config, dtype=self.dtype)
        sparse.receipt = import_facts(sparse, {})
        if sparse.can_generate():
            sparse.generation_config = read_generation_config(source.folder) or stock.generation_config
        self.sparse: SparseMoePreTrainedModel = sparse
        self._dtypes = loaded_dtypes(sparse, self.dtype)
        self._layers = {f"dense.{layer}.{self._row.feed_forward}": layer for layer in layers}
        self._outside = {our_name(self._row, name): name for name in self._state}
        if self._row.score_bias_name:  # what cannot be read is refused before anything is written
            for block in self._layers:
                self._read_block(block, SCORE_BIAS)

    def reader(self, reuse: bool = False) -> Callable[[str], torch.Tensor]:
        """A function that reads a tensor by the name that it has in `sparse`."""
        return self._read

    def _read(self, key: str) -> torch.Tensor:
        block = next((block for block in self._layers if key.startswith(f"{block}.")), None)
        if block is None:
            tensor = self._state[self._outside[key]]
        else:
            tensor = self._read_block(block, key.removeprefix(f"{block}."))[key.removeprefix(f"{block}.")]
        return tensor.to(self._dtypes[key])

    def _read_block(self, block: str, ours: str) -> dict[str, torch.Tensor]:
        """A tensor of a block, among others."""
        layer = self._layers[block]
        names = [f"{layer}.{name}" for name in places_of(self._row, ours, self._config.num_experts)]
        tensors = {name: self._state[name] for name in names if name in self._state}
        return our_block(self._row, self._config, in_layer(tensors, layer))[0]
