"""
The two grouped products of an experts layer, in Triton: rows times each expert's matrix, and the matrices' gradients.

R rows sorted by expert, `offsets` (E + 1,) with the first row of each expert, all on the device: nothing waits for the
host. Rows may be read through an index and written through another, so that no permuted copy of the activations is
made; a row's weight may be multiplied in on the way.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl


NO_GATE, SILU, GELU, GELU_TANH, RELU = 0, 1, 2, 3, 4
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _configs(*fields: tuple[int, int, int, int]) -> list[triton.Config]:
    """Tile sizes to choose among by timing, which the interpreter cannot: it takes small ones."""
    if INTERPRETED:
        return [triton.Config({"BLOCK_N": 32, "BLOCK_K": 32})]
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in fields
    ]


@triton.jit
def _dot(left, right, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.autotune(
    configs=_configs((64, 32, 4, 4), (64, 64, 4, 3), (128, 32, 4, 4), (128, 64, 8, 3), (256, 32, 8, 3)),
    key=["N", "K", "GATE", "BLOCK_M", "PRECISION"],
)
@triton.jit
def _rows_kernel(
    x, weight, bias, row_scale, read_index, write_index, out, activated, offsets, block_expert, first_block,
    N, K, x_stride, weight_stride_e, weight_stride_n, weight_stride_k, bias_stride, out_stride, activated_stride,
    NUM_EXPERTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, READ_INDEX: tl.constexpr,
    WRITE_INDEX: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, column_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(block_expert + block)
    if expert < NUM_EXPERTS:
        stop = tl.load(offsets + expert + 1)
        rows = tl.load(offsets + expert) + (block - tl.load(first_block + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < stop
        columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = columns < N
        source = tl.load(read_index + rows, mask=row_mask, other=0) if READ_INDEX else rows
        x_rows = x + source.to(tl.int64)[:, None] * x_stride
        weight_columns = weight + expert.to(tl.int64) * weight_stride_e + columns[None, :] * weight_stride_n
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            inner_mask = inner < K
            x_tile = tl.load(x_rows + inner[None, :], mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
            tile = weight_columns + inner[:, None] * weight_stride_k
            tile_mask = inner_mask[:, None] & column_mask[None, :]
            product = _dot(x_tile, tl.load(tile, mask=tile_mask, other=0.0), product, PRECISION, UPCAST)
            if GATE:  # the up projection's rows lie N below the gate's
                up_tile = tl.load(tile + N * weight_stride_n, mask=tile_mask, other=0.0)
                second = _dot(x_tile, up_tile, second, PRECISION, UPCAST)
        if HAS_BIAS:
            bias_row = bias + expert * bias_stride + columns
            product += tl.load(bias_row, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            if GATE:
                second += tl.load(bias_row + N, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if HAS_SCALE:
            product *= tl.load(row_scale + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        target = tl.load(write_index + rows, mask=row_mask, other=0) if WRITE_INDEX else rows
        mask = row_mask[:, None] & column_mask[None, :]
        place = out + target.to(tl.int64)[:, None] * out_stride + columns[None, :]
        kind = out.dtype.element_ty
        tl.store(place, product.to(kind), mask=mask)
        if GATE:
            tl.store(place + N, second.to(kind), mask=mask)
            if GATE == 1:
                gate = product * tl.sigmoid(product)
            elif GATE == 2:
                gate = 0.5 * product * (1.0 + tl.erf(product * 0.7071067811865476))
            elif GATE == 3:
                inside = 0.7978845608028654 * (product + 0.044715 * product * product * product)
                gate = product * tl.sigmoid(2.0 * inside)  # 0.5 (1 + tanh z) is sigmoid(2 z)
            else:
                gate = tl.maximum(product, 0.0)
            place = activated + rows.to(tl.int64)[:, None] * activated_stride + columns[None, :]
            tl.store(place, (gate * second).to(kind), mask=mask)


@triton.autotune(
    configs=_configs((64, 32, 4, 4), (128, 32, 4, 3), (128, 64, 8, 3)),
    key=["M", "N", "BLOCK_M", "PRECISION"],
)
@triton.jit
def _matrices_kernel(
    left, right, row_scale, left_index, right_index, out, offsets,
    M, N, left_stride, right_stride, out_stride_e, out_stride_m, out_stride_n,
    HAS_SCALE: tl.constexpr, LEFT_INDEX: tl.constexpr, RIGHT_INDEX: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    start, stop = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, stop, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        row_mask = rows < stop
        left_rows = tl.load(left_index + rows, mask=row_mask, other=0) if LEFT_INDEX else rows
        right_rows = tl.load(right_index + rows, mask=row_mask, other=0) if RIGHT_INDEX else rows
        left_tile = tl.load(
            left + left_rows.to(tl.int64)[None, :] * left_stride + m[:, None],
            mask=row_mask[None, :] & (m < M)[:, None],
            other=0.0,
        )
        right_tile = tl.load(
            right + right_rows.to(tl.int64)[:, None] * right_stride + n[None, :],
            mask=row_mask[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if HAS_SCALE:
            scale = tl.load(row_scale + rows, mask=row_mask, other=0.0).to(tl.float32)
            left_tile = (left_tile.to(tl.float32) * scale[None, :]).to(right_tile.dtype)
        product = _dot(left_tile, right_tile, product, PRECISION, UPCAST)
    place = out + expert.to(tl.int64) * out_stride_e + m[:, None] * out_stride_m + n[None, :] * out_stride_n
    tl.store(place, product.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _block_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: about what an expert gets, within what the matrix units like."""
    if INTERPRETED:
        return 16
    return min(128, max(16, triton.next_power_of_2(triton.cdiv(num_rows, num_experts))))


