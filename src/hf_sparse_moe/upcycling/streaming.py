"""`stream_upcycle`: from a dense checkpoint on disk to a mixture on disk, with neither ever in memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, logging

import hf_sparse_moe
from hf_sparse_moe.checkpoints.config import read_config, read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.files import copy_companions
from hf_sparse_moe.checkpoints.folder import check_target, new_folder, write_checkpoint
from hf_sparse_moe.checkpoints.reader import DenseTensors, NotStreamableError, loaded_dtypes, stored_dtype
from hf_sparse_moe.checkpoints.source import (
    Source,
    find_source,
    named_architecture,
    weight_files,
)
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .conversion import Recipe, SparseLayer, sparse_layers
from .receipt import make_receipt
from .rows import Matrix, blocks, single_threaded_workers
from .transfer import WatchedSource, write_weights
from .upcycle import Layers, make_recipe, mixture_config, upcycle


logger = logging.get_logger(__name__)

MAX_SHARD_SIZE = "4GB"
_NEEDS_A_MODEL = ("data", "sources", "prompts")


def stream_upcycle(
    source: str | Path,
    target: str | Path,
    num_experts: int | None = None,
    num_experts_per_tok: int = 2,
    method: str = "copy",
    seed: int = 0,
    *,
    layers: Layers = "all",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    allow_pickle: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    resume: bool = False,
    show_progress: bool = False,
    **options_and_fields,
) -> dict[str, Any]:
    """
    Make a mixture of experts of a dense checkpoint, from disk to disk, tensor by tensor.

    The result is bit for bit that of [`upcycle`] and `save_pretrained`, but memory holds two layers' dense weights,
    whatever the checkpoint's size. It is written beside `target`, which appears when it is complete. What
    cannot be streamed (a pickle, a method that measures on data, weights that loading transforms) is upcycled in
    memory, and the log says so.

    Args:
        source (`str` or `Path`): Folder or Hub id of a dense checkpoint.
        target (`str` or `Path`): A folder that does not exist yet, or is empty.
        num_experts, num_experts_per_tok, method, seed, layers, dtype, revision, allow_pickle: As in [`upcycle`].
        max_shard_size (`int` or `str`, defaults to `"4GB"`): Of a file of weights; a larger tensor gets its own.
        resume (`bool`, defaults to `False`): Go on with the finished shards of a call that was killed. The source's
            files and the arguments must be the same; where there is nothing to go on with, start.
        show_progress (`bool`, defaults to `False`): A bar with rate and time left, on stderr.
        **options_and_fields: As in [`upcycle`], `data`, `sources` and `prompts` included.

    Returns:
        `dict`: the receipt. It holds no measured difference to the dense model, which was never loaded: see
        [`verify`].

    Raises:
        ValueError: as [`upcycle`], and a source that changes while it is read, or a `resume` with other arguments.
        OSError: the target is taken, or its disk is too small.

    Example:
        ```python
        stream_upcycle("Qwen/Qwen3-0.6B", "qwen3-8x", num_experts=8)
        ```
    """
    check_target(target)
    arguments: dict[str, Any] = {
        "layers": layers,
        "dtype": dtype,
        "revision": revision,
        "allow_pickle": allow_pickle,
    }
    try:
        needs_a_model(method, options_and_fields)
        found = find_source(str(source), revision, allow_pickle)
        watched = WatchedSource(found)
        fields = {"num_experts": 8 if num_experts is None else num_experts, "num_experts_per_tok": num_experts_per_tok}
        plan = plan_stream(found, method, seed, layers, dtype, fields | options_and_fields)
    except NotStreamableError as reason:
        logger.warning(f"`{source}` is upcycled in memory, not streamed: {reason}.")
        model = upcycle(str(source), num_experts, num_experts_per_tok, method, seed, **arguments, **options_and_fields)
        folder = None if method == "branches" else find_source(str(source), revision, allow_pickle).folder
        write_checkpoint(model, target, folder, max_shard_size=max_shard_size)
        return model.receipt or {}
    made_from = {"recipe": plan.asked_for | {"max_shard_size": max_shard_size}}
    known = watched.sha256() if resume else None
    with new_folder(target, journal=made_from | {"sha256": known} if resume else None) as folder:
        writer = ShardWriter(folder, plan.outputs, max_shard_size)
        pieces = _write_tensors(plan, writer)
        digests = write_weights(writer, pieces, Path(target), watched, made_from, known, show_progress)
        return _describe(plan, folder, digests)


def needs_a_model(method: str, options_and_fields: dict[str, Any]) -> None:
    """Raise a `NotStreamableError` where what was asked for takes more than a checkpoint's tensors."""
    given = options_and_fields.keys() & set(_NEEDS_A_MODEL)
    if given or method == "branches":
        raise NotStreamableError(f"`{min(given, default='sources')}` needs the model itself")


@dataclass
class StreamPlan:
    """All that is known before the first weight is read. Both models are without storage."""

    source: Source
    dense: PreTrainedModel
    sparse: SparseMoePreTrainedModel
    recipe: Recipe
    fields: dict[str, Any]
    layers: list[SparseLayer]
    tensors: DenseTensors
    outputs: dict[str, torch.Tensor]
    config: SparseMoeConfig

    def layer_of(self, key: str) -> int | None:
        """The position of the sparse layer that makes a tensor of `outputs`; None for one of the dense model's own."""
        paths = (f"dense.{layer.feed_forward.block_path}." for layer in self.layers)
        return next((position for position, path in enumerate(paths) if key.startswith(path)), None)

    @property
    def asked_for(self) -> dict[str, Any]:
        """What decides the bits of the result, beside the source's."""
        return {
            "method": self.recipe.method,
            "seed": self.recipe.seed,
            **self.recipe.options,
            **self.fields,
            "dtype": str(self.sparse.dtype),
            "torch": torch.__version__,
            "hf_sparse_moe": hf_sparse_moe.__version__,
        }


