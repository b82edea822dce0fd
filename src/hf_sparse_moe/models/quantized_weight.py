"""Matrices in 8 or 4 bits a weight (QLoRA, arXiv 2305.14314), which every product reads as floats."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


BLOCK_SIZE = 64  # values that share one scale
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what the kernels read and write
_NO_FLOATS = (
    "Quantised experts have no floats in memory, which `torch.save` and hand-written kernels need. Save with "
    '`save_pretrained`, run the model with `experts_implementation="sparse_moe"`, or call `dequantize_experts(model)`.'
)

aten = torch.ops.aten


class QuantizedWeight(torch.Tensor):
    """
    Matrices of one shape, each value an 8- or 4-bit code times the largest magnitude of its block of 64 values.

    8 bits are 255 even steps, so that a value is off by at most 1/254 of its block's largest; 4 bits are NF4 (QLoRA,
    appendix E), off by at most 0.152 of it. The kernels are bitsandbytes'.

    It has shape, dtype and device of the float tensor. What chooses a matrix, transposes, casts or moves it keeps the
    codes; any other operation is given the floats, for as long as it runs, so that autograd too keeps the codes
    between forward and backward. All of it can be written at once, as `load_state_dict` does; changing it is refused.

    Args:
        codes (`torch.ByteTensor` of shape `(*, bytes)`): Those of each matrix, padded to whole blocks.
        scales (`torch.FloatTensor` of shape `(*, blocks)`): The largest magnitude of each block.
        matrix (`tuple[int, int]`): Rows and columns of a matrix as it is stored.
        dtype (`torch.dtype`): In which it computes.
        transposed (`bool`): Whether it stands for the transposes of the stored matrices.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    matrix: tuple[int, int]
    transposed: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, codes, scales, matrix, dtype, transposed=False) -> QuantizedWeight:
        like = torch.empty(*codes.shape[:-1], *matrix, device="meta")
        like = like.mT if transposed else like
        with torch.inference_mode(False):  # what stands for a parameter may outlive the inference
            self = torch.Tensor._make_wrapper_subclass(
                cls, like.shape, strides=like.stride(), dtype=dtype, device=codes.device
            )
        self.codes, self.scales, self.matrix, self.transposed = codes, scales, matrix, transposed
        return self

    @classmethod
    def quantize(cls, weight: torch.Tensor, bits: int) -> QuantizedWeight:
        """From `(E, out, in)` in any float dtype, matrix by matrix."""
        blocks = -(-prod(weight.shape[1:]) // BLOCK_SIZE)
        codes = weight.new_empty(len(weight), blocks * BLOCK_SIZE * bits // 8, dtype=torch.uint8)
        scales = weight.new_empty(len(weight), blocks, dtype=torch.float32)
        for expert, matrix in enumerate(weight.detach()):
            codes[expert], scales[expert] = _encode(matrix, bits)
        return cls(codes, scales, (weight.shape[1], weight.shape[2]), weight.dtype)

    def dequantize(self) -> torch.Tensor:
        """The floats."""
        values = _decode(self.codes, self.scales, self.dtype if self.dtype in _FLOATS else torch.float32)
        values = values[..., : prod(self.matrix)].to(self.dtype).contiguous().unflatten(-1, self.matrix)
        return values.mT if self.transposed else values

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 * self.codes.numel() // (self.scales.numel() * BLOCK_SIZE)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def data_ptr(self) -> int:
        """Refused: a hand-written kernel would read memory that does not exist."""
        raise NotImplementedError(_NO_FLOATS)

    storage = data_ptr  # a file of weights would be made of it

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeight:
        copied = self.detach().clone()  # torch's own asks for `data_ptr`
        return memo.setdefault(id(self), nn.Parameter(copied, False) if isinstance(self, nn.Parameter) else copied)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QuantizedWeight({tuple(self.shape)}, {self.dtype}, {self.nbytes} bytes, device={self.device})"

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor] = lambda part: part, **changes) -> QuantizedWeight:
        settings = {"matrix": self.matrix, "dtype": self.dtype, "transposed": self.transposed, **changes}
        return QuantizedWeight(change(self.codes), change(self.scales), **settings)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            if (kept := _KEEPS_CODES.get(func)) and (result := kept(first, *args[1:], **kwargs)) is not None:
                return result
            if func in _MAKES_NEW:
                return func(first.codes.new_empty((), dtype=first.dtype).expand(first.shape), *args[1:], **kwargs)
            if func._schema.is_mutable or func is aten.split.Tensor:  # FSDP would split floats
                raise NotImplementedError(
                    f"`{func}` would change quantised experts, or share them out over ranks; codes cannot follow. "
                    "Keep them frozen and whole on each rank (`DistributedDataParallel`, or `ignored_params` of "
                    "`fully_shard`), or call `dequantize_experts(model)` first."
                )
        # In inference mode, operations arrive before torch has taken them apart into those below.
        if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
            return result
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def __tensor_flatten__(self):
        return ["codes", "scales"], (self.matrix, self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(tensors, settings, outer_size, outer_stride):
        return QuantizedWeight(tensors["codes"], tensors["scales"], *settings)


def _cast(weight: QuantizedWeight, *, dtype=None, device=None, non_blocking=False, **_) -> QuantizedWeight:
    """On the same device it shares the codes: autograd may keep what a product cast."""
    move = {"device": device or weight.device, "non_blocking": non_blocking}
    return weight._with(lambda part: part.to(**move), dtype=dtype or weight.dtype)


def _choose(weight: QuantizedWeight, dim: int, index: int) -> QuantizedWeight | None:
    return weight._with(lambda part: part[index]) if dim == 0 and weight.dim() == 3 else None


def _choose_several(weight: QuantizedWeight, dim: int, index: torch.Tensor) -> QuantizedWeight | None:
    return weight._with(lambda part: part[index]) if dim == 0 and weight.dim() == 3 else None


def _transpose(weight: QuantizedWeight, first: int = -1, second: int = -2) -> QuantizedWeight | None:
    last_two = {weight.dim() - 1, weight.dim() - 2}
    is_matrix = {first % weight.dim(), second % weight.dim()} == last_two
    return weight._with(transposed=not weight.transposed) if is_matrix else None


def _write(weight: QuantizedWeight, source: torch.Tensor, non_blocking: bool = False) -> QuantizedWeight | None:
    """All of it at once, as loading a state dict and DistributedDataParallel do; what it holds already stays."""
    if weight.dim() == 2 or weight.transposed:
        return None
    if not isinstance(source, QuantizedWeight):
        source = QuantizedWeight.quantize(source.to(weight.device, weight.dtype), weight.bits)
    weight.codes.copy_(source.codes)
    weight.scales.copy_(source.scales)
    return weight


# None where they must read floats after all.
_KEEPS_CODES: dict[Any, Callable[..., QuantizedWeight | None]] = {
    aten.detach.default: QuantizedWeight._with,
    aten.alias.default: QuantizedWeight._with,
    aten.clone.default: lambda weight, **_: weight._with(torch.clone),
    aten._to_copy.default: _cast,
    aten.copy_.default: _write,
    aten.select.int: _choose,
    aten.index_select.default: _choose_several,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
}
_MAKES_NEW = {aten.new_empty.default, aten.new_zeros.default, aten.empty_like.default, aten.zeros_like.default}


@cache
def _even_steps(device: torch.device) -> torch.Tensor:
    """255 of them from -1 to 1, zero among them; one code stays unused."""
    steps = torch.linspace(-1, 1, 255, device=device)
    return torch.cat([steps, steps[-1:]])


@cache
def _operators() -> Any:
    import_module("bitsandbytes")  # registers them; transformers refuses code whose imports are not installed
    return torch.ops.bitsandbytes


def _encode(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = F.pad(matrix.flatten(), (0, -matrix.numel() % BLOCK_SIZE))
    values = values if values.dtype in _FLOATS else values.float()
    if bits == 8:
        steps = _even_steps(values.device)
        codes, scales = _operators().quantize_blockwise(values, steps, BLOCK_SIZE)
    else:
        codes, scales = _operators().quantize_4bit(values, BLOCK_SIZE, "nf4", torch.uint8)
    return codes.flatten(), scales


def _decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(*, values)` of `codes` (*, bytes) and `scales` (*, blocks)."""
    shape, scales = (*scales.shape[:-1], -1), scales.flatten()
    if codes.numel() == BLOCK_SIZE * len(scales):
        steps = _even_steps(codes.device)
        values = _operators().dequantize_blockwise(codes.flatten(), scales, steps, BLOCK_SIZE, dtype)
    else:
        blocks = (len(scales), BLOCK_SIZE)
        values = _operators().dequantize_4bit(codes.flatten(), scales, BLOCK_SIZE, "nf4", blocks, dtype)
    return values.view(shape)
