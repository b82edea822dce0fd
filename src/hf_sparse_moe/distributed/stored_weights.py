"""The weights in a checkpoint of any engine, read by the tools of torch and DeepSpeed."""

from __future__ import annotations

import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hf_sparse_moe.checkpoints.reader import TensorFiles
from hf_sparse_moe.checkpoints.source import Source, weight_files

from .checkpoint import ADAPTER_NAME, INCOMPLETE_NAME


# What torch, DeepSpeed and safetensors raise where a file is missing, cut short or holds something else.
_UNREADABLE = (
    RuntimeError, OSError, EOFError, LookupError, AssertionError, TypeError, AttributeError, ValueError,
    pickle.UnpicklingError, SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, whole, and how it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: Any) -> StoredTensor:
        """Of one that is in memory, mapped from a file, or put together by DeepSpeed when it is asked for."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.contiguous)


def stored_tensors(checkpoint: str | Path) -> tuple[str, dict[str, StoredTensor]]:
    """
    The engine that wrote a checkpoint, and the model's tensors in it, of which nothing is read yet.

    No pickle in it runs code.

    Raises:
        ValueError: no checkpoint, or one that is incomplete, corrupt or would run code.
        ImportError: one of DeepSpeed, which is not installed.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ValueError(f"`{folder}` is not a folder. Pass the folder `checkpoint-...` of a training.")
    if (folder / INCOMPLETE_NAME).exists():
        raise _incomplete(folder, "its writing was not finished")
    sharded = [folder] if (folder / ".metadata").exists() else sorted(folder.glob("pytorch_model_fsdp_[0-9]*"))
    if (folder / "latest").is_file():
        return "DeepSpeed ZeRO", _zero_tensors(folder)
    if sharded:
        return "FSDP, sharded", _sharded_tensors(_SafeReader(sharded[0]), prefix="model.")
    if any(folder.glob("shard-*.safetensors")):
        return "expert parallelism", _sharded_tensors(HuggingFaceStorageReader(str(folder)))
    if files := weight_files(Source(str(folder), folder, None)):
        return "one process, or gathered", _safetensors(files)
    if (folder / "pytorch_model_fsdp.bin").is_file():
        return "FSDP, gathered", _gathered_tensors(folder / "pytorch_model_fsdp.bin")
    if (folder / ADAPTER_NAME).is_file():
        raise ValueError(
            f"`{folder}` holds an adapter, which is one file already. Load it with `load_adapter(model, folder)`."
        )
    raise ValueError(
        f"`{folder}` has no weights of FSDP, DeepSpeed, expert parallelism or safetensors. Pass the folder "
        "`checkpoint-...` of a training."
    )


def matched(
    checkpoint: str | Path,
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    tied: Mapping[str, str],
) -> dict[str, StoredTensor]:
    """
    The stored tensor of each of a model's keys, tied ones once.

    Raises:
        ValueError: the tensors are not the model's, by name and shape.
    """
    reasons = []
    for key, tensor in stored.items():
        if shapes.get(key) != tensor.shape:
            wanted = f"is {shapes[key]} in the model" if key in shapes else "is nowhere in the model"
            reasons.append(f"its `{key}` of shape {tensor.shape} {wanted}")
    found = {}
    for key in (key for key in shapes if key not in tied):
        names = [key, *(alias for alias, first in tied.items() if first == key)]
        name = next((name for name in names if name in stored), None)
        if name is None:
            reasons.append(f"it lacks `{key}`")
        else:
            found[key] = stored[name]
    if reasons:
        raise ValueError(
            f"`{checkpoint}` is of another model: {reasons[0]}. Pass the model, or the config, that it was trained "
            "with."
        )
    return found