def plan_stream(
    source: Source,
    method: str,
    seed: int,
    layers: Layers,
    dtype: str | torch.dtype,
    options_and_fields: dict[str, Any],
) -> StreamPlan:
    """
    All of a streaming upcycling but the weights, of which no byte is read, except to tell whether tied ones are equal.

    Raises:
        ValueError: as [`upcycle`].
        NotStreamableError: the checkpoint must be loaded as a model.
    """
    recipe, fields = make_recipe(method, seed, options_and_fields)
    if not weight_files(source):
        raise NotStreamableError("its weights are no safetensors")
    dense_config = read_config(source)
    if getattr(dense_config, "quantization_config", None) is not None:
        raise NotStreamableError("its weights are quantised")
    target = sparse_class(dense_config, named_architecture(dense_config))
    with sensible_config(source):
        chosen = (dense_config.dtype or stored_dtype(source)) if dtype == "auto" else dtype
        chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
        _set_dtype(dense_config, chosen)
        with torch.device("meta"):
            dense = target.dense_auto_class.from_config(dense_config, dtype=chosen, trust_remote_code=False)
    config = mixture_config(dense, target, recipe, fields, layers)
    with sensible_config(source):
        tensors = DenseTensors(source, dense, chosen)
        loaded = loaded_dtypes(dense, chosen)
        floating = (loaded[name] for name, parameter in dense.named_parameters() if parameter.is_floating_point())
        result_dtype = next(floating) if dtype == "auto" else chosen
        sparse = _without_storage(target, config, result_dtype)
    if sparse.can_generate():
        sparse.generation_config = read_generation_config(source.folder) or dense.generation_config
    dtypes = loaded_dtypes(sparse, result_dtype)
    outputs = {
        key: torch.empty(tensor.shape, dtype=dtypes[key], device="meta")
        for key, tensor in sparse.state_dict().items()
        if key not in sparse.all_tied_weights_keys
    }
    sparse_ones = sparse_layers(dense, config, target.family_side)
    return StreamPlan(source, dense, sparse, recipe, fields, sparse_ones, tensors, outputs, config)


def _without_storage(
    target: type[SparseMoePreTrainedModel], config: SparseMoeConfig, dtype: torch.dtype
) -> SparseMoePreTrainedModel:
    _set_dtype(config, dtype)
    with torch.device("meta"):
        return target._from_config(config, dtype=dtype)


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """As `from_pretrained` does it."""
    config.dtype = dtype
    for name in config.sub_configs:
        if (sub_config := getattr(config, name)) is not None:
            sub_config.dtype = dtype


def _describe(plan: StreamPlan, folder: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Write all but the weights; returns the receipt."""
    sparse, source = plan.sparse, plan.source
    sparse.receipt = make_receipt(plan.dense, sparse, source, plan.recipe, plan.fields, digests)
    with TemporaryDirectory(dir=folder) as described, _without_bars():
        sparse.save_pretrained(described, state_dict={})
        for path in Path(described).iterdir():
            if path.name != SAFE_WEIGHTS_NAME:
                path.replace(folder / path.name)
    copy_companions(source.folder, folder)
    return sparse.receipt


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar for the weights that it saves, even where there are none."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _write_tensors(plan: StreamPlan, writer: ShardWriter) -> Iterator[int]:
    """Write every tensor that is wanted, in the order of the shards; yields the bytes of each piece."""
    begun: set[int] = set()
    before: list[Future[int]] = []
    with single_threaded_workers() as threads:
        for key, output in plan.outputs.items():
            position = plan.layer_of(key)
            if position in begun:
                continue
            if position is not None:
                begun.add(position)
                layer = _write_layer(plan, plan.layers[position], writer, threads)
                for block in before:  # the next layer is read where this one was
                    yield block.result()
                before = layer
            elif writer.wants(key):
                begin = 0
                for piece in plan.tensors.pieces(key.removeprefix("dense.")):
                    written = writer.write(key, piece.to(output.dtype), begin)
                    begin += written
                    yield written
        for block in before:
            yield block.result()


def _write_layer(
    plan: StreamPlan, layer: SparseLayer, writer: ShardWriter, threads: ThreadPoolExecutor
) -> list[Future[int]]:
    """Have a layer written by the threads, in blocks of rows, while the next one is read."""
    prefix = f"dense.{layer.feed_forward.block_path}."
    wanted = {key for key in plan.outputs if key.startswith(prefix) and writer.wants(key)}
    if not wanted:
        return []

    def write(key: str, matrix: Matrix, rows: slice, begin: int) -> int:
        return writer.write(key, matrix[rows].to(plan.outputs[key].dtype), begin)

    written = []
    for key, expert, matrix in layer.pieces(plan.tensors.reader(), plan.config, plan.recipe):
        if key in wanted:
            matrix = torch.atleast_1d(matrix) if isinstance(matrix, torch.Tensor) else matrix
            row_bytes = prod(matrix.shape[1:]) * plan.outputs[key].element_size()
            first = (expert or 0) * matrix.shape[0]
            for rows in blocks(matrix):
                written.append(threads.submit(write, key, matrix, rows, (first + rows.start) * row_bytes))
    return written
