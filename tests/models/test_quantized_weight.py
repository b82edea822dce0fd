"""A weight in 8 or 4 bits: as near to its floats as the steps allow, a float tensor to all that read it."""

import copy
import io

import pytest
import torch
from torch import nn

from hf_sparse_moe.models.quantized_weight import BLOCK_SIZE, QuantizedWeight


pytest.importorskip("bitsandbytes")

# By how much of its block's largest magnitude a value may be off: half of the widest gap between two codes. Those of
# NF4 (QLoRA, appendix E) are -1 and -0.6962.
HALF_STEP = {8: 1 / 254, 4: (1 - 0.6961928) / 2}
BITS = sorted(HALF_STEP)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantised(bits, *shape, dtype=torch.float32):
    return QuantizedWeight.quantize(drawn(*shape, dtype=dtype), bits)


def largest_of_block(weight):
    """Of each value's block of 64, which begin anew with each matrix."""
    flat = weight.abs().flatten(1)
    blocks = [block.amax(1, keepdim=True).expand_as(block) for block in flat.split(BLOCK_SIZE, dim=1)]
    return torch.cat(blocks, dim=1).view_as(weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(4, 16, 32), (3, 5, 7), (2, 1, 65), (1, 1, 1), (2, 63, 1)])
def test_every_value_is_within_half_a_step(bits, shape):
    weight = drawn(*shape)
    error = (QuantizedWeight.quantize(weight, bits).dequantize() - weight).abs()
    assert (error <= (HALF_STEP[bits] + 1e-5) * largest_of_block(weight)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept_and_costs_no_more_than_its_own_rounding(bits, dtype):
    weight = drawn(2, 8, 32, dtype=dtype)
    read = QuantizedWeight.quantize(weight, bits).dequantize()
    assert read.dtype == dtype
    limit = HALF_STEP[bits] * largest_of_block(weight).double() + torch.finfo(dtype).eps * weight.double().abs()
    assert ((read.double() - weight.double()).abs() <= 1.01 * limit + 1e-6).all()


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits):
    weight = drawn(2, 8, 32)
    weight[1] = 0
    read = QuantizedWeight.quantize(weight, bits).dequantize()
    assert not read[1].any()
    assert read[0].any()


@pytest.mark.parametrize("bits", BITS)
def test_a_chosen_transposed_or_cast_weight_keeps_its_codes(bits):
    weight = quantised(bits, 3, 5, 7)
    floats = weight.dequantize()
    for view in (lambda w: w[1], lambda w: w.mT, lambda w: w.mT[-1], lambda w: w[2].t(), lambda w: w.detach()):
        assert isinstance(view(weight), QuantizedWeight)
        assert view(weight).shape == view(floats).shape
        assert view(weight).stride() == view(floats).stride()
        assert torch.equal(view(weight).dequantize(), view(floats))
    assert weight.bfloat16().codes.data_ptr() == weight.codes.data_ptr()
    assert torch.equal(weight.bfloat16().dequantize(), floats.bfloat16())


@pytest.mark.parametrize("bits", BITS)
def test_any_other_operation_reads_floats(bits):
    weight = quantised(bits, 3, 5, 7)
    floats = weight.dequantize()
    for operation in (
        lambda w: w + 1,
        lambda w: w[:, :2],
        lambda w: w[torch.tensor([2, 0])],
        lambda w: w.transpose(0, 1),
        lambda w: w.norm(),
        lambda w: torch.stack(list(w)),
    ):
        assert torch.equal(operation(weight), operation(floats))


@pytest.mark.parametrize("make", [torch.empty_like, torch.zeros_like, lambda w: w.new_empty(2, 2)])
def test_new_tensors_are_plain_floats(make):
    made, expected = make(quantised(4, 3, 5, 8)), make(drawn(3, 5, 8))
    assert type(made) is torch.Tensor
    assert (made.shape, made.dtype, made.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_a_copy_is_of_its_own():
    parameter = nn.Parameter(quantised(8, 2, 4, 16), requires_grad=False)
    twin = copy.deepcopy(parameter)
    assert isinstance(twin, nn.Parameter)
    assert isinstance(twin, QuantizedWeight)
    before = twin.dequantize()
    parameter.copy_(drawn(2, 4, 16, seed=1))
    assert torch.equal(twin.dequantize(), before)
    assert not torch.equal(parameter.dequantize(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
def test_writing_what_it_holds_changes_nothing(bits, dtype):
    """DistributedDataParallel writes the first rank's floats into every rank's weights."""
    weight = quantised(bits, 3, 8, 32, dtype=dtype)
    codes, scales = weight.codes.clone(), weight.scales.clone()
    weight.copy_(weight.dequantize())
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.scales, scales)


def test_changing_it_in_place_is_refused():
    weight = quantised(4, 2, 4, 16)
    with pytest.raises(NotImplementedError, match="would change quantised experts"):
        weight += 1
    with pytest.raises(NotImplementedError, match="would change quantised experts"):
        weight[0].copy_(drawn(4, 16))


def test_what_reads_memory_is_refused():
    weight = quantised(4, 2, 4, 16)
    for read in (weight.data_ptr, lambda: torch.save(weight, io.BytesIO())):
        with pytest.raises(NotImplementedError, match="no floats in memory"):
            read()


def test_sharding_is_refused():
    with pytest.raises(NotImplementedError, match="share them out over ranks"):
        quantised(4, 4, 4, 16).chunk(2)


def test_parameters_outlive_inference_mode():
    weight = nn.Parameter(quantised(4, 2, 4, 16), requires_grad=False)
    inputs = drawn(3, 16)
    with torch.inference_mode():
        inferred = inputs @ weight[1].t()
        moved = weight.to(torch.bfloat16)
    inputs.requires_grad_()
    outputs = inputs @ weight[1].t()
    outputs.sum().backward()
    assert torch.equal(outputs, inferred)
    assert torch.equal(inputs.grad[0], weight[1].dequantize().sum(0))
    assert isinstance(moved, QuantizedWeight)
    assert not moved.is_inference()
