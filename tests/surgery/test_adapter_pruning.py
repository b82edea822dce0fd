"""An adapter of the whole mixture is refused by the cut one, unless it is cut along."""

import pytest
import torch

from hf_sparse_moe import disable_experts, load_adapter, prune_experts
from hf_sparse_moe.surgery import prune_adapter
from hub_adapters import load, save_adapter, save_base
from tiny_models import tiny_inputs, tiny_sparse


DROPPED = {0: [1], 1: [2]}
EXPERTS = {f"dense.model.layers.{layer}.mlp.experts": [0, 3] for layer in range(2)}


@pytest.fixture
def folders(tmp_path):
    base = save_base(tmp_path / "base")
    prune_experts(base, drop=DROPPED, output=tmp_path / "pruned")
    return tmp_path


@pytest.mark.parametrize("arguments", [{}, {"experts": EXPERTS}], ids=["all experts", "some"])
def test_cut_along(arguments, folders):
    whole = save_adapter(folders / "adapter", folders / "base", **arguments)
    prune_adapter(folders / "adapter", folders / "pruned", folders / "cut")
    inputs = tiny_inputs(whole, labels=False, pads=2)
    with torch.no_grad():
        with disable_experts(whole, DROPPED):
            expected = whole(**inputs).logits
        bare = load(folders / "pruned")
        without = bare(**inputs).logits
        found = load_adapter(bare, folders / "cut").eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert (without - found).abs().max() > 1e-3


def test_refused_as_it_is(folders):
    save_adapter(folders / "adapter", folders / "base")
    with pytest.raises(ValueError):
        load_adapter(load(folders / "pruned"), folders / "adapter")


def test_bad_input(folders):
    save_adapter(folders / "adapter", folders / "base")
    with pytest.raises(ValueError, match="has no receipt of a cut"):
        prune_adapter(folders / "adapter", folders / "base", folders / "cut")
    model = tiny_sparse("llama")
    with torch.no_grad():
        model.sparse_blocks[0].gate.weight.add_(1)
    model.save_pretrained(folders / "other")
    prune_experts(folders / "other", drop=DROPPED, output=folders / "other_pruned")
    with pytest.raises(ValueError, match="trained on another mixture"):
        prune_adapter(folders / "adapter", folders / "other_pruned", folders / "cut")
    only = {name: [1] for name in list(EXPERTS)[:1]}
    save_adapter(folders / "narrow", folders / "base", experts=only)
    with pytest.raises(ValueError, match="nothing is left of it"):
        prune_adapter(folders / "narrow", folders / "pruned", folders / "cut")
    assert not (folders / "cut").exists()
