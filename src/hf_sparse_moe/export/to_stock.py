"""`export`: a mixture becomes a checkpoint of a stock architecture, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME, SparseMoePreTrainedModel
from hf_sparse_moe.models.size import meta_model
from hf_sparse_moe.upcycling.output import copy_companions, new_folder
from hf_sparse_moe.upcycling.source import find_source

from .fit import (
    block_paths,
    check_target,
    config_of,
    empty_model,
    in_layer,
    layer_path,
    stored_tensors,
)
from .shards import WEIGHTS_NAME, ShardWriter
from .targets import EXPORT_TARGETS, ExportTarget
from .tensors import target_name, to_target


GENERATION_CONFIG = "generation_config.json"


def export(
    model_or_path: SparseMoePreTrainedModel | str | Path,
    output_dir: str | Path,
    target: str = "auto",
    *,
    revision: str | None = None,
    max_shard_gib: float = 4.0,
) -> Path:
    """
    Write a mixture as a checkpoint of a stock architecture (Mixtral, Qwen3-MoE, ...), which any server loads without
    this package and which computes the same.

    A folder is read tensor by tensor: memory holds one output shard and one layer's experts, never the model.
    Tokenizer, licence, generation config and receipt come along.

    Args:
        model_or_path (`SparseMoePreTrainedModel` or `str`): A mixture with a language-model head, or the folder or Hub
            id of one.
        output_dir (`str` or `Path`): A folder that does not exist yet, or is empty. It appears when it is complete.
        target (`str`, defaults to `"auto"`): The `model_type` to write. `"auto"` takes the first that fits.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        max_shard_gib (`float`, defaults to 4.0): Largest file of weights, in GiB.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: an unknown target, or one that the mixture does not fit; says what stands in the way.
        OSError: the output folder is taken, or the disk is full.

    Example:
        ```python
        export("qwen3-8x", "qwen3-8x-stock")
        AutoModelForCausalLM.from_pretrained("qwen3-8x-stock")
        ```
    """
    rows = {row.model_type: row for row in EXPORT_TARGETS}
    if target != "auto" and target not in rows:
        raise ValueError(f"`target={target!r}` is not allowed: it must be 'auto' or one of {list(rows)}.")
    model = model_or_path if isinstance(model_or_path, SparseMoePreTrainedModel) else None
    folder = Path() if model is not None else find_source(str(model_or_path), revision).folder
    config, architecture = config_of(folder if model is None else model)
    row, stock_config = _choose(target, config, architecture)
    if model is not None:
        stock_config.dtype = model.dtype
        tensors: Mapping[str, torch.Tensor] = stored_tensors(model)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    else:
        files = _weight_files(folder)
        tensors, needed = _Folder(files), sum(path.stat().st_size for path in files)
    with new_folder(output_dir, needed_bytes=needed) as partial:
        writer = ShardWriter(partial, int(max_shard_gib * 2**30))
        for name, tensor in _stock_tensors(row, config, empty_model(stock_config), tensors):
            writer.add(name, tensor)
        writer.close()
        stock_config.save_pretrained(partial)
        _write_companions(partial, folder, model, row)
    return Path(output_dir)


def _choose(target: str, config: SparseMoeConfig, architecture: str | None) -> tuple[ExportTarget, PreTrainedConfig]:
    dense = config.dense_config.model_type
    rows = [row for row in EXPORT_TARGETS if row.model_type == target or (target == "auto" and dense in row.dense)]
    reports = []
    for row in rows:
        report = check_target(row, config, architecture)
        if report.config is not None:
            return row, report.config
        reports.append(report)
    if not reports:
        raise ValueError(
            f"No stock architecture is the sparse sibling of {dense}, so `target` has nothing to choose from. Serve "
            "the checkpoint with `trust_remote_code=True`, or see `explain_export`."
        )
    reasons = "\n".join(f"- {report.target}: {'; '.join(report.obstacles)}" for report in reports)
    raise ValueError(f"The {dense} mixture cannot be written as `target={target!r}`:\n{reasons}")


def _stock_tensors(
    row: ExportTarget, config: SparseMoeConfig, theirs: PreTrainedModel, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The target's tensors in the names of the Hub, those of one layer's experts at a time."""
    ours = meta_model(config)
    names, paths = list(stored_tensors(ours)), block_paths(ours)
    shapes = {name: tensor.shape for name, tensor in stored_tensors(theirs).items()}
    inside = tuple(f"{path}." for path in paths)
    for name in names:
        if not name.startswith(inside):
            yield from revert_weight_conversion(theirs, {target_name(row, name): tensors[name]}).items()
    for path in paths:
        layer = layer_path(path)
        block = {name.removeprefix(f"{path}."): tensors[name] for name in names if name.startswith(f"{path}.")}
        converted = to_target(row, block, in_layer(shapes, layer))
        full_names = {f"{layer}.{name}": tensor for name, tensor in converted.items()}
        yield from revert_weight_conversion(theirs, full_names).items()


class _Folder(Mapping):
    """The tensors of a checkpoint's files, each read when it is asked for, so that no file stays in memory."""

    def __init__(self, paths: list[Path]):
        self.files: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise ValueError(f"The checkpoint lacks `{name}`. Pass a complete one.")
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _weight_files(folder: Path) -> list[Path]:
    """What `from_pretrained` reads: one file, or else shards; never both, where a folder holds an older set too."""
    single = folder / WEIGHTS_NAME
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _write_companions(partial: Path, folder: Path, model: SparseMoePreTrainedModel | None, row: ExportTarget) -> None:
    """Tokenizer, licence, generation config and receipt."""
    from hf_sparse_moe import __version__

    receipt = None
    if model is not None:
        receipt = model.receipt
        model.generation_config.save_pretrained(partial)
    else:
        copy_companions(folder, partial)
        if (folder / GENERATION_CONFIG).is_file():
            GenerationConfig.from_pretrained(folder).save_pretrained(partial)
        if (folder / RECEIPT_NAME).is_file():
            receipt = json.loads((folder / RECEIPT_NAME).read_text(encoding="utf-8"))
    if receipt is not None:
        receipt = {**receipt, "export": {"target": row.model_type, "hf_sparse_moe": __version__}}
        (partial / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
