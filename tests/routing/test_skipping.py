"""`skip_experts` leaves out what it says, computes what is left, and shows watchers what the routers chose."""

import pytest
import torch

from hf_sparse_moe.adapters import expert_lora_config
from hf_sparse_moe.routing import record_routing, skip_experts, use_top_k
from routing.test_mixture_layers import build, inputs_of
from tiny_models import tiny_inputs, tiny_sparse


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model, labels=False, pads=2)).logits


@pytest.mark.parametrize("backend", ["eager", "sparse_moe", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_ends_of_beta(name, backend):
    model = tiny_sparse(name, num_experts_per_tok=3)
    model.set_experts_implementation(backend)
    before = logits(model)
    with skip_experts(model, 0.0) as skipped:
        torch.testing.assert_close(logits(model), before)
    assert skipped.share == 0
    assert skipped.assignments > 0
    with use_top_k(model, 1):  # whose weight is 1, as that of the one expert left
        best_alone = logits(model)
    with skip_experts(model, 1.0) as skipped:
        torch.testing.assert_close(logits(model), best_alone)
    assert skipped.share == pytest.approx(2 / 3)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("folder", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_stock_mixtures(folder):
    model = build(folder).eval()
    inputs = inputs_of(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        with skip_experts(model, 1.0) as skipped:
            changed = model(**inputs)[0]
        assert skipped.share >= 0.5
        assert not torch.equal(changed, before)
        assert torch.equal(model(**inputs)[0], before)


def test_weights_of_those_left_and_what_watchers_see(monkeypatch):
    model = tiny_sparse("llama", num_experts_per_tok=3)
    with record_routing(model) as recorded:
        logits(model)
    seen = []
    for block in model.sparse_blocks:
        monkeypatch.setattr(block.experts, "forward", lambda x, index, weights: seen.append((index, weights)) or x)
    with skip_experts(model, 0.7), record_routing(model) as again:
        logits(model)
    weights = recorded[0][0].top_k_weights
    assert torch.equal(again[0][0].top_k_index, recorded[0][0].top_k_index)
    index, left = seen[0]
    weak = weights < 0.7 * weights[:, :1]
    assert weak.any()
    assert torch.equal(index == 4, weak)
    assert torch.equal(left == 0, weak)
    torch.testing.assert_close(left.sum(-1), weights.sum(-1))
    torch.testing.assert_close(left[:, 1] / left[:, 0], (weights[:, 1] / weights[:, 0]).masked_fill(weak[:, 1], 0.0))


def test_the_median_skips_half():
    model = tiny_sparse("llama")
    inputs = tiny_inputs(model, labels=False, batch=8, length=16)
    with skip_experts(model, "median", [inputs]) as skipped, torch.no_grad():
        model(**inputs)
    assert len(skipped.betas) == 2
    assert skipped.share == pytest.approx(0.25, abs=0.02)  # of two experts, one, for half of the tokens


def test_an_adapter_is_refused():
    from peft import get_peft_model

    model = get_peft_model(tiny_sparse("llama"), expert_lora_config(tiny_sparse("llama")))
    with pytest.raises(ValueError, match="merge_and_unload"), skip_experts(model, 1.0):
        pass


@pytest.mark.parametrize(
    ("kind", "beta", "message"),
    [
        ("top_k", 1.5, "from 0 to 1"),
        ("top_k", "median", "pass `batches`"),
        ("expert_choice", 0.5, "choose their tokens"),
    ],
)
def test_refusals(kind, beta, message):
    model = tiny_sparse("bert", router_type=kind)
    with pytest.raises(ValueError, match=message), skip_experts(model, beta):
        pass
