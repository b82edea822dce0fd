"""`export`: a mixture becomes a checkpoint of a stock architecture, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import CONFIG_NAME

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.config import read_generation_config
from hf_sparse_moe.checkpoints.families import check_not_quantised
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.folder import check_target
from hf_sparse_moe.checkpoints.journal import WatchedSource, written_shards
from hf_sparse_moe.checkpoints.reader import NotStreamableError, TensorFiles
from hf_sparse_moe.checkpoints.source import Source, find_source, weight_files
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.models.size import meta_model
from hf_sparse_moe.upcycling.in_memory import check_unwrapped
from hf_sparse_moe.upcycling.receipt import versions

from .fit import check_fit, config_of, empty_model
from .gguf import write_gguf
from .servers import SERVERS, choose_for_server
from .targets import EXPORT_TARGETS, ExportTarget
from .tensors import Tensors, part_to_target, parts_of, stored_tensors


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
    server: str | None = None,
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
        server (`str`, *optional*): `"vllm"`, `"sglang"`, `"llama.cpp"` or `"tgi"`: write what it computes as the
            mixture does, for llama.cpp one file, `model.gguf`, in the mixture's dtype. See `explain_serving`.
        target (`str`, *optional*): The name of `architecture` in version 0.1.

    Returns:
        [`ExportReport`]: the folder and its architecture.

    Raises:
        ValueError: an unknown architecture or server, or one that the mixture does not fit; says what stands in the
            way. A tokenizer that llama.cpp does not know. A mixture that changes while it is read, or a `resume` with
            other arguments.
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
    rows = [row.model_type for row in EXPORT_TARGETS]
    if architecture not in ("auto", *rows):
        raise ValueError(f"`architecture={architecture!r}` is not allowed: it must be 'auto' or one of {rows}.")
    if server not in (None, *SERVERS):
        raise ValueError(f"`server={server!r}` is not allowed: it must be None or one of {list(SERVERS)}.")
    in_memory = isinstance(source, SparseMoePreTrainedModel)
    if resume and server == "llama.cpp":
        raise ValueError("`resume=True` is not allowed for llama.cpp, whose one file is written from the start.")
    if resume and in_memory:
        raise ValueError(
            "`resume=True` is not allowed with a model in memory, which nothing tells from another one. Save it and "
            "pass the folder, or leave `resume` out."
        )
    if in_memory:
        check_unwrapped(source)
    check_target(output)
    mixture: Any = source if in_memory else find_source(source, revision, token=token)  # type: ignore[arg-type]
    watched = None if in_memory else WatchedSource(mixture)
    config, saved_as = config_of(mixture)
    check_not_quantised(config, type(mixture).__name__ if in_memory else mixture.name)
    row, stock_config = choose_target(architecture, config, saved_as, server)
    if in_memory:
        stock_config.dtype = mixture.dtype
    stored, read = _tensors_of(mixture)
    if server == "llama.cpp":
        write_gguf(output, mixture, row, stock_config, parts_of(meta_model(config)), stored, read)
        return ExportReport(Path(output), row.model_type)
    conversion = _Conversion(row, config, empty_model(stock_config), stored, read)
    made_from = {"export": {"architecture": row.model_type, "max_shard_size": max_shard_size, **versions()}}
    pieces, sizes = conversion.write, (max_shard_size, resume, show_progress)
    with written_shards(output, conversion.outputs, pieces, watched, made_from, *sizes) as (partial, _):
        stock_config.save_pretrained(partial)
        _add_older_names(partial / CONFIG_NAME, stock_config)
        _write_companions(partial, mixture, row)
    return ExportReport(Path(output), row.model_type)


def choose_target(
    target: str, config: SparseMoeConfig, saved_as: str | None, server: str | None = None
) -> tuple[ExportTarget, PreTrainedConfig]:
    dense = config.dense_config.model_type
    if server is not None:
        chosen, found = choose_for_server(server, config, saved_as, target)
        if chosen is None or found.config is None:
            raise ValueError(f"The {dense} mixture cannot be written for {server}: {'; '.join(found.obstacles)}.")
        return chosen, found.config
    reports = []
    for row in EXPORT_TARGETS:
        if row.model_type == target or (target == "auto" and dense in row.dense):
            report = check_fit(row, config, saved_as)
            if report.config is not None:
                return row, report.config
            reports.append(f"- {row.model_type}: {'; '.join(report.obstacles)}")
    if not reports:
        raise ValueError(
            f"No stock architecture is the sparse sibling of {dense}, so `architecture` has nothing to choose from. "
            "Serve the checkpoint with `trust_remote_code=True`, or see `explain_export`."
        )
    raise ValueError("\n".join([f"The {dense} mixture cannot be written as `architecture={target!r}`:", *reports]))


def _tensors_of(mixture: SparseMoePreTrainedModel | Source) -> tuple[Tensors, Callable[[str], torch.Tensor]]:
    """A mixture's tensors: all of them without storage, and how to read one."""
    if not isinstance(mixture, Source):
        tensors = stored_tensors(mixture)
        return {name: _without_storage(tensor) for name, tensor in tensors.items()}, lambda name: tensors[name].cpu()
    try:
        files = TensorFiles(weight_files(mixture))
    except NotStreamableError as reason:
        raise ValueError(f"`{mixture.name}` cannot be exported: {reason}. Save it in another dtype first.") from None
    stored = {name: torch.empty(files.shape(name), dtype=files.dtype(name), device="meta") for name in files.names}
    return stored, files.read


