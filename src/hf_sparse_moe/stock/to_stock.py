"""`export`: a mixture becomes a checkpoint of a stock architecture, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_sparse_moe.checkpoints.config import read_generation_config
from hf_sparse_moe.checkpoints.files import copy_companions, read_json
from hf_sparse_moe.checkpoints.folder import check_target as check_output_dir
from hf_sparse_moe.checkpoints.journal import WatchedSource, written_shards
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles
from hf_sparse_moe.checkpoints.source import Source, find_source, weight_files
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.models.size import meta_model

from .fit import (
    block_paths,
    check_target,
    config_of,
    empty_model,
    in_layer,
    layer_path,
    stored_tensors,
)
from .targets import EXPORT_TARGETS, ExportTarget
from .tensors import Tensors, target_name, to_target


@dataclass(frozen=True)
class ExportReport:
    """
    What [`export`] wrote.

    Args:
        path (`Path`): The folder.
        architecture (`str`): The `model_type` that was written.
    """

    path: Path
    architecture: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": str(self.path), "architecture": self.architecture}


def export(
    source: SparseMoePreTrainedModel | str | Path,
    output: str | Path,
    architecture: str = "auto",
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    max_shard_size: int | str = "4GB",
    resume: bool = False,
    show_progress: bool = False,
    target: str | None = None,
) -> ExportReport:
    """
    Write a mixture as a checkpoint of a stock architecture (Mixtral, Qwen3-MoE, ...), which any server loads without
    this package and which computes the same.

    A folder is read layer by layer: memory holds one layer's experts, or the embedding, never the model nor a shard.
    Tokenizer, licence, generation config and receipt come along.

    Args:
        source (`SparseMoePreTrainedModel`, `str` or `Path`): A mixture with a language-model head, or the folder or
            Hub id of one.
        output (`str` or `Path`): A folder that does not exist yet, or is empty. It appears when it is complete.
        architecture (`str`, defaults to `"auto"`): The `model_type` to write. `"auto"` takes the first that fits.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights; a larger tensor gets its own.
        resume (`bool`, defaults to `False`): Continue an interrupted call from its finished shards. The mixture's
            files and the arguments must be the same; where there is nothing to resume, start. Not for a model.
        show_progress (`bool`, defaults to `False`): A bar with rate and time left, on stderr.
        target (`str`, *optional*): The name of `architecture` in version 0.1.

    Returns:
        [`ExportReport`]: the folder and its architecture.

    Raises:
        ValueError: an unknown architecture, or one that the mixture does not fit; says what stands in the way. A
            mixture that changes while it is read, or a `resume` with other arguments.
        OSError: the output folder is taken, or its disk is too small.

    Example:
        ```python
        export("qwen3-8x", "qwen3-8x-stock")
        AutoModelForCausalLM.from_pretrained("qwen3-8x-stock")
        ```
    """
    if target is not None:
        warn("`target` of `export` is now `architecture`.", FutureWarning, stacklevel=2)
        architecture = target
    rows = {row.model_type: row for row in EXPORT_TARGETS}
    if architecture != "auto" and architecture not in rows:
        raise ValueError(f"`architecture={architecture!r}` is not allowed: it must be 'auto' or one of {list(rows)}.")
    if resume and isinstance(source, SparseMoePreTrainedModel):
        raise ValueError(
            "`resume=True` is not allowed with a model in memory, which nothing tells from another one. Save it and "
            "pass the folder, or leave `resume` out."
        )
    check_output_dir(output)
    mixture: SparseMoePreTrainedModel | Source
    if isinstance(source, SparseMoePreTrainedModel):
        mixture, watched = source, None
    else:
        mixture = find_source(source, revision, token=token)
        watched = WatchedSource(mixture)
    config, saved_as = config_of(mixture.folder if isinstance(mixture, Source) else mixture)
    row, stock_config = _choose(architecture, config, saved_as)
    if not isinstance(mixture, Source):
        stock_config.dtype = mixture.dtype
    conversion = _Conversion(row, config, empty_model(stock_config), _tensors_of(mixture))
    made_from = {"export": {"architecture": row.model_type, "max_shard_size": max_shard_size, **_versions()}}
    pieces, sizes = conversion.write, (max_shard_size, resume, show_progress)
    with written_shards(output, conversion.outputs, pieces, watched, made_from, *sizes) as (partial, _):
        stock_config.save_pretrained(partial)
        _write_companions(partial, mixture, row)
    return ExportReport(Path(output), row.model_type)


def _choose(target: str, config: SparseMoeConfig, saved_as: str | None) -> tuple[ExportTarget, PreTrainedConfig]:
    dense = config.dense_config.model_type
    rows = [row for row in EXPORT_TARGETS if row.model_type == target or (target == "auto" and dense in row.dense)]
    reports = []
    for row in rows:
        report = check_target(row, config, saved_as)
        if report.config is not None:
            return row, report.config
        reports.append(report)
    if not reports:
        raise ValueError(
            f"No stock architecture is the sparse sibling of {dense}, so `architecture` has nothing to choose from. "
            "Serve the checkpoint with `trust_remote_code=True`, or see `explain_export`."
        )
    reasons = "\n".join(f"- {report.target}: {'; '.join(report.obstacles)}" for report in reports)
    raise ValueError(f"The {dense} mixture cannot be written as `architecture={target!r}`:\n{reasons}")


@dataclass(frozen=True)
class _Tensors:
    """A mixture's tensors: all of them without storage, and how to read one."""

    stored: Tensors
    read: Callable[[str], torch.Tensor]


