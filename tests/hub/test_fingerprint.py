"""The fingerprint is the float32 one, without the model in float32 in memory; large weights are not loaded for it."""

import pytest
import torch

from adapted_models import STOCK, stock_mixture
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.hub.fingerprint import compute_in_float32, is_wanted, take_fingerprint
from hf_sparse_moe.routing.mixture_layers import find_mixture_layers
from tiny_models import tiny_sparse


@pytest.mark.parametrize("name", ["llama", "bert", "t5", *STOCK])
def test_experts_stay_as_they_are_stored(name, tmp_path):
    model = stock_mixture(name) if name in STOCK else tiny_sparse(name)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    narrow = compute_in_float32(load_whole(tmp_path, "auto"))
    taken = take_fingerprint(narrow, tmp_path)
    assert taken == take_fingerprint(load_whole(tmp_path, torch.float32), tmp_path)
    assert taken["dtype"] == "float32"
    experts = [weight for layer in find_mixture_layers(narrow) for weight in layer.experts.parameters()]
    assert {weight.dtype for weight in experts} == {torch.bfloat16}


def test_what_is_taken_by_default():
    assert is_wanted(None, 4 * 2**30)
    assert not is_wanted(None, 4 * 2**30 + 1)
    assert is_wanted(True, 10**15)
    assert not is_wanted(False, 1)
