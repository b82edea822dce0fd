"""What is saved comes back: whole, sharded, in half precision, spread over devices, and under its own names."""

import copy
import json

import accelerate
import pytest
import torch
import transformers as hf
from safetensors import safe_open

from hf_sparse_moe import upcycle
from tiny_models import (
    ARCHITECTURES,
    BACKBONES,
    FAMILIES,
    LANGUAGE_MODELS,
    architecture_of,
    tiny_dense,
    tiny_inputs,
    tiny_sparse,
)


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]


def auto_class(name: str) -> type:
    return LANGUAGE_MODELS[architecture_of(name)[1].family]


def load(name: str, folder, **kwargs) -> hf.PreTrainedModel:
    """Load, and make sure that nothing was missing, left over or drawn afresh."""
    model, info = auto_class(name).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model


def assert_same_state(model: hf.PreTrainedModel, expected: hf.PreTrainedModel) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}")


def logits(model: hf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(model, labels=False)).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_model_comes_back_bit_for_bit_under_its_own_keys(name, tmp_path):
    """Its own, since a Trainer's resume loads without any conversion (transformers issue 48805)."""
    model = tiny_sparse(name)
    model.save_pretrained(tmp_path)
    loaded = load(name, tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same_state(loaded, model)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)  # memory is aligned otherwise
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    unsaved = set(model.all_tied_weights_keys) | {f"dense.{key}" for key in model.dense._keys_to_ignore_on_save or ()}
    assert state.keys() == model.state_dict().keys() - unsaved
    fresh = tiny_sparse(name)
    for key, parameter in fresh.named_parameters():
        if key in state:
            torch.nn.init.constant_(parameter, float("nan"))
    keys = fresh.load_state_dict(state, strict=not unsaved)
    assert set(keys.missing_keys) == unsaved
    assert not keys.unexpected_keys
    assert_same_state(fresh, model)


