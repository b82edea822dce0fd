"""From a dense checkpoint on disk to a mixture on disk, or to shards of one, with neither model ever in memory."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import SAFE_WEIGHTS_NAME, logging

import hf_sparse_moe
from hf_sparse_moe.checkpoints.config import read_config, read_generation_config, sensible_config
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.checkpoints.files import copy_companions
from hf_sparse_moe.checkpoints.journal import WatchedSource, written_shards
from hf_sparse_moe.checkpoints.reader import DenseTensors, NotStreamableError, loaded_dtypes, stored_dtype
from hf_sparse_moe.checkpoints.source import Source, named_architecture, weight_files
from hf_sparse_moe.checkpoints.writer import ShardWriter
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel

from .conversion import Conversion, SparseLayer, plan_conversion, set_dtype
from .receipt import make_receipt
from .recipe import Layers, Recipe
from .rows import Matrix, blocks, single_threaded_workers


def plan_from_disk(
    source: Source, recipe: Recipe, fields: dict[str, Any], layers: Layers, dtype: torch.dtype | None
) -> Conversion:
    """
    The conversion of a checkpoint, of which no weight is read, except to tell whether tied ones are equal.

    Args:
        source ([`Source`]): The dense checkpoint.
        recipe ([`Recipe`]): How the experts start.
        fields (`dict`): The config's fields that were asked for.
        layers (`str`, `list[int]` or `dict`): Which layers become sparse.
        dtype (`torch.dtype`, *optional*): Of the mixture; None keeps that of the checkpoint.

    Raises:
        ValueError: as `upcycle`.
        NotStreamableError: the checkpoint must be loaded as a model.
    """
    if recipe.method == "branches":
        raise NotStreamableError("`sources` needs the model itself")
    if not weight_files(source):
        raise NotStreamableError("its weights are no safetensors")
    dense_config = read_config(source)
    if getattr(dense_config, "quantization_config", None) is not None:
        raise NotStreamableError("its weights are quantised")
    auto_class = sparse_class(dense_config, named_architecture(dense_config)).dense_auto_class
    with sensible_config(source):
        chosen = dtype or dense_config.dtype or stored_dtype(source)
        chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
        set_dtype(dense_config, chosen)
        with torch.device("meta"):
            dense = auto_class.from_config(dense_config, dtype=chosen, trust_remote_code=False)
        tensors = DenseTensors(source, dense, chosen)
        loaded = loaded_dtypes(dense, chosen)
        floating = (loaded[name] for name, parameter in dense.named_parameters() if parameter.is_floating_point())
        kept = next(floating)
    conversion = plan_conversion(dense, tensors, dtype or kept, recipe, fields, layers)
    if conversion.sparse.can_generate():
        conversion.sparse.generation_config = read_generation_config(source.folder) or dense.generation_config
    return conversion


def write_mixture(
    conversion: Conversion,
    source: Source,
    watched: WatchedSource,
    output: str | Path,
    max_shard_size: int | str,
    resume: bool,
    show_progress: bool,
) -> dict[str, Any]:
    """
    Write the mixture to a folder, tensor by tensor: memory holds two layers' dense weights, whatever their number.

    Returns:
        `dict`: the receipt.
    """
    recipe = conversion.recipe
    asked_for = {
        "method": recipe.method,
        "seed": recipe.seed,
        **recipe.options,
        **conversion.fields,
        "dtype": str(conversion.dtype),
        "torch": torch.__version__,
        "hf_sparse_moe": hf_sparse_moe.__version__,
        "max_shard_size": max_shard_size,
    }
    with written_shards(
        output,
        conversion.outputs,
        lambda writer: _write_tensors(conversion, writer),
        watched,
        {"recipe": asked_for},
        max_shard_size,
        resume,
        show_progress,
    ) as (folder, digests):
        sparse = conversion.sparse
        sparse.receipt = make_receipt(conversion.dense, sparse, source, recipe, conversion.fields, digests)
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


def _write_tensors(conversion: Conversion, writer: ShardWriter) -> Generator[int]:
    """Write every tensor that is wanted, in the order of the shards; yields the bytes of each piece."""
    begun: set[int] = set()
    before: list[Future[int]] = []
    with single_threaded_workers() as threads, single_threaded_workers(1) as planner:
        for key, output in conversion.outputs.items():
            position = conversion.layer_of(key)
            if position in begun:
                continue
            if position is not None:
                begun.add(position)
                layer = _write_layer(conversion, conversion.layers[position], writer, threads, planner)
                for block in before:  # the next layer is read where this one was
                    yield block.result()
                before = layer
            elif writer.wants(key):
                begin = 0
                for piece in conversion.tensors.pieces(key.removeprefix("dense.")):
                    written = writer.write(key, piece.to(output.dtype), begin)
                    begin += written
                    yield written
        for block in before:
            yield block.result()


def _write_layer(
    conversion: Conversion,
    layer: SparseLayer,
    writer: ShardWriter,
    threads: ThreadPoolExecutor,
    planner: ThreadPoolExecutor,
) -> list[Future[int]]:
    """Have a layer written by the threads, in blocks of rows, while the next one is read."""
    outputs = conversion.outputs
    wanted = {key for key in outputs if key.startswith(f"{layer.block}.") and writer.wants(key)}
    if not wanted:
        return []

    def write(key: str, matrix: Matrix, rows: slice, begin: int) -> int:
        return writer.write(key, matrix[rows].to(outputs[key].dtype), begin)

    written = []
    read = conversion.tensors.reader()
    for key, expert, matrix in planner.submit(lambda: list(conversion.start(layer, read))).result():
        if key in wanted:
            matrix = torch.atleast_1d(matrix) if isinstance(matrix, torch.Tensor) else matrix
            row_bytes = prod(matrix.shape[1:]) * outputs[key].element_size()
            first = (expert or 0) * matrix.shape[0]
            for rows in blocks(matrix):
                written.append(threads.submit(write, key, matrix, rows, (first + rows.start) * row_bytes))
    return written


def load_shards(
    conversion: Conversion, source: Source, watched: WatchedSource, distributed_config: DistributedConfig
) -> SparseMoePreTrainedModel:
    """
    This process's part of the mixture; every process calls it. Memory holds that part and a few layers' dense weights.
    """
    with ThreadPoolExecutor(max_workers=1) as hashing:
        # One process hashes the source, while all read it.
        hashes = hashing.submit(watched.sha256) if _rank_and_processes()[0] == 0 else None
        generation_config = conversion.sparse.generation_config if conversion.sparse.can_generate() else None
        model = conversion.load(generation_config=generation_config, distributed_config=distributed_config)
        known: list[Any] = [None if hashes is None else hashes.result()]
    watched.check_unchanged()
    if distributed.is_initialized():
        distributed.broadcast_object_list(known)
    model.receipt = make_receipt(
        conversion.dense, conversion.sparse, source, conversion.recipe, conversion.fields, known[0]
    )
    return model


def _rank_and_processes() -> tuple[int, int]:
    """Of the process group, or, before there is one, as the launcher says."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_distributed_config(config: DistributedConfig, num_experts: int, processes: int | None = None) -> None:
    """
    Raise unless a model can be shared out so, before its weights are read.

    Args:
        config (`DistributedConfig`): The sizes.
        num_experts (`int`): Routed experts of a layer.
        processes (`int`, *optional*): How many there are; those of this run by default.

    Raises:
        ValueError: the sizes do not multiply to the number of processes, or do not divide the experts.
    """
    pipeline, replicas, fsdp, tensor, expert = (
        getattr(config, name) or 1 for name in ("pp_size", "dp_replicate_size", "fsdp_size", "tp_size", "ep_size")
    )
    size = pipeline * replicas * fsdp * tensor
    processes = _rank_and_processes()[1] if processes is None else processes
    if size != processes:
        raise ValueError(
            f"`distributed_config` is for {size} processes (pp_size x dp_replicate_size x fsdp_size x tp_size), but "
            f"{processes} run. Change the sizes or the number of processes; `ep_size` divides fsdp_size x tp_size."
        )
    if num_experts % expert:
        raise ValueError(
            f"`num_experts={num_experts}` cannot be shared out over `ep_size={expert}`: each rank holds as many "
            f"experts as the others. Choose one of {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}."
        )
