"""Ranks get their part of a mixture, and never the whole: loaded, or made of a dense checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.distributed.configuration_utils import DistributedConfig

from hf_sparse_moe import SparseMoeDecoderForCausalLM, upcycle
from processes import in_processes
from tiny_models import tiny_dense


ROOT = Path(__file__).parents[2]
NOISE = {"method": "noise", "seed": 3}
SPLIT = {"method": "split", "num_experts": 8, "num_experts_per_tok": 4}
GRAFT = {"method": "graft", "moe_intermediate_size": 12}
# The dense architecture, how the mixture is shared out, and what it is.
CASES = {
    2: [
        ("llama", {"fsdp_size": 2}, NOISE),
        ("llama", {"tp_size": 2}, NOISE),
        ("qwen3", {"fsdp_size": 2, "ep_size": 2}, {"method": "drop", "dtype": "bfloat16"}),
        ("gpt2", {"fsdp_size": 2, "ep_size": 2}, NOISE),  # transposed, and with biases
        ("bert", {"fsdp_size": 2}, SPLIT),
        ("t5", {"fsdp_size": 2, "ep_size": 2}, GRAFT),
    ],
    4: [
        ("llama", {"fsdp_size": 4}, {"num_experts": 2, **NOISE}),  # two ranks hold no expert
        ("llama", {"fsdp_size": 4, "ep_size": 2}, GRAFT),
        ("llama", {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}, NOISE),
        ("llama", {"fsdp_size": 2, "tp_size": 2}, SPLIT),
        ("bert", {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}, {"method": "partition"}),
    ],
}


def arguments_of(case):
    name, _, arguments = case
    return name, {"num_experts": 4, **arguments}


def check_parts(folder: Path, ranks: int) -> None:
    """As a rank: the parts together are the bits of the mixture that one process made."""
    for number, case in enumerate(CASES[ranks]):
        name, arguments = arguments_of(case)
        model = upcycle(folder / name, distributed_config=DistributedConfig(**case[1]), **arguments)
        whole = torch.load(folder / f"{number}.pt")
        assert model.receipt == whole.pop("receipt")
        state = model.state_dict()
        assert state.keys() == whole.keys()
        experts = {key for key in state if ".experts." in key}
        assert all(isinstance(state[key], DTensor) for key in experts)
        assert sum(state[key].to_local().numel() for key in experts) < sum(whole[key].numel() for key in experts)
        for key, tensor in state.items():
            together = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert together.dtype == whole[key].dtype, (case, key)
            assert torch.equal(together, whole[key]), (case, key)


@pytest.mark.parametrize("ranks", CASES)
def test_the_parts_that_ranks_make_are_those_of_the_whole(ranks, tmp_path):
    for number, case in enumerate(CASES[ranks]):
        name, arguments = arguments_of(case)
        tiny_dense(name).save_pretrained(tmp_path / name)
        whole = upcycle(str(tmp_path / name), **arguments)
        receipt = whole.receipt | {"equality": {"note": "not measured here: run `hf-sparse-moe verify`"}}
        torch.save({**whole.state_dict(), "receipt": receipt}, tmp_path / f"{number}.pt")
    assert in_processes(ranks, check_parts, tmp_path, ranks) == [0] * ranks


def train_a_step(folder: Path) -> None:
    """As one of two ranks: the recipe's model is trained, saved and loaded again, and each rank had half of it."""
    sys.path.insert(0, str(ROOT / "training"))
    import recipe

    args = recipe.ModelArguments(
        model_name_or_path=str(folder / "llama"), num_experts=4, upcycling_method="noise",
        distributed_config='{"fsdp_size": 2, "ep_size": 2}',
    )  # fmt: skip
    torch.distributed.init_process_group("gloo")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")))
    config = AutoConfig.from_pretrained(folder / "llama")
    model = recipe.load_model(args, AutoModelForCausalLM, config, tokenizer, seed=0)
    model.train()
    ids = torch.arange(3, 15)[None] + torch.distributed.get_rank()
    before = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    assert all(not torch.equal(after[name], before[name]) for name in after if "experts" in name or "gate" in name)
    model.save_pretrained(folder / "trained")
    torch.distributed.barrier()
    loaded = SparseMoeDecoderForCausalLM.from_pretrained(folder / "trained")
    assert all(torch.equal(parameter, after[name]) for name, parameter in loaded.named_parameters())
    assert loaded.receipt["arguments"]["method"] == "noise"


def test_the_recipe_upcycles_into_shards(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "llama")
    assert in_processes(2, train_a_step, tmp_path) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["load", "upcycle"])
def test_no_rank_holds_the_whole(way, tmp_path, monkeypatch):
    """
    Of a mixture of 325 MiB, a rank's own memory grows by its part, a few dense layers (6 MiB each) and what torch and
    the allocator keep. What is read from a file and not changed is mapped, and no memory of its own.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import loading_memory

    whole = loading_memory.make_checkpoints(tmp_path, layers=2)
    for layout in ({"fsdp_size": 2, "ep_size": 2}, {"fsdp_size": 4}):
        row = loading_memory.measure(tmp_path, layout, way)
        assert row["part"] == pytest.approx(whole / layout["fsdp_size"], rel=0.01)
        assert row["peak"] < row["part"] + 64, row


def refuse_in_turn(folder: Path) -> None:
    """As one of two ranks, with experts that two do not divide, and files of weights that are none."""
    sizes = DistributedConfig(fsdp_size=2, ep_size=2)
    with pytest.raises(ValueError, match="`num_experts=3` cannot be shared out over `ep_size=2`"):
        upcycle(folder, distributed_config=sizes, num_experts=3)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        upcycle(folder, distributed_config=sizes, num_experts=4)


def test_experts_that_ranks_do_not_divide_are_refused_before_weights_are_read(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert in_processes(2, refuse_in_turn, tmp_path) == [0, 0]


def test_what_needs_the_dense_model_is_refused(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`sources` needs the model itself.*`hf-sparse-moe upcycle` first"):
        upcycle(tmp_path, distributed_config=DistributedConfig(), method="branches", sources=[str(tmp_path)] * 2)
    with pytest.raises(ValueError, match="is for 2 processes"):
        upcycle(tmp_path, distributed_config=DistributedConfig(fsdp_size=2))