@pytest.mark.parametrize("name", BACKBONES)
def test_shards(name, tmp_path):
    model = tiny_sparse(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_state(load(name, tmp_path), model)


@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision(name, tmp_path):
    model = tiny_sparse(name).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = load(name, tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert_same_state(loaded, model)
    wide = load(name, tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_state_dict_in_another_dtype_comes_back_in_it(name, tmp_path):
    model = tiny_sparse(name)
    state = {key: tensor.bfloat16() for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | state)
    loaded = load(name, tmp_path)
    assert (model.dtype, loaded.dtype, loaded.config.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert_same_state(loaded, model.bfloat16())


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_device_map(name, device_map, tmp_path):
    model = tiny_sparse(name)
    model.save_pretrained(tmp_path)
    assert_same_state(load(name, tmp_path, device_map=device_map), model)


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_on_disk(name, tmp_path):
    model = tiny_sparse(name)
    model.save_pretrained(tmp_path / "model")
    offloaded = load(
        name,
        tmp_path / "model",
        device_map=disk_map(model),
        offload_folder=tmp_path / "offload",
    )
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"cpu", "meta"}
    torch.testing.assert_close(logits(offloaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bart"])
def test_accelerate_loads_tied_weights(name, on_disk, tmp_path):
    """As its guide has it: built without storage, then tied, then filled; a mixture as well as the dense model."""
    for model in (tiny_dense(name), tiny_sparse(name)):
        assert model.all_tied_weights_keys
        folder = tmp_path / type(model).__name__
        accelerate.Accelerator(cpu=True).save_model(model, folder)
        with accelerate.init_empty_weights():
            empty = type(model)(copy.deepcopy(model.config))
        empty.tie_weights()
        device_map = disk_map(model) if on_disk else {"": "cpu"}
        loaded = accelerate.load_checkpoint_and_dispatch(
            empty, folder, device_map, offload_folder=tmp_path / "offload"
        )
        torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=1e-5, atol=1e-5)


def test_accelerate_unties_weights_that_have_storage(tmp_path):
    """Of the dense model as of the mixture: docs/models.md says so."""
    for model in (tiny_dense("gpt2"), tiny_sparse("gpt2")):
        folder = tmp_path / type(model).__name__
        accelerate.Accelerator(cpu=True).save_model(model, folder)
        fresh = type(model)(copy.deepcopy(model.config))
        loaded = accelerate.load_checkpoint_and_dispatch(fresh, folder, {"": "cpu"})
        assert (logits(loaded.eval()) - logits(model)).abs().max() > 1


def disk_map(model: hf.PreTrainedModel) -> dict[str, str]:
    """All modules with weights on the CPU, one entry each, but those of every second layer on disk."""
    device_map = {}
    for path, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        owner = path.rpartition(".")[0]
        key = path if model.get_submodule(owner) is getattr(model, "dense", model) else owner
        device_map[key] = "disk" if ".1." in path else "cpu"
    return device_map


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_saved_again_and_again_is_the_same_file(name, tmp_path):
    model = tiny_sparse(name)
    model.save_pretrained(tmp_path / "first")
    load(name, tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_fresh_model_has_no_uninitialised_weight(name):
    """`torch.empty` gives NaN in the tests, so a weight that nobody initialised shows."""
    model = auto_class(name).from_config(tiny_sparse(name).config)
    for key, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), key
    for block in model.sparse_blocks:
        assert 0 < block.gate.weight.std() < 0.1
        assert block.gate.weight.unique().numel() > 100
        up = getattr(block.experts, block.experts.up_name)
        assert (up[0] - up[1]).abs().mean() > 1e-3


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_weight_that_the_file_lacks_is_drawn_and_named(name, tmp_path):
    model = tiny_sparse(name)
    state = model.state_dict()
    lacking = next(key for key in state if key.endswith("gate.weight"))
    for key in model.all_tied_weights_keys:
        state.pop(key)
    state.pop(lacking)
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {lacking}
    assert torch.isfinite(loaded.state_dict()[lacking]).all()
    others = [key for key in state if "gate" in key]
    assert all(torch.equal(loaded.state_dict()[key], state[key]) for key in others)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_generation_config_travels(name, tmp_path):
    model = tiny_sparse(name)
    if not model.can_generate():
        pytest.skip("an encoder does not generate")
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path)
    loaded = load(name, tmp_path)
    assert loaded.generation_config.max_new_tokens == 5
    assert loaded.generation_config.decoder_start_token_id == model.generation_config.decoder_start_token_id


def test_the_folder_of_the_dense_checkpoint_stays_at_home(tmp_path):
    """Whose disk it lay on is nobody's business who reads the published config."""
    dense = tiny_dense("llama")
    dense.save_pretrained(tmp_path / "secret-folder")
    upcycle(str(tmp_path / "secret-folder"), num_experts=2).save_pretrained(tmp_path / "sparse")
    assert "secret-folder" not in (tmp_path / "sparse" / "config.json").read_text()


def test_a_head_of_one_s_own_does_not_enter_the_code_map_of_others(tmp_path):
    base = type(tiny_sparse("llama")).__mro__[1]

    class OwnHead(base):  # a notebook's
        dense_auto_class, output_class = hf.AutoModelForCausalLM, type(tiny_sparse("llama")).output_class

    OwnHead.register_for_auto_class("AutoModelForCausalLM")
    assert OwnHead in base.__subclasses__()
    model = tiny_sparse("llama")
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_sparse_moe.SparseMoeDecoderForCausalLM"
    assert {value.partition(".")[0] for value in auto_map.values()} == {
        "configuration_sparse_moe",
        "modeling_sparse_moe",
    }
    assert len(auto_map) == 6


def test_saving_to_the_hub_goes_where_it_was_told(tmp_path, monkeypatch):
    model, told = tiny_sparse("llama"), {}
    monkeypatch.setattr(type(model), "publisher", staticmethod(lambda model, repo_id, **kwargs: told.update(kwargs)))
    asked = {"revision": "draft", "tags": ["mine"], "private": True, "commit_message": "one", "token": "x"}
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model", max_shard_size="1MB", **asked)
    assert told == asked | {"max_shard_size": "1MB"}
