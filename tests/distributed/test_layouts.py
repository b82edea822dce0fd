"""An architecture of each common feed-forward layout, shared out over 2 and 4 processes, computes what one does."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from hf_sparse_moe.models.feed_forward import find_feed_forwards
from processes import in_processes
from tiny_models import tiny_dense, tiny_inputs, tiny_sparse


LAYOUTS = {
    "gate_up_down": "qwen3",
    "packed_gate_up": "phi3",
    "packed_wi_wo": "modernbert",
    "wi_0_wi_1_wo": "t5_gated",
    "wi_wo": "t5",
    "c_fc_c_proj": "gpt2",
    "dense_4h": "gpt_neox",
    "lin1_lin2": "distilbert",
    "inline_fc1_fc2": "bart",
    "split_intermediate_output": "bert",
}


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Every rank sees the same batch, so that the mean of their gradients is that of one process; without dropout."""
    loss = model(**tiny_inputs(model)).loss
    loss.backward()
    gradients = {
        name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), gradients


def compute_in_parts(folder: Path, ranks: int) -> None:
    for name in LAYOUTS.values():
        whole = tiny_sparse(name)
        sizes = {"fsdp_size": ranks, "ep_size": ranks}
        if ranks == 4 and whole.tp_plan and not any(block.experts.biased for block in whole.sparse_blocks):
            sizes = {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}
        parts = type(whole).from_pretrained(folder / name, distributed_config=DistributedConfig(**sizes))
        (expected, wanted), (loss, found) = loss_and_gradients(whole), loss_and_gradients(parts)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0, msg=name)
        assert found.keys() == wanted.keys(), name
        largest = max(gradient.norm() for gradient in wanted.values())  # that of a key's bias is 0 but for rounding
        for key, gradient in wanted.items():
            distance = (found[key] - gradient).norm()
            assert distance < 1e-5 * gradient.norm() + 1e-6 * largest, (name, sizes, key)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_layout_computes_in_parts_what_it_does_whole(ranks, tmp_path):
    for layout, name in LAYOUTS.items():
        model = tiny_sparse(name)
        assert {found.layout.name for found in find_feed_forwards(tiny_dense(name))} == {layout}
        model.save_pretrained(tmp_path / name)
    assert in_processes(ranks, compute_in_parts, tmp_path, ranks) == [0] * ranks
