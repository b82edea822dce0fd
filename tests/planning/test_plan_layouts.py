"""`plan_layouts`: sums that come out, degrees that divide, and what more GPUs, memory or bandwidth must change."""

import json
import math
from dataclasses import replace

import pytest
from transformers import Qwen3Config

from cli_client import run_cli
from hf_sparse_moe import SparseMoeDecoderConfig
from hf_sparse_moe.planning import Layout, Workload, make_machine, plan_layouts, read_shape
from hf_sparse_moe.planning.formulas import memory_of_rank, traffic, transfer_seconds
from tiny_models import FAMILIES, tiny_config, tiny_dense, tiny_sparse


WORKLOAD = Workload(16, 2, "float32", gradient_checkpointing=False)


@pytest.fixture(scope="module")
def shape():
    return read_shape(tiny_config("qwen3", {"num_key_value_heads": 4}))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_gpu_holds_the_model(family):
    model = tiny_sparse(family)
    (plan,) = plan_layouts(model.config, 1, workload=WORKLOAD)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert (plan.memory.weights, plan.memory.gradients, plan.memory.states) == (4 * numbers, 4 * numbers, 8 * numbers)
    assert not plan.traffic
    assert plan.slowest_seconds == plan.fastest_seconds == plan.compute_seconds


def test_shards_add_up_to_the_model(shape):
    """Where degrees divide every first dimension, nothing is padded: the ranks together hold each number once."""
    for layout in (Layout("fsdp", fsdp=4), Layout("fsdp", fsdp=4, ep=2), Layout("fsdp", fsdp=4, ep=4)):
        memory = memory_of_rank(shape, layout, WORKLOAD)
        assert 4 * memory.weights == 4 * shape.num_parameters, layout.name


def test_experts_are_padded_where_ranks_are_more(shape):
    """FSDP cuts the first dimension, which counts the experts: 16 ranks for 4 experts gather four times their size."""

    def gathered(fsdp: int) -> float:
        collectives = traffic(shape, Layout("fsdp", fsdp=fsdp), WORKLOAD)
        return sum(collective.bytes for collective in collectives if collective.kind == "all_gather")

    experts = 4 * sum(math.prod(weight.shape) for weight in shape.weights if weight.experts)
    assert gathered(16) - gathered(4) == pytest.approx(2 * 3 * experts, rel=0.05)


def test_degrees_divide(shape):
    names = set()
    for plan in plan_layouts(shape, 24, machine=make_machine(gpus_per_node=8), workload=WORKLOAD):
        layout = plan.layout
        assert layout.gpus == 24
        assert shape.num_experts % layout.ep == 0
        assert (layout.fsdp * layout.tp) % layout.ep == 0
        assert layout.ep == 1 or layout.ep % layout.tp == 0
        assert all(heads % layout.tp == 0 for heads in shape.heads)
        names.add(layout.name)
    assert {"DDP 24", "ZeRO-2 24", "FSDP 24 x EP 4", "3 replicas of FSDP 8 x EP 2", "FSDP 6 x EP 4 x TP 4"} <= names


def test_no_tensor_parallelism_without_a_plan():
    plans = plan_layouts(tiny_config("gpt2"), 4)
    assert all(plan.layout.tp == 1 for plan in plans if not read_shape(tiny_config("gpt2")).tensor_parallel)


