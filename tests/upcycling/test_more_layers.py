"""A mixture grows, by layers or by experts that are needed, and goes on computing what it computed."""

from types import SimpleNamespace

import pytest
import torch

from hf_sparse_moe import expand, upcycle
from hf_sparse_moe.routing import record_routing
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


def carrying(*loads):
    """Measurements of two layers."""
    layer = SimpleNamespace(reap=torch.tensor(loads), tokens=torch.ones(len(loads)))
    return SimpleNamespace(layers=[layer, layer])


@pytest.mark.parametrize("normalised", [True, False])
def test_experts_that_carry_more_are_copied_more(normalised):
    model = tiny_sparse("llama", scoring_func="sigmoid", norm_topk_prob=normalised)
    for block in model.sparse_blocks:
        block.gate.e_score_correction_bias.copy_(torch.tensor([0.2, -0.1, 0.0, 0.3]))
    grown = expand(model, 2, by=carrying(9.0, 1.0, 3.0, 1.0))
    assert list(grown.receipt["expanded"]["copied"].values()) == [[0, 0, 0, 2]] * 2
    assert (grown.config.num_experts, grown.config.num_experts_per_tok) == (8, 2)
    inputs = tiny_inputs(model)
    with record_routing(model) as before, record_routing(grown) as after:
        torch.testing.assert_close(grown(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    for place in (0, 1):
        assert torch.equal(after[0][place].top_k_index, before[0][place].top_k_index)
    experts, old = grown.sparse_blocks[0].experts.down_proj, model.sparse_blocks[0].experts.down_proj
    assert torch.equal(experts, old[[0, 1, 2, 3, 0, 0, 0, 2]])
    with torch.no_grad():  # awake, they are chosen
        grown.sparse_blocks[0].gate.e_score_correction_bias.zero_()
    with record_routing(grown) as after:
        grown(**inputs)
    assert (after[0][0].top_k_index >= 4).any()


def test_growing_by_need_is_refused():
    with pytest.raises(ValueError, match="scoring_func"):
        expand(tiny_sparse("llama"), 2, by=carrying(1.0, 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="another model"):
        expand(tiny_sparse("llama", scoring_func="sigmoid"), 2, by=carrying(1.0, 1.0))