def _without_storage(tensor: torch.Tensor) -> torch.Tensor:
    """In meta memory of its own, as the writer counts that."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _Conversion:
    """Our tensors to those of `theirs`, the target's model without storage, in the names of the Hub, part by part."""

    def __init__(
        self,
        row: ExportTarget,
        config: SparseMoeConfig,
        theirs: PreTrainedModel,
        stored: Tensors,
        read: Callable[[str], torch.Tensor],
    ):
        self._row, self._theirs, self._read = row, theirs, read
        self._shapes = {name: tensor.shape for name, tensor in stored_tensors(theirs).items()}
        self._parts = parts_of(meta_model(config))
        missing = [name for _, names in self._parts for name in names if name not in stored]
        if missing:
            raise ValueError(f"The checkpoint lacks `{missing[0]}`. Pass a complete one.")
        # A dry run without storage says what will come out.
        self._made = [self._convert(path, {name: stored[name] for name in names}) for path, names in self._parts]

    @property
    def outputs(self) -> Tensors:
        """All that comes out, in its order, without storage."""
        return {name: _without_storage(tensor) for made in self._made for name, tensor in made.items()}

    def write(self, writer: ShardWriter) -> Generator[int]:
        """Write every tensor that is wanted; yields the bytes of each."""
        for (path, names), made in zip(self._parts, self._made, strict=True):
            if any(map(writer.wants, made)):
                yield from self._write_part(path, names, writer)

    def _write_part(self, path: str, names: list[str], writer: ShardWriter) -> Generator[int]:
        """In a function of its own, which lets go of the part before the next one is read."""
        for name, tensor in self._convert(path, {name: self._read(name) for name in names}).items():
            if writer.wants(name):
                yield writer.write(name, tensor)

    def _convert(self, path: str, part: Mapping[str, torch.Tensor]) -> Tensors:
        return revert_weight_conversion(self._theirs, part_to_target(self._row, path, part, self._shapes))


def _add_older_names(path: Path, config: PreTrainedConfig) -> None:
    """Write what transformers 4 and servers call otherwise under both names: rotary embedding, dtype, experts."""
    fields = read_json(path)
    for older, name in {"torch_dtype": "dtype", **config.attribute_map}.items():
        if name in fields:
            fields.setdefault(older, fields[name])
    rope = dict(fields.get("rope_parameters") or {})
    if "rope_theta" in rope:  # else a dict for each kind of layer, which version 4 does not read
        fields |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        fields["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_companions(partial: Path, mixture: SparseMoePreTrainedModel | Source, row: ExportTarget) -> None:
    """Tokenizer, licence, generation config and receipt."""
    if isinstance(mixture, Source):
        copy_companions(mixture.folder, partial)
        generation_config = read_generation_config(mixture.folder)
        receipt = read_json(mixture.folder / RECEIPT_NAME, optional=True)
    else:
        generation_config, receipt = mixture.generation_config, mixture.receipt
    if generation_config is not None:
        generation_config.save_pretrained(partial)
    if receipt:
        receipt = {**receipt, "export": {"target": row.model_type, "hf_sparse_moe": versions()["hf_sparse_moe"]}}
        (partial / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