@pytest.mark.parametrize("gpus", [8, 64, 1024])
def test_the_first_is_the_fastest_that_fits(shape, gpus):
    needed = sorted(plan.memory.total for plan in plan_layouts(shape, gpus, workload=WORKLOAD))
    limit = needed[len(needed) // 2]
    plans = plan_layouts(shape, gpus, machine=make_machine(gpu_memory=limit / 0.9 + 1), workload=WORKLOAD)
    fitting = [plan for plan in plans if plan.fits]
    assert plans[: len(fitting)] == fitting
    assert 0 < len(fitting) < len(plans)
    assert all(plan.memory.total <= limit + 1 for plan in fitting)
    assert plans[0].fastest_seconds == min(plan.fastest_seconds for plan in fitting)
    assert all(plan.fastest_seconds <= plan.slowest_seconds for plan in plans)


def test_faster_links_never_slow_a_step(shape):
    slow, fast = make_machine(interconnect="32,3"), make_machine(interconnect="nvlink5,ndr")
    times = {}
    for machine in (slow, fast):
        for plan in plan_layouts(shape, 16, machine=machine, workload=WORKLOAD):
            times.setdefault(plan.name, []).append(plan.slowest_seconds)
    assert all(before >= after for before, after in times.values())


def test_groups_within_a_node_use_its_links(shape):
    """Expert-parallel groups are neighbours, so 8 of them never leave a node of 8; 16 do."""
    machine = make_machine(interconnect="450,50")
    within, across = (
        next(each for each in traffic(shape, Layout("fsdp", fsdp=16, ep=ep), WORKLOAD) if each.kind == "all_to_all")
        for ep in (2, 4)
    )
    far = replace(machine, gpus_per_node=2, latency=0.0)
    near = replace(machine, latency=0.0)
    assert transfer_seconds(within, far) == transfer_seconds(within, near)
    assert transfer_seconds(across, far) > transfer_seconds(across, near)


def test_checkpointing_trades_memory_for_time(shape):
    plans = {plan.name: plan for plan in plan_layouts(shape, 8, workload=Workload(64, 8))}
    plain, again = plans["FSDP 8"], plans["FSDP 8, checkpointing"]
    assert again.memory.activations < plain.memory.activations
    assert again.compute_seconds == pytest.approx(plain.compute_seconds * 4 / 3)


def test_what_the_page_says_of_1_to_1024_gpus():
    """docs/planning.md, "Reasoning": its claims, for its mixture, machine and command."""
    dense = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    shape = read_shape(SparseMoeDecoderConfig.from_dense(dense, num_experts=8))
    machine = make_machine("h100", "80GB", "nvlink4,ndr")
    many = {gpus: plan_layouts(shape, gpus, machine=machine) for gpus in (1, 8, 64, 1024)}
    by_name = {gpus: {plan.name: plan for plan in plans} for gpus, plans in many.items()}
    assert many[1][0].fits
    assert many[1][0].name == "one GPU"
    fsdp, expert, ddp = (by_name[8][name] for name in ("FSDP 8", "FSDP 8 x EP 8", "DDP 8"))
    assert fsdp.fastest_seconds == ddp.fastest_seconds == fsdp.compute_seconds  # all of it hides
    assert ddp.memory.total > 3 * fsdp.memory.total
    assert expert.fastest_seconds > fsdp.fastest_seconds
    assert expert.slowest_seconds == min(plan.slowest_seconds for plan in many[8])
    replicas = by_name[64]["8 replicas of FSDP 8 x EP 8"]
    assert many[64][0].name == "DDP 64"
    assert replicas.memory.total < many[64][0].memory.total / 3
    assert replicas.fastest_seconds < 1.05 * many[64][0].fastest_seconds < by_name[64]["FSDP 64"].fastest_seconds / 4
    names = [plan.name for plan in many[1024]]
    assert names[:2] == ["ZeRO-2 1024", "128 replicas of FSDP 8 x EP 8"]
    reduced = [
        plans[name].sent("all_reduce") for plans, name in ((by_name[64], replicas.name), (by_name[1024], names[1]))
    ]
    assert reduced[0] < reduced[1] < 1.15 * reduced[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "abacus"}, "gpu='abacus'"),
        ({"gpu_memory": "much"}, "gpu_memory='much'"),
        ({"interconnect": "fast"}, "interconnect='fast'"),
        ({"interconnect": "nvlink4,pigeon"}, "`pigeon` is no link"),
        ({"gpus_per_node": 0}, "gpus_per_node=0"),
    ],
)
def test_machines_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_machine(**arguments)


def test_sizes_are_read():
    assert make_machine(gpu_memory="80GB").memory == 80e9
    assert make_machine(gpu_memory="40 GiB").memory == 40 * 2**30
    machine = make_machine(interconnect="300, 25")
    assert (machine.intra, machine.inter) == (300e9, 25e9)


def test_bad_workloads_and_sources(shape, tmp_path):
    with pytest.raises(ValueError, match="sequence_length=0"):
        Workload(0)
    with pytest.raises(ValueError, match="precision='int4'"):
        Workload(precision="int4")
    with pytest.raises(ValueError, match="gpus=0"):
        plan_layouts(shape, 0)
    tiny_dense("llama").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no mixture of this package"):
        plan_layouts(tmp_path, 2)


def test_command_plans_dense_checkpoints_and_mixtures(tmp_path):
    dense, mixture = tmp_path / "dense", tmp_path / "mixture"
    tiny_dense("qwen3").config.save_pretrained(dense)
    tiny_config("qwen3").save_pretrained(mixture)
    options = ("--gpus", 4, "--gpu-memory", "1MB", "--sequence-length", 16)
    of_dense = json.loads(run_cli("plan", dense, "--num-experts", 4, *options, "--json").out)
    of_mixture = json.loads(run_cli("plan", mixture, *options, "--json").out)
    assert of_dense["parameters"]["total"] > 0
    assert of_dense["layouts"] == of_mixture["layouts"]
    assert [plan["fits"] for plan in of_mixture["layouts"]].count(True)
    shown = " ".join(run_cli("plan", mixture, *options).out.split())
    assert "is the fastest that fits" in shown
    assert "not a measurement" in shown
    assert "Nothing fits" in run_cli("plan", mixture, "--gpus", 4, "--gpu-memory", "1KB").out
    assert run_cli("plan", mixture, "--gpus", 0).code == 2
