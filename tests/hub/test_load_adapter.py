"""`load_adapter`: an adapter goes onto the base it was trained on, wholly, or is refused with a sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapted_models import logits_of, shake
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from hf_sparse_moe.hub import load_adapter
from hub_adapters import load, save_adapter, save_base
from tiny_models import tiny_inputs, tiny_sparse


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", base)
    return tmp_path / "adapter"


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(model, folder: Path) -> str:
    """The sentence."""
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("choice", [{}, {"experts": {1: [0, 2]}}, {"router": True, "attention": True}], ids=str)
def test_it_computes_what_was_saved(base, tmp_path, choice):
    model = save_adapter(tmp_path, base, **choice)
    inputs = tiny_inputs(model.get_base_model(), labels=False)
    loaded = load_adapter(load(base), tmp_path)
    assert any(isinstance(module, ExpertLora) for module in loaded.modules())
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_an_adapter_of_plain_peft_is_loaded_and_goes_back(base, tmp_path):
    config = LoraConfig(r=3, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    theirs = shake(get_peft_model(load(base), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = tiny_inputs(theirs.get_base_model(), labels=False)
    ours = load_adapter(load(base), tmp_path / "theirs")
    torch.testing.assert_close(logits_of(ours, inputs), logits_of(theirs, inputs), rtol=0, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(load(base), tmp_path / "ours")
    torch.testing.assert_close(logits_of(again, inputs), logits_of(theirs, inputs), rtol=0, atol=1e-4)


def test_several_adapters_and_training_on(base, folder):
    model = load_adapter(load(base), folder, adapter_name="law", is_trainable=True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".law." in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_base_in_another_dtype_is_no_other_base(base, folder, dtype):
    load_adapter(load(base, dtype=dtype), folder)


def test_another_base_is_refused(base, folder, tmp_path):
    other = load(base)
    with torch.no_grad():
        for block in other.sparse_blocks:
            for weight in (block.gate.weight, *block.experts.parameters()):
                weight.copy_(weight.flip(0))
    other.save_pretrained(tmp_path / "other")
    said = refused(load(tmp_path / "other"), folder)
    assert "was trained on another base" in said
    assert "`model.safetensors` is another file" in said
    assert f"Load `{base.name}`" in said
    load_adapter(load(tmp_path / "other"), folder, check_base=False)
    assert "does not load onto" in refused(tiny_sparse("llama", num_experts=8), folder)


@pytest.mark.parametrize("fields", [{"num_experts": 8}, {"dense_fields": {"intermediate_size": 40}}], ids=str)
def test_another_shape_is_refused_without_a_record_too(folder, fields):
    (folder / "adapter_base.json").unlink()
    assert "does not load onto" in refused(tiny_sparse("llama", **fields), folder)


def test_another_rank_is_refused(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    assert "with the rank, that it was trained for" in refused(load(base), folder)


def test_an_adapter_that_matches_no_parameter_is_refused(base, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_parameters"] = ["nowhere.gate_up_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(load(base), folder)
    config["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    change(folder, lambda tensors: [tensors.__setitem__(f"x.{key}", tensors.pop(key)) for key in list(tensors)])
    assert "8 of 8 tensors that it needs are not in the file" in refused(load(base), folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: tensors.pop(sorted(tensors)[0]), "1 of 8 tensors that it needs are not in the file, such as"),
        (
            lambda tensors: tensors.update(stray=torch.zeros(2)),
            "1 of 9 tensors in the file have no place in it, such as",
        ),
    ],
)
def test_a_tensor_too_few_or_too_many_is_refused(base, folder, edit, said):
    change(folder, edit)
    assert said in refused(load(base), folder)


def test_a_pickle_and_a_model_are_no_adapter(base, folder, tmp_path):
    assert "not an adapter" in refused(load(base), base)
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    assert "not an adapter" in refused(load(base), pickled)
