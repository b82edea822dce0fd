"""What a card is made from: a mixture in memory, or the files of a checkpoint without its weights in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_sparse_moe.checkpoints.config import read_config, read_mixture_config
from hf_sparse_moe.checkpoints.files import MODULES_NAME, read_json, write_whole
from hf_sparse_moe.checkpoints.loading import model_without_weights
from hf_sparse_moe.checkpoints.source import named_architecture
from hf_sparse_moe.insight.pictures import plot_expert_load
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.routing.statistics import RoutingStatistics
from hf_sparse_moe.upcycling.surgery_checks import last_surgery


RECORD_NAME = "training_record.json"
ROUTING_NAME = "routing_statistics.json"
PICTURE_NAME = "expert_load.png"


@dataclass(frozen=True)
class Checkpoint:
    """A mixture and the files beside its weights, which may come from someone else's repository, and be anything."""

    model: SparseMoePreTrainedModel  # its parameters may lie on the meta device
    dtype: str  # of the weights
    receipt: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)  # of `ModelCardCallback`
    routing: Mapping[str, Any] = field(default_factory=dict)  # of `save_routing_statistics`
    has_picture: bool = False  # expert_load.png
    has_report: bool = False  # routing.html, in the repository or brought along
    embeds: bool = False  # modules.json of sentence-transformers


@dataclass(frozen=True)
class SurgeryResult:
    """A folder of a class of transformers, which an operation on experts made, and whose receipt says so."""

    architecture: str
    receipt: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    embeds: bool = False


def checkpoint_in_memory(model: SparseMoePreTrainedModel) -> Checkpoint:
    """A model as a [`Checkpoint`]; raises a `ValueError` for a model of another package."""
    if not isinstance(model, SparseMoePreTrainedModel):
        raise ValueError(
            f"`model` is a {type(model).__name__}; a card can be made for the classes of hf_sparse_moe. Load it with "
            "`from_pretrained` after `import hf_sparse_moe` and without `trust_remote_code`."
        )
    return Checkpoint(model, str(model.dtype).removeprefix("torch."), mapping(model.receipt))


def read_checkpoint(folder: str | Path) -> Checkpoint | SurgeryResult:
    """
    A folder, of which no weights are read. Raises a `ValueError` for no mixture, but after an operation on experts, or
    a file that cannot be read.
    """
    folder = Path(folder)
    names = (RECEIPT_NAME, RECORD_NAME, ROUTING_NAME)
    receipt, record, routing = (read_json(folder / name, optional=True) for name in names)
    has_picture, embeds = ((folder / name).is_file() for name in (PICTURE_NAME, MODULES_NAME))
    if last_surgery(receipt) and not isinstance(config := read_config(folder), SparseMoeConfig):
        return SurgeryResult(str(named_architecture(config)), receipt, record, embeds)
    model = model_without_weights(read_mixture_config(folder))
    dtype = str(model.config.dtype or "").removeprefix("torch.")
    return Checkpoint(model, dtype, receipt, record, routing, has_picture, embeds=embeds)


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