def check_same_model(model: Any, checkpoint: str | Path) -> None:
    """
    Raise unless the tensors of a checkpoint, of whatever engine, are the model's by name and shape. Trainer would
    leave the others out without a word, or stop with some of the weights loaded. Headers are read, no weights.

    Args:
        model (`SparseMoePreTrainedModel` or `PeftModel`): That of the trainer, before `train`.
        checkpoint (`str` or `Path`): The folder `checkpoint-...` to go on from.

    Raises:
        ValueError: a checkpoint of another model, or a damaged one.
    """
    folder = Path(checkpoint)
    holds_adapter, is_adapted = (folder / ADAPTER_NAME).is_file(), hasattr(model, "peft_config")
    if holds_adapter and not is_adapted:
        raise ValueError(f"`{folder}` is of another model: it holds an adapter, and the model has none.")
    if is_adapted and not holds_adapter:
        return  # the engines that shard keep an adapter in ways of their own
    if is_adapted:
        from peft import get_peft_model_state_dict

        stored, state, tied = _safetensors([folder / ADAPTER_NAME]), get_peft_model_state_dict(model), {}
    else:
        stored, state, tied = stored_tensors(folder)[1], model.state_dict(), model.all_tied_weights_keys
    parameters = dict(model.named_parameters())
    # A parameter that ZeRO-3 cut up is empty here, and remembers its shape.
    shapes = {key: tuple(getattr(parameters.get(key), "ds_shape", value.shape)) for key, value in state.items()}
    matched(folder, stored, shapes, tied)


def _safetensors(paths: list[Path]) -> dict[str, StoredTensor]:
    files = TensorFiles(paths)
    return {
        name: StoredTensor(tuple(files.shape(name)), files.dtype(name), partial(files.read, name))
        for name in files.names
    }


def _incomplete(checkpoint: str | os.PathLike, reason: object) -> ValueError:
    # Torch's sentences are long, and those of the system end with the name of a file.
    told = shorten(str(reason), 600, placeholder=" ...") or "it is cut short"
    return ValueError(
        f"`{checkpoint}` is incomplete or corrupt: {told}. Take an earlier checkpoint of the training, or copy it "
        "again."
    )


class _SafeReader(FileSystemReader):
    """Torch's reader, which refuses metadata that would run code or name files elsewhere."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        for place in metadata.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"its .metadata names the file `{place.relative_path}`")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the types that `torch.distributed.checkpoint` itself puts into its metadata."""

    _allowed = {
        "torch.distributed.checkpoint.metadata": (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
        "collections": ("OrderedDict",),
        "pathlib": ("PosixPath", "PurePosixPath"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self._allowed.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its .metadata names `{module}.{name}`, which is none of its own types")


def _sharded_tensors(reader: FileSystemReader, prefix: str = "") -> dict[str, StoredTensor]:
    try:
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
    except _UNREADABLE as error:
        raise _incomplete(reader.path, f".metadata cannot be read ({error})") from error

    def read(key: str, described: TensorStorageMetadata) -> torch.Tensor:
        tensor = torch.empty(described.size, dtype=described.properties.dtype)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({key: tensor}, metadata, is_coordinator=True)
        try:
            reader.read_data(planner.create_local_plan(), planner).wait()
        except _UNREADABLE as error:
            raise _incomplete(reader.path, f"its `{key}` cannot be read ({error})") from error
        return tensor

    found = {}
    for key, described in metadata.state_dict_metadata.items():
        if isinstance(described, TensorStorageMetadata):
            if sum(prod(chunk.sizes) for chunk in described.chunks) != prod(described.size):
                raise _incomplete(reader.path, f"parts of `{key}` are missing")
            size, dtype = tuple(described.size), described.properties.dtype
            found[key.removeprefix(prefix)] = StoredTensor(size, dtype, partial(read, key, described))
    return found


def _gathered_tensors(path: Path) -> dict[str, StoredTensor]:
    with _pickles_run_no_code(path):
        weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return {key: StoredTensor.of(tensor) for key, tensor in weights.items()}


def _zero_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """By the function behind DeepSpeed's `zero_to_fp32.py`, which puts a tensor together when it is asked for."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ImportError(f"`{checkpoint}` is a checkpoint of DeepSpeed. Run: pip install deepspeed") from error
    types = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with _pickles_run_no_code(checkpoint), torch.serialization.safe_globals(types), redirect_stdout(sys.stderr):
        tensors = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
        return {key: StoredTensor.of(tensor) for key, tensor in tensors.items()}


@contextmanager
def _pickles_run_no_code(path: Path) -> Iterator[None]:
    try:
        with patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}):  # DeepSpeed asks for the opposite
            yield
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"`{path}` {f'names `{name[1]}`' if name else 'is not a file of tensors'}, and could run code when it is "
            "read: it is refused. Consolidate it with the engine's own tool if you trust where it comes from."
        ) from error
    except _UNREADABLE as error:
        raise _incomplete(path, error) from error
