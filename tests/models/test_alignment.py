"""Sizes that torch's grouped product refuses still work, with one line in the log."""

import pytest
import torch

from hf_sparse_moe import upcycle
from tiny_models import tiny_inputs, tiny_sparse


@pytest.mark.parametrize(("size", "dtype"), [(37, torch.float32), (44, torch.bfloat16)])
def test_unaligned_experts_run_eagerly(size, dtype, caplog):
    model = tiny_sparse("decoder", moe_intermediate_size=size).to(dtype)
    assert not model.sparse_blocks[0].experts.is_aligned
    inputs = tiny_inputs(model)
    model.set_experts_implementation("grouped_mm")
    grouped = model(**inputs).logits
    model.set_experts_implementation("eager")
    assert torch.equal(grouped, model(**inputs).logits)


def test_aligned_experts_do_not():
    assert tiny_sparse("decoder").sparse_blocks[0].experts.is_aligned


@pytest.mark.needs_data("stories260k")
def test_stories260k_in_bfloat16(data_dir):
    model = upcycle(str(data_dir / "stories260k" / "hf"), num_experts=4, dtype=torch.bfloat16)
    assert model.receipt["equality"]["max_abs_difference"] < 0.5
