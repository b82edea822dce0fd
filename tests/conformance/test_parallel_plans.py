"""
The parallel plans of every exact row of docs/architectures.md, without storage: each rule matches, each expert is
covered, each layer is gathered by itself, and transformers applies them to ranks that are not there (a fake process
group).
"""

import re

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import initialization as init
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

from conformance.measuring import EXACT, HEADS
from conformance.table import each_row
from conformance.tiny_configs import tiny_config
from hf_sparse_moe.checkpoints.families import sparse_class
from hf_sparse_moe.upcycling.recipe import make_recipe, mixture_config
from tiny_models import tiny_sparse


RANKS = 4
FIELDS = {"num_experts": 4, "num_experts_per_tok": 2}


def meta_mixture(model_type: str, head: str):
    with init.no_tie_weights(), torch.device("meta"):  # as `from_pretrained` builds it
        dense = HEADS[head][1].from_config(tiny_config(model_type, head))
        target = sparse_class(dense.config, type(dense).__name__)
        return target(mixture_config(dense, target, make_recipe("copy", 0, {})[0], dict(FIELDS), "all"))


@pytest.fixture(scope="module")
def fake_ranks():
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    distributed.destroy_process_group()


def distribute(model, **degrees):
    config, _, meshes = model.prepare_distribute_model(DistributedConfig(**degrees))
    return model.maybe_distribute_model(model, config, meshes)


@each_row(EXACT)
def test_rules_match_and_ranks_hold_their_part(model_type, head, fake_ranks):
    model = meta_mixture(model_type, head)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    present = {replace_layer_number_by_wildcard(name) for name in (*modules, *parameters)}
    for plan in (model.tp_plan, model.ep_plan, model.fsdp_plan):
        assert set(plan) <= present, f"match nothing: {set(plan) - present}"
    _, ep_plan, fsdp_plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2, ep_size=2))
    experts = {name for name, module in modules.items() if module in [block.experts for block in model.sparse_blocks]}
    assert {name for name, style in ep_plan.items() if style == "ep_dispatch_experts"} == experts
    sharded = {name for name, style in ep_plan.items() if style == "grouped_gemm"}
    assert sharded == {name for name in parameters if name.rpartition(".")[0] in experts}
    for name in experts:
        around = [unit for unit in fsdp_plan if name.startswith(f"{unit}.")]
        assert around, f"{name} is gathered with the whole model"
        assert not any(isinstance(modules[unit], nn.ModuleList) for unit in around), "a list has no forward to wrap"
    # 4 ranks, 2 of an expert-parallel group: each holds a quarter of the experts, and of the rest a padded quarter.
    whole = {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
    distribute(model, fsdp_size=RANKS, ep_size=2)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is whole on each rank"
        local = parameter.to_local().shape
        if name.rpartition(".")[0] in experts:
            assert local == (whole[name][0] // RANKS, *whole[name][1:])
        elif parameter.dim():
            assert local[0] == -(-whole[name][0] // RANKS)


@each_row(EXACT)
def test_tensor_parallel_plans_apply(model_type, head, fake_ranks):
    model = meta_mixture(model_type, head)
    if not model.tp_plan:
        with pytest.raises(ValueError, match="has no `tp_plan`"):
            distribute(model, tp_size=2, fsdp_size=2)
        return
    biased = any(block.experts.biased for block in model.sparse_blocks)
    whole = {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
    distribute(model, tp_size=RANKS // 2, fsdp_size=2)
    for name, parameter in model.named_parameters():
        if re.search(r"experts\.(gate_up|up|down)_proj$", name) and not biased:
            placements = parameter.placements
            assert parameter.to_local().numel() * RANKS == whole[name].numel(), f"{name}: {placements}"


def test_experts_with_biases_are_whole_under_tensor_parallelism():
    """Every rank would add the bias of the whole."""
    assert not any("experts" in rule for rule in meta_mixture("starcoder2", "causal").tp_plan)


@pytest.mark.parametrize("family", ["encoder", "decoder", "encoder_decoder"])
def test_experts_that_ranks_do_not_divide_are_refused_before_weights_are_read(family, fake_ranks, tmp_path):
    """The file of weights is none, so reading it would fail otherwise."""
    model = tiny_sparse(family, num_experts=6)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="Cannot evenly shard 6 experts across 4 expert-parallel ranks"):
        type(model).from_pretrained(tmp_path, distributed_config=DistributedConfig(fsdp_size=RANKS, ep_size=RANKS))
