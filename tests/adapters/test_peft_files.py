"""Adapter files go both ways between these layers and PEFT's own, which read them without this package."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file

from adapted_models import STOCK, adapted, logits_of, shake, stock_mixture
from hf_sparse_moe import expert_lora_config
from hf_sparse_moe.adapters import load_expert_lora
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from hf_sparse_moe.adapters.expert_lora import config_class
from tiny_models import BACKBONES, tiny_inputs, tiny_sparse


WEIGHTS = "adapter_model.safetensors"
PLAIN_PEFT = """
import pathlib, sys, torch, transformers
from peft import PeftModel
for folder in map(pathlib.Path, sys.argv[1:]):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        torch.save(model(**torch.load(folder / "inputs.pt")).logits, folder / "logits.pt")
assert not any("sparse_moe" in name for name in sys.modules)
"""


def mixture(name):
    """In float64, where two ways to compute the same differ by nothing but what a wrong one would."""
    model = (stock_mixture(name) if name in STOCK else tiny_sparse(name)).double()
    model.set_experts_implementation("eager")  # `grouped_mm` knows no float64
    return model


def plain_peft(model, folder):
    loaded = PeftModel.from_pretrained(model, folder).eval()
    assert any(type(module) is ParamWrapper for module in loaded.modules())
    return loaded


@pytest.mark.parametrize("name", [*BACKBONES, *STOCK])
def test_plain_peft_computes_the_same_from_our_file(name, tmp_path):
    inputs = tiny_inputs(mixture(name), labels=False)
    peft_model = adapted(mixture(name), use_rslora=True)
    peft_model.save_pretrained(tmp_path)
    expected = logits_of(peft_model, inputs)
    torch.testing.assert_close(logits_of(plain_peft(mixture(name), tmp_path), inputs), expected, rtol=0, atol=1e-10)
    again = load_expert_lora(mixture(name), tmp_path)
    assert any(isinstance(module, ExpertLora) for module in again.modules())
    assert torch.equal(logits_of(again, inputs), expected)


@pytest.mark.slow
def test_without_this_package_and_in_float32(tmp_path):
    expected = {}
    for name in ("mixtral", "qwen3_moe", "olmoe"):
        folder = tmp_path / name
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(STOCK[name]).eval()
        model.save_pretrained(folder / "base")
        inputs = tiny_inputs(model, labels=False)
        torch.save(inputs, folder / "inputs.pt")
        peft_model = adapted(model)
        peft_model.save_pretrained(folder / "adapter")
        expected[folder] = logits_of(peft_model, inputs)
        assert (logits_of(peft_model.unload(), inputs) - expected[folder]).abs().max() > 1e-3
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, *map(str, expected)], check=True, env={"HF_HUB_OFFLINE": "1"})
    for folder, logits in expected.items():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["decoder", "gpt2", *STOCK])
def test_we_compute_the_same_from_a_plain_peft_file(name, tmp_path):
    inputs = tiny_inputs(mixture(name), labels=False)
    up = "up_proj" if name == "gpt2" else "gate_up_proj"
    config = LoraConfig(r=3, target_modules=[], target_parameters=[f"experts.{up}", "experts.down_proj"])
    theirs = shake(get_peft_model(mixture(name), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_expert_lora(mixture(name), tmp_path)
    assert any(isinstance(module, ExpertLora) for module in ours.modules())
    expected = logits_of(theirs, inputs)
    torch.testing.assert_close(logits_of(ours, inputs), expected, rtol=0, atol=1e-10)
    ours.save_pretrained(tmp_path / "again")
    before, after = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


CHOICES = {
    "one layer's experts": {"experts": {1: [0, 3]}},
    "two layers' experts": {"experts": {0: [1], 1: [0, 2, 3]}},
    "gate only": {"projections": ("gate",)},
    "up and down": {"projections": ("up", "down")},
    "down only": {"projections": ("down",)},
    "both": {"experts": {0: [1], 1: [2]}, "projections": ("gate",)},
    "rank a layer": {"rank_pattern": {r"layers\.1\..*": 5}},
    "dropout": {"lora_dropout": 0.25},
    "shared": {"shared": True},
    "shared by some": {"shared": True, "experts": {0: [1], 1: [0, 2, 3]}, "projections": ("gate", "down")},
    "router and attention": {"attention": True, "router": True},
}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT looks at target modules only
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["gpt_oss", "decoder"])
def test_choices_travel(name, choice, tmp_path):
    inputs = tiny_inputs(mixture(name), labels=False)
    peft_model = adapted(mixture(name), **CHOICES[choice])
    for key, parameter in peft_model.named_parameters():
        if "modules_to_save" in key:
            parameter.data.mul_(2)
    expected = logits_of(peft_model, inputs)
    peft_model.save_pretrained(tmp_path)
    theirs = (
        plain_peft(mixture(name), tmp_path)
        if choice != "dropout"
        else PeftModel.from_pretrained(mixture(name), tmp_path)
    )
    torch.testing.assert_close(logits_of(theirs, inputs), expected, rtol=0, atol=1e-10)
    ours = load_expert_lora(mixture(name), tmp_path, is_trainable=True)
    assert torch.equal(logits_of(ours, inputs), expected)
    shapes = {key: p.shape for key, p in peft_model.named_parameters() if p.requires_grad}
    assert {key: p.shape for key, p in ours.named_parameters() if p.requires_grad} == shapes
    if choice == "dropout":  # which PEFT refuses on experts: in its place come our layers
        for loaded in (ours, theirs):
            assert {m.lora_dropout["default"].p for m in loaded.modules() if isinstance(m, ExpertLora)} == {0.25}


def test_only_the_adapter_is_saved(tmp_path):
    peft_model = adapted(stock_mixture("mixtral"))
    peft_model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert saved
    assert all(".lora_" in key for key in saved)
    # gate and up in the inner wrapper's place, down in the outer's; B with the experts running fastest
    layer = "base_model.model.model.layers.0.mlp.experts"
    assert saved[f"{layer}.base_layer.lora_A.weight"].shape == (4 * 2, 32)
    assert saved[f"{layer}.lora_B.weight"].shape == (32, 2 * 4)
    b = peft_model.get_submodule(layer).lora_B["default"].weight
    assert torch.equal(saved[f"{layer}.lora_B.weight"][5, 1 * 4 + 3], b[3, 1, 5])


def test_what_only_we_read_leaves_with_the_settings_that_it_told(tmp_path):
    config = expert_lora_config(stock_mixture("mixtral"), shared=True)
    config.save_pretrained(tmp_path)
    assert "shared" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert config_class().from_pretrained(tmp_path).shared
    expert_lora_config(stock_mixture("mixtral")).save_pretrained(tmp_path)
    assert not config_class().from_pretrained(tmp_path).shared


def test_the_dropout_of_training_is_what_the_file_says(tmp_path):
    config = expert_lora_config(stock_mixture("mixtral"), lora_dropout=0.1)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    assert json.loads(path.read_text())["lora_dropout"] == 0.1
    assert config_class().from_pretrained(tmp_path).lora_dropout == 0.1
    # version 0.1 wrote 0 there, and the truth beside
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.0}))
    (tmp_path / "expert_lora.json").write_text(json.dumps({"lora_dropout": 0.1, "experts": None}))
    assert config_class().from_pretrained(tmp_path).lora_dropout == 0.1


def test_an_adapter_that_is_not_shared_is_not_loaded_as_one_that_is(tmp_path):
    adapted(stock_mixture("mixtral")).save_pretrained(tmp_path)
    peft_model = adapted(stock_mixture("mixtral"), shared=True)
    with pytest.raises(ValueError, match="is not the same for all experts"):
        peft_model.load_adapter(tmp_path, "default")


def test_a_second_adapter_from_a_file_of_plain_peft(tmp_path):
    inputs = tiny_inputs(mixture("mixtral"), labels=False)
    config = LoraConfig(r=3, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    theirs = shake(get_peft_model(mixture("mixtral"), config), seed=1).eval()
    theirs.save_pretrained(tmp_path)
    peft_model = adapted(mixture("mixtral"))
    peft_model.load_adapter(tmp_path, "other")
    peft_model.set_adapter("other")
    torch.testing.assert_close(logits_of(peft_model, inputs), logits_of(theirs, inputs), rtol=0, atol=1e-10)


def test_loading_without_a_first_copy(tmp_path):
    peft_model = adapted(stock_mixture("mixtral"))
    peft_model.save_pretrained(tmp_path)
    inputs = tiny_inputs(stock_mixture("mixtral"), labels=False)
    again = load_expert_lora(stock_mixture("mixtral"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits_of(again, inputs), logits_of(peft_model, inputs))


def changed(config, **fields):
    return type(config)(**{**config.to_dict(), **fields})


@pytest.mark.parametrize(
    "fields",
    [{"num_local_experts": 8}, {"num_local_experts": 2}, {"hidden_size": 64}, {"intermediate_size": 40}],
    ids=str,
)
def test_an_adapter_of_another_model_is_refused(fields, tmp_path):
    adapted(stock_mixture("mixtral")).save_pretrained(tmp_path)
    other = hf.AutoModelForCausalLM.from_config(changed(STOCK["mixtral"], **fields))
    with pytest.raises(ValueError, match="Load it into the model, and with the rank, that it was trained for"):
        load_expert_lora(other, tmp_path)


def test_a_state_dict_that_an_engine_gathered_makes_the_same_file(tmp_path):
    """FSDP and ZeRO gather parameters by name, and hand them to `save_pretrained`."""
    peft_model = adapted(stock_mixture("mixtral"), experts={0: [0, 2], 1: [3]})
    gathered = {name: parameter.detach().clone() for name, parameter in peft_model.named_parameters()}
    assert gathered.keys() <= peft_model.state_dict().keys()
    assert all(torch.equal(peft_model.state_dict()[name], value) for name, value in gathered.items())
    peft_model.save_pretrained(tmp_path / "one")
    peft_model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    one, other = (load_file(tmp_path / folder / WEIGHTS) for folder in ("one", "gathered"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    adapted(stock_mixture("mixtral"), r=2).save_pretrained(tmp_path)
    peft_model = adapted(stock_mixture("mixtral"), r=4)
    with pytest.raises(ValueError, match="with the rank, that it was trained for"):
        peft_model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("fields", [{"experts": {0: [0], 1: [1]}}, {"projections": ("gate", "down")}], ids=str)
def test_a_file_that_holds_more_than_was_chosen_is_refused(fields, tmp_path):
    model = stock_mixture("mixtral")
    adapted(stock_mixture("mixtral")).save_pretrained(tmp_path)
    peft_model = adapted(model, **fields)
    with pytest.raises(ValueError, match="Choose, in `experts` and `projections`, at least"):
        peft_model.load_adapter(tmp_path, "default")


def test_a_file_with_a_bad_tensor_is_refused(tmp_path):
    adapted(stock_mixture("mixtral")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(iter(tensors))
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="of the adapter is"):
        load_expert_lora(stock_mixture("mixtral"), tmp_path)


def test_an_adapter_that_matches_nothing_is_refused(tmp_path):
    """Such as one of the stock twin of a mixture, whose parameters have other names; PEFT only warns."""
    model = tiny_sparse("decoder")
    adapted(model).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("model.dense.", "model."): value for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"8 of 8 tensors that it needs are not in the file.*8 of 8 .* no place"):
        load_expert_lora(tiny_sparse("decoder"), str(tmp_path))
