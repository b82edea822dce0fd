"""The dense layers of a mixture become sparse later, and it goes on computing what it computed."""

import pytest
import torch

from hf_sparse_moe import upcycle
from tiny_models import tiny_dense, tiny_inputs, tiny_sparse


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_more_layers_keep_the_function(name, tmp_path):
    kinds = {"encoder": [1], "decoder": [0]} if name == "bart" else [1]
    more = {"encoder": [0]} if name == "bart" else [0]
    first = upcycle(tiny_dense(name), num_experts=3, layers=kinds)
    with torch.no_grad():  # what was trained stays
        for block in first.sparse_blocks:
            block.experts.down_proj.add_(0.1 * torch.randn_like(block.experts.down_proj))
            block.gate.weight.normal_()
    grown = upcycle(first, layers=more, seed=7)
    assert len(grown.sparse_blocks) == len(first.sparse_blocks) + 1
    inputs = tiny_inputs(first)
    torch.testing.assert_close(grown(**inputs).logits, first(**inputs).logits)
    kept = grown.state_dict()
    for key, tensor in first.state_dict().items():
        assert key not in kept or torch.equal(kept[key], tensor), key
    grown.save_pretrained(tmp_path / "grown")
    loaded = type(grown).from_pretrained(tmp_path / "grown")
    assert torch.equal(loaded(**inputs).logits, grown(**inputs).logits)
    assert loaded.receipt["more_layers"]["from"]["arguments"]["method"] == "copy"


def test_refusals():
    mixture = tiny_sparse("llama", mlp_layer_types=["dense", "sparse"])
    with pytest.raises(ValueError, match="mixture already"):
        upcycle(mixture, layers=[1])
    with pytest.raises(ValueError, match="`layers` and `seed` alone"):
        upcycle(mixture, num_experts=4)
    with pytest.raises(ValueError, match="experts of this method have 48"):
        upcycle(tiny_sparse("llama", mlp_layer_types=["dense", "sparse"], moe_intermediate_size=24))
    with pytest.raises(ValueError, match="shared experts"):
        upcycle(tiny_sparse("llama", mlp_layer_types=["dense", "sparse"], num_shared_experts=1))
