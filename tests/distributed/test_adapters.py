"""LoRA on experts on every engine: the numbers of one process, checkpoints that go on, and one normal adapter."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from adapted_models import logits_of
from distributed.recovery_runs import _fsdp_on_cpu, collate, make_rows
from hf_sparse_moe import expert_lora_config
from hf_sparse_moe.adapters import load_expert_lora
from hf_sparse_moe.distributed.checkpoint import keep_checkpoints_whole
from hf_sparse_moe.distributed.resume import ResumableTrainer
from processes import in_processes
from recipe.launch import join_deepspeed
from tiny_models import tiny_inputs, tiny_sparse


STEPS, BATCH = 4, 4  # sequences a step, over all ranks
ZERO3 = Path(__file__).parents[2] / "training/configs/zero3.json"


@dataclass(frozen=True)
class Engine:
    """`arguments` are those of Trainer; `sizes` those of transformers' DistributedConfig."""

    ranks: int
    wrapper: str
    arguments: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=dict)


def fsdp2(state_dict: str) -> Engine:
    fsdp = {"state_dict_type": state_dict}
    return Engine(2, "FSDPPeftModel", {"fsdp": True, "fsdp_config": fsdp})


ENGINES = {
    "one": Engine(1, "PeftModel"),
    "fsdp2_sharded": fsdp2("SHARDED_STATE_DICT"),
    "fsdp2_full": fsdp2("FULL_STATE_DICT"),
    "zero3": Engine(2, "DeepSpeedEngine", {"deepspeed": str(ZERO3)}),
    "fsdp2_native": Engine(2, "PeftModel", sizes={"fsdp_size": 2}),
    "ep2": Engine(2, "PeftModel", sizes={"fsdp_size": 2, "ep_size": 2}),
}


LORA = {
    "all": {},
    # with 2 ranks, one has none of layer 0
    "chosen": {"experts": {0: [0], 1: [1, 2, 3]}, "projections": ("gate", "down")},
}


def train(name: str, start: Path, folder: Path, lora: dict, resume: str | None = None) -> None:
    """One of the ranks; the first leaves in `folder` what was logged and the adapter."""
    engine = ENGINES[name]
    options = {}
    if "fsdp" in engine.arguments:
        _fsdp_on_cpu()
        options["accelerator_config"] = {"use_configured_state": True}
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH // engine.ranks, max_steps=STEPS, save_steps=2, logging_steps=1,
        learning_rate=1e-2, report_to=[], disable_tqdm=True, use_cpu=True, seed=1, **engine.arguments, **options,
    )  # fmt: skip
    join_deepspeed(args)
    sharded = {"distributed_config": DistributedConfig(**engine.sizes)} if engine.sizes else {}
    model = AutoModelForCausalLM.from_pretrained(start, **sharded)
    rows = make_rows(model)
    set_seed(0)
    model = get_peft_model(model, expert_lora_config(model, r=2, lora_alpha=4, **lora))
    trainer_class = ResumableTrainer if sharded else Trainer
    trainer = trainer_class(model=model, args=args, train_dataset=rows, data_collator=collate)
    keep_checkpoints_whole(trainer)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_fsdp_enabled:  # with SHARDED_STATE_DICT Trainer's `save_model` writes nothing
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "adapter"))
    if trainer.is_world_process_zero():
        log = [line for line in trainer.state.log_history if "loss" in line]
        facts = {"wrapper": type(trainer.model_wrapped).__name__, "world_size": args.world_size, "log": log}
        (folder / "facts.json").write_text(json.dumps(facts))


def train_and_go_on(name: str, start: Path, folder: Path, lora: dict) -> None:
    """A training, and in `folder / "resumed"` its second half again, from its checkpoint."""
    train(name, start, folder, lora)
    train(name, start, folder / "resumed", lora, resume=str(folder / "checkpoint-2"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tiny_sparse("decoder", router_aux_loss_coef=0.1, balance_scope="global_batch").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory):
    @cache
    def trained(lora: str) -> Path:
        folder = tmp_path_factory.mktemp(lora)
        assert in_processes(1, train, "one", start, folder, LORA[lora]) == [0]
        return folder

    return trained


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "facts.json").read_text())


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal_to(expected: Path, found: Path, tolerance: float) -> None:
    for key in ("loss", "grad_norm"):
        values, wanted = ([line[key] for line in facts_of(folder)["log"]] for folder in (found, expected))
        assert values == pytest.approx(wanted, rel=tolerance)
    weights, wanted = adapter_of(found), adapter_of(expected)
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (weights[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora"),
    [*((name, "all") for name in ENGINES if name != "one"), ("fsdp2_sharded", "chosen"), ("ep2", "chosen")],
)
def test_an_engine_trains_as_one_process(name, lora, start, one_process, tmp_path):
    if name == "zero3":
        pytest.importorskip("deepspeed")
    engine, one, many = ENGINES[name], one_process(lora), tmp_path / "many"
    assert in_processes(engine.ranks, train_and_go_on, name, start, many, LORA[lora]) == [0] * engine.ranks
    assert facts_of(many)["world_size"] == engine.ranks
    assert facts_of(many)["wrapper"].startswith(engine.wrapper)
    assert_equal_to(one, many, 1e-5)
    assert_equal_to(many, many / "resumed", 0)
    base = AutoModelForCausalLM.from_pretrained(start)
    inputs = tiny_inputs(base)
    wanted = logits_of(load_expert_lora(base, one / "adapter"), inputs)
    for load in (load_expert_lora, PeftModel.from_pretrained):
        base = AutoModelForCausalLM.from_pretrained(start)
        before = logits_of(base, inputs)
        after = logits_of(load(base, str(many / "adapter")), inputs)
        torch.testing.assert_close(after, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
        assert (after - before).abs().max() > 1e-3


def refuse() -> None:
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    refusal = r"down_proj` is sharded over ranks\. .* without `tp_size`, `modules_to_save` and `router=True`"
    for sizes, reason in (
        (None, refusal),
        ({"tp_size": 2}, refusal),
        ({"fsdp_size": 2}, refusal),
        ({}, "do not merge into experts that are sharded"),
    ):
        model = tiny_sparse("decoder")
        config = expert_lora_config(model, router=sizes != {})
        for block in model.sparse_blocks:
            block.experts.down_proj = torch.nn.Parameter(distribute_tensor(block.experts.down_proj, mesh, [Shard(0)]))
            if sizes is not None:
                block.experts.config.distributed_config = DistributedConfig(**sizes)
        with pytest.raises(ValueError, match=reason):
            get_peft_model(model, config).merge_and_unload()


def test_what_would_go_wrong_is_refused_with_a_sentence():
    assert in_processes(1, refuse) == [0]