def _precision() -> str:
    """float32 products as `torch.backends.cuda.matmul.allow_tf32` has them."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def rows_product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    num_rows: int,
    *,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    read_index: torch.Tensor | None = None,
    write_index: torch.Tensor | None = None,
    gate: int = NO_GATE,
    activated: torch.Tensor | None = None,
) -> None:
    """
    `out[write_index[r]] = row_scale[r] * (rows[read_index[r]] @ weight[e]^T + bias[e])` for each row r of expert e.

    Args:
        rows (`torch.Tensor` of shape `(., K)`): Contiguous along K.
        weight (`torch.Tensor` of shape `(E, N, K)`): Of any strides, so a transposed view will do.
        offsets (`torch.IntTensor` of shape `(E + 1,)`): The first row of each expert, and the end.
        num_rows (`int`): R, or more: the rows from `offsets[E]` on are left alone.
        out (`torch.Tensor` of shape `(., N)`): Contiguous along N.
        bias (`torch.Tensor` of shape `(E, N)`, *optional*): Contiguous.
        row_scale, read_index, write_index (`torch.Tensor` of shape `(R,)`, *optional*): A weight, and the places.
        gate (`int`): Where not `NO_GATE`, the first N / 2 columns are a gate: `activated` (R, N / 2) becomes
            `act(gate) * up`.
    """
    num_experts, columns, inner = weight.shape
    if num_rows == 0:
        return
    if gate:
        columns //= 2
    block = _block_rows(num_rows, num_experts)
    blocks_E = (offsets[1:] - offsets[:-1] + block - 1) // block
    last_block = blocks_E.cumsum(0)
    num_blocks = num_rows // block + min(num_experts, num_rows)  # at least the sum of `blocks_E`, known to the host
    block_expert = torch.searchsorted(
        last_block, torch.arange(num_blocks, device=offsets.device), right=True, out_int32=True
    )

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return num_blocks, triton.cdiv(columns, meta["BLOCK_N"])

    _rows_kernel[grid](
        rows, weight, bias, row_scale, read_index, write_index, out, activated, offsets, block_expert,
        (last_block - blocks_E).to(torch.int32), columns, inner, rows.stride(0), *weight.stride(),
        0 if bias is None else bias.stride(0), out.stride(0), 0 if activated is None else activated.stride(0),
        NUM_EXPERTS=num_experts, HAS_BIAS=bias is not None, HAS_SCALE=row_scale is not None,
        READ_INDEX=read_index is not None, WRITE_INDEX=write_index is not None, GATE=gate, PRECISION=_precision(),
        UPCAST=INTERPRETED, BLOCK_M=block,
    )  # fmt: skip


def matrices_product(
    left: torch.Tensor,
    right: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor,
    row_scale: torch.Tensor | None = None,
    left_index: torch.Tensor | None = None,
    right_index: torch.Tensor | None = None,
) -> None:
    """
    `out[e] = sum over expert e's rows r of row_scale[r] * left[left_index[r]] (M,) x right[right_index[r]] (N,)`:
    (E, M, N), of any strides. Experts without a row get zeros.
    """
    num_experts, height, width = out.shape
    block = 32 if INTERPRETED else 64

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(height, block), triton.cdiv(width, meta["BLOCK_N"]), num_experts

    _matrices_kernel[grid](
        left, right, row_scale, left_index, right_index, out, offsets, height, width, left.stride(0),
        right.stride(0), *out.stride(), HAS_SCALE=row_scale is not None, LEFT_INDEX=left_index is not None,
        RIGHT_INDEX=right_index is not None, PRECISION=_precision(), UPCAST=INTERPRETED, BLOCK_M=block,
    )  # fmt: skip
