"""Checkpoints of every engine become normal ones with the bits that the ranks had, and broken ones are refused."""

import json
import pickle
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoConfig
from transformers.distributed.configuration_utils import DistributedConfig

import hf_sparse_moe
from cli_client import run_cli
from distributed.recovery_runs import Run, final_weights, train
from hf_sparse_moe.distributed.checkpoint import INCOMPLETE_NAME
from hf_sparse_moe.distributed.consolidation import ConsolidateReport, consolidate
from hf_sparse_moe.hub import write_model_card
from processes import in_processes, kill_at_file
from tiny_models import FAMILIES, tiny_sparse


STEPS = {"max_steps": 2}
BIAS = {"scoring_func": "sigmoid"}
FULL = {"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A training on two ranks of FSDP2, which leaves shards and no normal weights."""
    folder = tmp_path_factory.mktemp("sharded")
    assert in_processes(2, train, Run("decoder", "fsdp2", 2, fields=BIAS, arguments=STEPS), folder) == [0, 0]
    return folder


@pytest.fixture
def checkpoint(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "run") / "checkpoint-2"


def loaded(folder):
    """The weights as `from_pretrained` finds them, with nothing missing, and nothing else there."""
    config = AutoConfig.from_pretrained(folder)
    model_class = getattr(hf_sparse_moe, config.architectures[0])
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model


def assert_same(model, weights):
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


def test_shards_of_fsdp(sharded, tmp_path):
    done = consolidate(sharded / "checkpoint-2", tmp_path / "model", max_shard_size="50KB")
    model = loaded(tmp_path / "model")
    assert_same(model, final_weights(sharded))
    assert done.engine == "FSDP, sharded"
    assert done.parameters == sum(value.numel() for value in final_weights(sharded).values())
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert "- sparse-moe" in (tmp_path / "model" / "README.md").read_text()
    assert (tmp_path / "model" / "modeling_sparse_moe.py").exists()


def test_the_dense_folder_of_dcp_alone_with_its_config_named(checkpoint, tmp_path):
    configured = tmp_path / "configured"
    configured.mkdir()
    (checkpoint / "config.json").rename(configured / "config.json")
    with pytest.raises(ValueError, match=r"no config.json.*`--config`"):
        consolidate(checkpoint, tmp_path / "model")
    consolidate(checkpoint / "pytorch_model_fsdp_0", tmp_path / "model", config=configured)
    assert_same(loaded(tmp_path / "model"), final_weights(checkpoint.parent))


def test_gathered_weights_of_fsdp(tmp_path):
    run = Run("decoder", "fsdp2", 2, fields=BIAS, arguments={**STEPS, **FULL})
    assert in_processes(2, train, run, tmp_path / "run") == [0, 0]
    folder = tmp_path / "run" / "checkpoint-2"
    engines = []
    for name in ("model.safetensors", "pytorch_model_fsdp.bin"):
        engines.append(consolidate(folder, tmp_path / name).engine)
        assert_same(loaded(tmp_path / name), final_weights(tmp_path / "run"))
        (folder / name).unlink()
    assert engines == ["one process, or gathered", "FSDP, gathered"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_normal_checkpoint_is_sharded_anew_tied_weights_once(family, tmp_path):
    model = tiny_sparse(family)
    model.save_pretrained(tmp_path / "saved")
    consolidate(tmp_path / "saved", tmp_path / "model", max_shard_size="20KB")
    assert_same(loaded(tmp_path / "model"), model.state_dict())


def test_another_dtype_leaves_the_selection_bias_wide(checkpoint, tmp_path):
    consolidate(checkpoint, tmp_path / "half", dtype="bfloat16")
    weights = final_weights(checkpoint.parent)
    model = loaded(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(value, weights[name])
        else:
            assert torch.equal(value, weights[name].bfloat16()), name


def save_expert_parallel(source: Path, target: Path, **sizes) -> None:
    torch.distributed.init_process_group("gloo")
    model = hf_sparse_moe.SparseMoeDecoderForCausalLM.from_pretrained(
        source, distributed_config=DistributedConfig(**sizes)
    )
    model.save_pretrained(target, distributed_checkpoint=True)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sizes", [{"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2}], ids=["experts", "tensors"])
def test_shards_of_expert_and_tensor_parallelism(sizes, tmp_path):
    """Tensor parallelism cuts columns too, which lie scattered in the whole tensor."""
    model = tiny_sparse("decoder", **BIAS)
    model.save_pretrained(tmp_path / "saved")
    assert in_processes(2, save_expert_parallel, tmp_path / "saved", tmp_path / "shards", **sizes) == [0, 0]
    assert len(list((tmp_path / "shards").glob("shard-*"))) == 2
    done = consolidate(tmp_path / "shards", tmp_path / "model", max_shard_size="20KB")
    assert done.engine == "expert parallelism"
    assert_same(loaded(tmp_path / "model"), model.state_dict())
    # Without one of the ranks' files.
    sorted((tmp_path / "shards").glob("shard-*"))[1].unlink()
    with pytest.raises(ValueError, match=r"are missing|it lacks|in the model"):
        consolidate(tmp_path / "shards", tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_tokenizer_and_receipt_come_along(checkpoint, tmp_path):
    (checkpoint / "receipt.json").write_text(json.dumps({"method": "copy"}))
    (checkpoint / "tokenizer.json").write_text("{}")
    consolidate(checkpoint, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "receipt.json").read_text()) == {"method": "copy"}
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"