def _tensors_of(mixture: SparseMoePreTrainedModel | Source) -> _Tensors:
    if not isinstance(mixture, Source):
        tensors = stored_tensors(mixture)
        stored = {name: _without_storage(tensor) for name, tensor in tensors.items()}
        return _Tensors(stored, lambda name: tensors[name].detach().cpu())
    try:
        files = TensorFiles(weight_files(mixture))
    except NotStreamableError as reason:
        raise ValueError(f"`{mixture.name}` cannot be exported: {reason}. Save it in another dtype first.") from None
    stored = {name: torch.empty(files.shape(name), dtype=files.dtype(name), device="meta") for name in files.names}

    def read(name: str) -> torch.Tensor:
        return files.read(name, files.dtype(name), torch.empty(stored[name].nbytes, dtype=torch.uint8))

    return _Tensors(stored, read)


def _without_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _Conversion:
    """
    Our tensors to the target's, in the names of the Hub, part by part: a sparse block, or a single other tensor.

    Args:
        row (`ExportTarget`): The target.
        config (`SparseMoeConfig`): Of the mixture.
        theirs (`PreTrainedModel`): The target's model, without storage.
        tensors (`_Tensors`): The mixture's.
    """

    def __init__(self, row: ExportTarget, config: SparseMoeConfig, theirs: PreTrainedModel, tensors: _Tensors):
        self._row, self._theirs, self._tensors = row, theirs, tensors
        self._shapes = {name: tensor.shape for name, tensor in stored_tensors(theirs).items()}
        ours = meta_model(config)
        names, paths = list(stored_tensors(ours)), block_paths(ours)
        missing = [name for name in names if name not in tensors.stored]
        if missing:
            raise ValueError(f"The checkpoint lacks `{missing[0]}`. Pass a complete one.")
        inside = tuple(f"{path}." for path in paths)
        self._parts = [("", [name]) for name in names if not name.startswith(inside)]
        self._parts += [(path, [name for name in names if name.startswith(f"{path}.")]) for path in paths]
        # A dry run without storage says what will come out; in memory of its own, as the writer counts that.
        self._made = [
            {name: _without_storage(tensor) for name, tensor in self._convert(*part, tensors.stored.__getitem__)}
            for part in self._parts
        ]

    @property
    def outputs(self) -> Tensors:
        """All that comes out, in its order, without storage."""
        return {name: tensor for made in self._made for name, tensor in made.items()}

    def write(self, writer: ShardWriter) -> Generator[int]:
        """Write every tensor that is wanted; yields the bytes of each."""
        for part, made in zip(self._parts, self._made, strict=True):
            if any(map(writer.wants, made)):
                yield from self._write_part(*part, writer)

    def _write_part(self, path: str, names: list[str], writer: ShardWriter) -> Iterator[int]:
        for name, tensor in self._convert(path, names, self._tensors.read):
            if writer.wants(name):
                yield writer.write(name, tensor)

    def _convert(
        self, path: str, names: list[str], read: Callable[[str], torch.Tensor]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        if path:
            layer = layer_path(path)
            block = {name.removeprefix(f"{path}."): read(name) for name in names}
            converted = to_target(self._row, block, in_layer(self._shapes, layer))
            renamed = {f"{layer}.{name}": tensor for name, tensor in converted.items()}
        else:
            renamed = {target_name(self._row, name): read(name) for name in names}
        return revert_weight_conversion(self._theirs, renamed).items()


def _write_companions(partial: Path, mixture: SparseMoePreTrainedModel | Source, row: ExportTarget) -> None:
    """Tokenizer, licence, generation config and receipt."""
    receipt = None
    if not isinstance(mixture, Source):
        receipt = mixture.receipt
        mixture.generation_config.save_pretrained(partial)
    else:
        folder = mixture.folder
        copy_companions(folder, partial)
        if generation := read_generation_config(folder):
            generation.save_pretrained(partial)
        receipt = read_json(folder / RECEIPT_NAME, optional=True) or None
    if receipt is not None:
        receipt = {**receipt, "export": {"target": row.model_type, "hf_sparse_moe": _versions()["hf_sparse_moe"]}}
        (partial / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    from hf_sparse_moe import __version__

    return {"hf_sparse_moe": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
