"""Merged experts are the weighted means of matched ones, in every form that experts are stored in."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_sparse_moe.routing import find_mixture_layers
from hf_sparse_moe.surgery import merge_experts
from hf_sparse_moe.surgery.measurements import ExpertMeasurements, LayerMeasurements, router_sha256
from hf_sparse_moe.surgery.measuring import measure_experts
from hf_sparse_moe.surgery.merging import METHODS
from routing.test_mixture_layers import build, inputs_of
from tiny_models import tiny_inputs, tiny_sparse


def facts(model):
    """Measurements by which neighbours are most like each other, the first of them the more salient."""
    layers = []
    for layer in find_mixture_layers(model):
        experts = torch.arange(layer.num_experts)
        outputs = torch.nn.functional.one_hot(experts // 2).float() + 0.01 * (experts % 2)[:, None]
        tokens = (3.0 - 2.0 * (experts % 2))[None]
        likeness = torch.nn.functional.cosine_similarity(outputs[:, None], outputs[None], dim=-1)
        sha256 = router_sha256(layer.router.state_dict())
        tensors = {"tokens": tokens, "weighted_norms": tokens**2, "mean_outputs": outputs}
        tensors |= {"similarity": likeness, "logits": outputs.T}
        layers.append(LayerMeasurements(layer.name, layer.num_experts, layer.top_k, sha256, tensors))
    return ExpertMeasurements(("all",), layers, None)


@torch.no_grad()
def with_permuted_twins(model):
    """Each second expert becomes the first with its hidden units in another order."""
    for layer in find_mixture_layers(model):
        experts = layer.experts
        units = experts.down_proj.shape[1 if getattr(experts, "is_transposed", False) else 2]
        transposed, in_turn = getattr(experts, "is_transposed", False), not getattr(experts, "is_concatenated", True)
        for twin in range(1, layer.num_experts, 2):
            order = torch.randperm(units)
            for name, parameter in experts.named_parameters(recurse=False):
                axis = None if name == "down_proj_bias" else 0
                if parameter.dim() == 3:
                    axis = int((name == "down_proj") != transposed)
                whole = parameter[twin - 1]
                if axis is not None:
                    times = whole.shape[axis] // units
                    index = [times * order + part if in_turn else order + part * units for part in range(times)]
                    index = torch.stack(index, dim=1).flatten() if in_turn else torch.cat(index)
                    whole = whole.index_select(axis, index)
                parameter[twin] = whole
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_permuted_twin_merges_into_its_first(method, name):
    model = with_permuted_twins(tiny_sparse(name, num_experts_per_tok=1))
    merged = merge_experts(model, facts(model), into=2, method=method)
    blind = merge_experts(model, facts(model), into=2, method=method, align=False)
    for block, before, other in zip(merged.sparse_blocks, model.sparse_blocks, blind.sparse_blocks, strict=True):
        assert block.experts.num_experts == 2
        assert torch.equal(block.gate.weight, before.gate.weight[::2])
        for key, parameter in block.experts.named_parameters(recurse=False):
            assert torch.equal(parameter, before.experts.get_parameter(key)[::2]), key
        assert not torch.equal(other.experts.down_proj, block.experts.down_proj)
    groups = next(iter(merged.receipt["merged"]["groups"].values()))
    assert groups == [[0, 1], [2, 3]]


@pytest.mark.parametrize("folder", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe"])
def test_stock_mixtures(folder, tmp_path):
    model = build(folder).eval()
    count = find_mixture_layers(model)[0].num_experts
    model = with_permuted_twins(model)
    inputs = inputs_of(model)
    merged = merge_experts(model, facts(model), into=count // 2)
    for new, old in zip(find_mixture_layers(merged), find_mixture_layers(model), strict=True):
        for key, parameter in new.experts.named_parameters(recurse=False):
            torch.testing.assert_close(parameter, old.experts.get_parameter(key)[::2], rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "whole")
    merge_experts(tmp_path / "whole", facts(model), into=0.5, output=tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, merged(**inputs).logits)


@pytest.mark.parametrize("method", METHODS)
def test_means_are_weighted_by_what_was_measured(method):
    model = tiny_sparse("llama")
    measured = measure_experts(model, [tiny_inputs(model, batch=8, length=16)])
    merged = merge_experts(model, measured, into=3, method=method, align=False)
    for place, groups in enumerate(merged.receipt["merged"]["groups"].values()):
        facts = measured.layers[place]
        salience = facts.frequency if method == "m-smoe" else facts.reap
        old, new = (each.sparse_blocks[place].experts.down_proj for each in (model, merged))
        for number, group in enumerate(groups):
            assert group[0] == max(group, key=lambda e: salience[e])
            expected = sum(salience[e] * old[e] for e in group) / salience[group].sum()
            torch.testing.assert_close(new[number], expected.to(new.dtype))


def test_bad_input():
    model = tiny_sparse("llama")
    with pytest.raises(ValueError, match="`method='mean'` is not allowed"):
        merge_experts(model, facts(model), into=2, method="mean")
    with pytest.raises(ValueError, match="`into=9` is not allowed"):
        merge_experts(model, facts(model), into=9)
    with pytest.raises(ValueError, match="2 serve each token"):
        merge_experts(model, facts(model), into=1)
    with pytest.raises(ValueError, match="`into` names layer 7"):
        merge_experts(model, facts(model), into={7: 2})
    grouped = tiny_sparse("llama", num_experts=8, n_group=4, topk_group=2)
    with pytest.raises(ValueError, match="limits the groups"):
        merge_experts(grouped, facts(grouped), into=4)