def test_the_command(checkpoint, tmp_path):
    finished = run_cli("consolidate", checkpoint, tmp_path / "model", "--json")
    assert finished.code == 0, finished.err
    report = json.loads(finished.out)
    assert report.keys() == {field.name for field in fields(ConsolidateReport)}
    assert (report["engine"], report["path"]) == ("FSDP, sharded", str(tmp_path / "model"))
    assert_same(loaded(tmp_path / "model"), final_weights(checkpoint.parent))
    (checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp").unlink()
    finished = run_cli("consolidate", checkpoint, tmp_path / "half")
    assert finished.code == 2
    assert finished.out == ""
    assert finished.err.count("\n") == 1
    assert "__1_0.distcp" in finished.err


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_an_unfinished_checkpoint(checkpoint, tmp_path):
    (checkpoint / INCOMPLETE_NAME).write_text("")
    with pytest.raises(ValueError, match=r"incomplete or corrupt: its writing was not finished.*earlier checkpoint"):
        consolidate(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_shard_cut_short(name, share, checkpoint, tmp_path):
    path = checkpoint / "pytorch_model_fsdp_0" / name
    with path.open("r+b") as file:
        file.truncate(int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=r"incomplete or corrupt.*cannot be read"):
        consolidate(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_a_shard_that_is_missing(name, checkpoint, tmp_path):
    (checkpoint / "pytorch_model_fsdp_0" / name).unlink()
    with pytest.raises(ValueError, match=f"incomplete or corrupt.*{name}"):
        consolidate(checkpoint, tmp_path / "model")


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/never made by a consolidation"),)


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp.bin"])
def test_a_pickle_that_would_run_code(name, checkpoint, tmp_path):
    shutil.rmtree(checkpoint / "pytorch_model_fsdp_0")
    (checkpoint / name).parent.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch.save({"weight": Hostile()}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"none of its own types|could run code"):
        consolidate(checkpoint, tmp_path / "model")
    assert not Path("/tmp/never made by a consolidation").exists()


def test_a_config_of_another_model(checkpoint, tmp_path):
    tiny_sparse("decoder", num_experts=8, **BIAS).config.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is of another model: its `.*` of shape .* is .* in the model"):
        consolidate(checkpoint, tmp_path / "model", config=tmp_path / "other")


def test_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no weights of FSDP, DeepSpeed, expert parallelism or safetensors"):
        consolidate(tmp_path / "empty", tmp_path / "model")
    with pytest.raises(ValueError, match="is not a folder"):
        consolidate(tmp_path / "none", tmp_path / "model")
    (tmp_path / "empty" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds an adapter"):
        consolidate(tmp_path / "empty", tmp_path / "model")


def test_an_output_whose_name_the_hub_would_refuse(tmp_path):
    """It is the title of the card, made last."""
    tiny_sparse("decoder").save_pretrained(tmp_path / "saved")
    consolidate(tmp_path / "saved", tmp_path / "my mixture")
    assert "my-mixture" in (tmp_path / "my mixture" / "README.md").read_text()


def test_metadata_that_names_a_file_elsewhere(checkpoint, tmp_path):
    path = checkpoint / "pytorch_model_fsdp_0" / ".metadata"
    metadata = FileSystemReader(path.parent).read_metadata()
    for place in metadata.storage_data.values():
        place.relative_path = f"../{place.relative_path}"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="incomplete or corrupt"):
        consolidate(checkpoint, tmp_path / "model")


def test_a_target_that_is_taken(checkpoint, tmp_path):
    with pytest.raises(FileExistsError, match="not empty"):
        consolidate(checkpoint, checkpoint)


def consolidate_until_killed(source: Path, output: Path, number: int) -> None:
    kill_at_file(output.with_name(f".{output.name}."), number)
    consolidate(source, output, max_shard_size="20KB")


@pytest.mark.parametrize("number", [0, 8, 24])
def test_killed_while_it_writes(number, tmp_path):
    """At its n-th file: nothing is at the output then, and the next call writes all of it and clears what was left."""
    model = tiny_sparse("decoder")
    model.save_pretrained(tmp_path / "saved")
    codes = in_processes(1, consolidate_until_killed, tmp_path / "saved", tmp_path / "model", number)
    assert codes == [-signal.SIGKILL]
    assert not (tmp_path / "model").exists()
    consolidate(tmp_path / "saved", tmp_path / "model", max_shard_size="20KB")
    assert_same(loaded(tmp_path / "model"), model.state_dict())
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "model"}


def test_two_at_once(tmp_path, monkeypatch):
    tiny_sparse("decoder").save_pretrained(tmp_path / "saved")

    def meanwhile(*arguments):
        with pytest.raises(OSError, match="Another process is writing"):
            consolidate(tmp_path / "saved", tmp_path / "model")
        return write_model_card(*arguments)

    monkeypatch.setattr("hf_sparse_moe.distributed.consolidation.write_model_card", meanwhile)
    consolidate(tmp_path / "saved", tmp_path / "model")
    loaded(tmp_path / "model")


def test_a_dtype_that_is_none(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="`dtype='int8'` is not allowed"):
        consolidate(checkpoint, tmp_path / "model", dtype="int8")
