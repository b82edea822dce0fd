"""`plan` says before what `upcycle` shows after."""

import json

import pytest
import torch

from hf_sparse_moe import upcycle
from hf_sparse_moe.models.size import count_flops_per_token
from hf_sparse_moe.upcycling.planning import RULE_OF_THUMB, plan
from tiny_models import FAMILIES, tiny_dense


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"method": "split"}, {"method": "graft", "moe_intermediate_size": 12}, {"layers": "last_1"}],
    ids=lambda arguments: "-".join(map(str, arguments.values())) or "copy",
)
def test_plan_is_what_upcycle_makes(family, arguments, tmp_path):
    dense = tiny_dense(family)
    dense.config.save_pretrained(tmp_path)  # weights are not needed
    report = plan(tmp_path, 4, 2, **arguments)
    sparse = upcycle(dense, 4, 2, **arguments)
    assert report.parameters == sparse.receipt["parameters"]
    assert report.flops_per_token["mixture"] == sparse.receipt["flops_per_token"]
    assert report.config.to_dict()["num_experts"] == 4
    assert report.exact == sparse.receipt["exact"]
    state = {key: tensor for key, tensor in sparse.state_dict().items() if key not in sparse.all_tied_weights_keys}
    persistent = dict(sparse.named_parameters())
    assert report.checkpoint_bytes == sum(state[key].numel() * 4 for key in state if key in persistent)


def test_dense_operations_are_those_of_one_expert_without_router(tmp_path):
    tiny_dense("llama").config.save_pretrained(tmp_path)
    one = plan(tmp_path, 4, 1)
    sparse = upcycle(tiny_dense("llama"), 4, 1)
    router = 2 * sum(block.gate.weight.numel() for block in sparse.sparse_blocks)
    assert one.flops_per_token["dense"] == count_flops_per_token(sparse) - router


def test_decoding_reads_more_experts_in_larger_batches(tmp_path):
    tiny_dense("llama").config.save_pretrained(tmp_path)
    report = plan(tmp_path, 8, 2)
    flops, slowdown = report.flops_per_token, list(report.decode_slowdown.values())
    assert slowdown[0] == pytest.approx(flops["mixture"] / flops["dense"])
    assert slowdown == sorted(slowdown)
    everything = plan(tmp_path, 8, 8)
    assert slowdown[-1] == pytest.approx(everything.decode_slowdown[1], rel=1e-3)


def test_memory_of_training(tmp_path):
    tiny_dense("llama").config.save_pretrained(tmp_path)
    report = plan(tmp_path, 4, 2, dtype=torch.bfloat16)
    total = report.parameters["total"]
    assert report.training_bytes["AdamW, float32"] == 16 * total
    assert report.training_bytes["AdamW, bfloat16, float32 master"] == 16 * total
    assert report.training_bytes["8-bit Adam, bfloat16"] == 6 * total
    assert report.training_bytes["SGD, float32"] == 8 * total
    assert report.checkpoint_bytes == 2 * total


def test_source_of_the_rule_is_named():
    assert "2406.06563" in RULE_OF_THUMB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok=3"), ({"method": "magic"}, "method='magic'")],
)
def test_bad_arguments(arguments, message, tmp_path):
    tiny_dense("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, **arguments)


def test_a_source_that_is_nowhere_is_told_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"(neither|not) a folder"):
        plan(tmp_path / "nothing")


def test_layouts_count_what_a_gpu_keeps_and_sends(tmp_path):
    dense = tiny_dense("llama")
    dense.config.save_pretrained(tmp_path)
    planned = plan(tmp_path, 4, 2, gpus=8, tokens_per_gpu=100)
    layouts = {layout.name: layout for layout in planned.layouts}
    assert list(layouts) == ["DDP", "FSDP2 over 8", "FSDP2 over 8, experts over 2", "FSDP2 over 8, experts over 4"]
    sparse = upcycle(dense, 4, 2)
    total = sum(parameter.numel() for parameter in sparse.parameters())
    assert layouts["DDP"].weights == 4 * total
    assert layouts["DDP"].moved == 2 * 4 * total * 7 // 8
    for experts_over in (1, 2, 4):
        kept = 0
        for name, parameter in sparse.named_parameters():
            owned = parameter.chunk(experts_over)[0] if ".experts." in name else parameter
            kept += owned.chunk(8 // experts_over if ".experts." in name else 8)[0].numel()
        name = "FSDP2 over 8" + (f", experts over {experts_over}" if experts_over > 1 else "")
        layout = layouts[name]
        assert (layout.weights, layout.gradients, layout.states) == (4 * kept, 4 * kept, 8 * kept)
    tokens = 2 * 4 * 100 * 2 * 32 * 4  # layers, both ways twice, tokens, experts a token, hidden size, bytes
    weights = (
        3
        * 4
        * sum(
            size * (ranks - 1)
            for name, parameter in sparse.named_parameters()
            for ranks in [2 if ".experts." in name else 8]
            for size in [(parameter.chunk(4)[0] if ".experts." in name else parameter).chunk(ranks)[0].numel()]
        )
    )
    assert layouts["FSDP2 over 8, experts over 4"].moved == weights + tokens * 3 // 4
    assert [layout["name"] for layout in planned.to_dict()["layouts"]] == list(layouts)
    json.dumps(planned.to_dict())
    assert plan(tmp_path, 4, 2).layouts == ()
    with pytest.raises(ValueError, match="`gpus=0`"):
        plan(tmp_path, 4, 2, gpus=0)
