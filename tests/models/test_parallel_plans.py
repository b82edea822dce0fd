"""Every rule of a parallel plan matches something; the experts have theirs, feed-forwards that are gone have none."""

import re

import pytest

from tiny_models import ARCHITECTURES, FAMILIES, tiny_sparse


def matches(rule: str, names: list[str]) -> list[str]:
    pattern = re.compile(re.escape(rule).replace(r"\*", r"\d+") + r"(\.weight|\.bias)?$")
    return [name for name in names if pattern.match(name)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_rule_matches_and_experts_are_covered(name):
    model = tiny_sparse(name)
    names = [key for key, _ in (*model.named_modules(), *model.named_parameters())]
    biased = any(block.experts.biased for block in model.sparse_blocks)
    for plan in (model.tp_plan, model.ep_plan, model.fsdp_plan):
        assert plan or (biased and plan is model.tp_plan)
        for rule in plan:
            assert matches(rule, names), f"{rule} matches nothing"
    for plan, style in ((model.ep_plan, "ep_dispatch_experts"), (model.tp_plan, "moe_tp_experts")):
        experts = {match for rule, kind in plan.items() if kind == style for match in matches(rule, names)}
        covered = {key for key, _ in model.named_modules() if key.endswith(".experts")}
        assert experts == (set() if biased and plan is model.tp_plan else covered)
    sharded = {
        match for rule, kind in model.ep_plan.items() if kind == "grouped_gemm" for match in matches(rule, names)
    }
    assert sharded == {key for key, _ in model.named_parameters() if ".experts." in key}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_rules_of_the_dense_feed_forwards_are_gone_and_attention_s_stay(name):
    rules = tiny_sparse(name).tp_plan
    assert not any(re.search(r"mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)$", rule) for rule in rules)
    assert any("self_attn" in rule for rule in rules)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_layer_that_stays_dense_keeps_its_rules(name):
    rules = tiny_sparse(name, mlp_layer_types=["dense", "sparse"]).tp_plan
    assert any(rule.endswith("mlp.down_proj") for rule in rules)
    assert any(rule.endswith("mlp.experts.down_proj") for rule in rules)


@pytest.mark.parametrize("name", [name for names in FAMILIES.values() for name in names])
def test_packed_projections_are_split_as_packed(name):
    model = tiny_sparse(name)
    for rule, style in model.tp_plan.items():
        if rule.endswith("experts.gate_up_proj"):
            assert style == "packed_colwise"
        elif rule.endswith("experts.up_proj"):
            assert style == "colwise"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_with_experts_is_sharded_by_itself(name):
    model = tiny_sparse(name)
    names = [key for key, _ in model.named_modules()]
    units = {match for rule, style in model.fsdp_plan.items() for match in matches(rule, names)}
    layers = [{unit for unit in units if key.startswith(f"{unit}.")} for key in names if key.endswith(".experts")]
    assert all(len(layer) == 1 for layer in layers)
    assert len(set.union(*layers)) == len(layers)
