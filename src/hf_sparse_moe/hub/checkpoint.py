"""What a card is made from: a mixture in memory, or the files of a checkpoint without its weights in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hf_sparse_moe.checkpoints.config import read_mixture_config
from hf_sparse_moe.checkpoints.files import read_json, write_whole
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles
from hf_sparse_moe.insight.anatomy import model_without_weights
from hf_sparse_moe.insight.pictures import plot_expert_load
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.routing.statistics import RoutingStatistics


RECORD_NAME = "training_record.json"
ROUTING_NAME = "routing_statistics.json"
PICTURE_NAME = "expert_load.png"


@dataclass(frozen=True)
class Checkpoint:
    """A mixture and the files beside its weights, which may come from someone else's repository, and be anything."""

    model: SparseMoePreTrainedModel  # its parameters may lie on the meta device
    dtype: str  # of the weights; several are joined by commas
    receipt: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)  # of `ModelCardCallback`
    routing: Mapping[str, Any] = field(default_factory=dict)  # of `save_routing_statistics`
    has_picture: bool = False  # expert_load.png


def checkpoint_in_memory(
    model: SparseMoePreTrainedModel, record: Mapping[str, Any] | None = None, routing: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A model as a [`Checkpoint`]; raises a `ValueError` for a model of another package."""
    if not isinstance(model, SparseMoePreTrainedModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}; a card can be made for the classes of hf_sparse_moe. Load it with "
            "`from_pretrained` after `import hf_sparse_moe` and without `trust_remote_code`."
        )
    dtype, receipt = str(model.dtype).removeprefix("torch."), mapping(model.receipt)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # ZeRO-3 leaves them without their shapes
        config: Any = model.config
        model = model_without_weights(config)
    return Checkpoint(model, dtype, receipt, mapping(record), mapping(routing))


def read_checkpoint(folder: str | Path, *, with_weights: bool = True) -> Checkpoint:
    """
    A folder as a [`Checkpoint`]. Of the weights only the headers are read, and compared with the config; where they
    need not be there (`with_weights=False`), their dtype is the config's. Raises a `ValueError` for no mixture, a file
    that cannot be read, or weights that the config does not describe.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder. Pass the folder of a saved mixture.")
    model = model_without_weights(read_mixture_config(folder))
    dtype = str(model.config.dtype or "").removeprefix("torch.")
    if with_weights:
        try:
            tensors = TensorFiles(sorted(folder.glob("*.safetensors")))
        except NotStreamableError as error:
            raise ValueError(f"`{folder}` has weights that torch cannot read: {error}.") from error
        if not tensors.names:
            raise ValueError(f"`{folder}` has no *.safetensors, so there is nothing to write a card about.")
        _check_shapes(folder, model, {name: tensors.shape(name) for name in tensors.names})
        dtype = ", ".join(sorted({str(tensors.dtype(name)).removeprefix("torch.") for name in tensors.names}))
    names = (RECEIPT_NAME, RECORD_NAME, ROUTING_NAME)
    receipt, record, routing = (read_json(folder / name, optional=True) for name in names)
    return Checkpoint(model, dtype, receipt, record, routing, (folder / PICTURE_NAME).is_file())


def save_routing_statistics(statistics: RoutingStatistics, folder: str | Path) -> Path:
    """
    Write what [`routing_statistics`] found beside a checkpoint's weights, for its card: `routing_statistics.json` and,
    where matplotlib is installed, the picture `expert_load.png`.

    Returns:
        `Path`: the JSON file.
    """
    path = Path(folder) / ROUTING_NAME
    write_whole(path, json.dumps(statistics.to_dict(), indent=2) + "\n")
    if find_spec("matplotlib") is not None:
        plot_expert_load(statistics, path.with_name(PICTURE_NAME))
    return path


def mapping(value: object) -> Mapping[str, Any]:
    """The value, where it is a mapping; else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _check_shapes(folder: Path, model: SparseMoePreTrainedModel, shapes: Mapping[str, list[int]]) -> None:
    expected: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    for name, shape in shapes.items():
        if name not in expected or list(expected[name].shape) != list(shape):
            wanted = tuple(expected[name].shape) if name in expected else "none of that name"
            raise ValueError(
                f"`{folder}` does not fit together: its weights hold `{name}` of shape {tuple(shape)}, its config "
                f"describes {wanted}. Save the model again."
            )
    stored = {id(expected[name]) for name in shapes}  # tied tensors are stored once
    if missing := next((name for name, tensor in expected.items() if id(tensor) not in stored), None):
        raise ValueError(f"`{folder}` does not fit together: its weights lack `{missing}`. Save the model again.")
