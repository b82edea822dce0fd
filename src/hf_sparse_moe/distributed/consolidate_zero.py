"""The weights in a checkpoint of DeepSpeed's ZeRO, stages 1 to 3, read without DeepSpeed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

from .consolidate_fsdp import in_memory, load_pickle
from .consolidate_parts import Run, StoredTensor, incomplete


class _Ignored:
    """Takes the place of what DeepSpeed saves beside the weights."""

    def __init__(self, *arguments: Any):
        pass


# DeepSpeed's own types in its files, and what stands in for them: none of its code runs.
_TYPES: list[tuple[Callable, str]] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def zero_tensors(checkpoint: Path) -> dict[str, StoredTensor]:
    """
    The model's tensors by their keys: parameters from the float32 copies that the optimizer's partitions hold, buffers
    and frozen parameters as the model held them.

    Args:
        checkpoint (`Path`): The folder with `latest` and `global_step...`.

    Raises:
        ValueError: a partition that is missing or cut short, a parallelism beside ZeRO, or files that would run code.
    """
    folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip()
    if folder.parent != checkpoint or not folder.is_dir():
        raise incomplete(checkpoint, "it lacks the folder that `latest` names")
    try:
        return _tensors(folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"its files are not those of ZeRO ({type(error).__name__}: {error})"
        raise incomplete(folder, reason) from error


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    ranks = [load_pickle(path, _TYPES)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
    models = [load_pickle(path, _TYPES) for path in _by_rank(folder, "*_model_states.pt")]
    if not ranks or not models:
        raise incomplete(folder, "it lacks the states of model or optimizer")
    stage, counts = int(ranks[0]["zero_stage"]), ranks[0]["partition_count"]
    world = max(counts) if isinstance(counts, list) else counts
    if len(ranks) != world or len(models) != (world if stage == 3 else 1):
        raise incomplete(folder, f"{world} ranks wrote it, and it has the files of {len(ranks)}")
    model = models[0]
    found = {key: in_memory(model["module"][key]) for key in model["buffer_names"]}
    groups = model["param_shapes"]
    if stage == 3:
        flats = [rank["fp32_flat_groups"] for rank in ranks]
        shapes = dict(chain.from_iterable(group.items() for group in groups))
        found |= dict(_interleaved(shapes, [_Flat(list(flat)) for flat in flats]))
        frozen = model["frozen_param_shapes"] or {}
        fragments = [_Flat([one["frozen_param_fragments"][key] for key in frozen]) for one in models]
        found |= dict(_interleaved(frozen, fragments))
    else:
        for number, shapes in enumerate(groups):
            flat = _Flat([rank["single_partition_of_fp32_groups"][number] for rank in ranks])
            paddings = (ranks[0].get("param_alignment_paddings") or {number: [0] * len(shapes)})[number]
            found |= dict(_consecutive(shapes, flat, paddings))
        found |= {key: in_memory(tensor) for key, tensor in (model["frozen_param_fragments"] or {}).items()}
    return found


class _Flat:
    """Flat tensors one behind the other, as if they were one."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = tensors
        self.size = sum(tensor.numel() for tensor in tensors)
        self.dtype = tensors[0].dtype if tensors else torch.float32

    def read(self, begin: int, count: int) -> Iterator[torch.Tensor]:
        for tensor in self.tensors:
            if count > 0 and begin < tensor.numel():
                piece = tensor.reshape(-1)[begin : begin + count]
                count -= len(piece)
                begin = 0
                yield piece
            else:
                begin = max(0, begin - tensor.numel())


def _consecutive(shapes: dict, flat: _Flat, paddings: list[int]) -> Iterator[tuple[str, StoredTensor]]:
    """Stages 1 and 2: the group's parameters follow on each other, cut among the ranks anywhere."""
    begin = 0
    for (key, shape), padding in zip(shapes.items(), paddings, strict=True):
        count = prod(shape)
        available = max(0, min(count, flat.size - begin))
        yield key, StoredTensor(tuple(shape), flat.dtype, [Run(0, available, partial(flat.read, begin, count))])
        begin += count + padding


def _interleaved(shapes: dict, ranks: list[_Flat]) -> Iterator[tuple[str, StoredTensor]]:
    """Stage 3: every parameter is cut in as many equal parts as there are ranks, the last one padded."""
    begin = 0
    for key, shape in shapes.items():
        count = prod(shape)
        part = ceil(count / len(ranks))
        runs = []
        for number, flat in enumerate(ranks):
            start = number * part
            size = max(0, min(part, count - start, flat.size - begin))
            if size:
                runs.append(Run(start, size, partial(flat.read, begin, size)))
        yield key, StoredTensor(tuple(shape), ranks[0].dtype, runs)
        begin += part


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    numbered = {}
    for path in folder.glob(pattern):
        match = re.fullmatch(r"(?:bf16_)?(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_\w+\.pt", path.name)
        if match is None or int(match[2]) != 0:
            raise ValueError(
                f"`{path}` is of a training with tensor or expert parallelism of DeepSpeed's own, which is not "
                "supported. Consolidate it with DeepSpeed's tools."
            )
        numbered[int(match[1] or 0)] = path
    if sorted(numbered) != list(range(len(numbered))):
        raise incomplete(folder, f"it has the files of the ranks {sorted(numbered)} only")
    return [numbered[rank] for rank in sorted(numbered)]
