"""Packed from the first byte: what loads, saves and comes back holds codes; a bad file ends in one sentence."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from adapted_models import STOCK, logits_of, stock_mixture
from hf_sparse_moe import (
    ExpertsQuantizationConfig,
    doctor,
    explain_export,
    explain_serving,
    export,
    import_stock,
    to_dense,
    upcycle,
    write_model_card,
)
from hf_sparse_moe.insight.anatomy import describe_checkpoint
from hf_sparse_moe.models.quantized_weight import QuantizedWeight
from hf_sparse_moe.quantization import quantize_experts
from processes import in_processes, peak_bytes
from tiny_models import FAMILIES, LANGUAGE_MODELS, architecture_of, tiny_dense, tiny_inputs, tiny_sparse


pytest.importorskip("bitsandbytes")

# The attention's kernels of bitsandbytes take rows of whole blocks.
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def mixture(name):
    return stock_mixture(name) if name in STOCK else tiny_sparse(name)


def auto_class(name):
    return hf.AutoModelForCausalLM if name in STOCK else LANGUAGE_MODELS[architecture_of(name)[1].family]


def load(name, folder, **kwargs):
    """Load, and make sure that nothing was missing, left over or drawn afresh."""
    model, info = auto_class(name).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model


def packed(model):
    return {name: value for name, value in model.named_parameters() if isinstance(value, QuantizedWeight)}


def assert_same_codes(model, other):
    codes, others = packed(model), packed(other)
    assert codes.keys() == others.keys()
    assert codes
    for name, weight in codes.items():
        assert torch.equal(weight.codes, others[name].codes), name
        assert torch.equal(weight.scales, others[name].scales), name
        assert (weight.shape, weight.dtype) == (others[name].shape, others[name].dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [*FAMILIES, *STOCK])
def test_what_is_packed_on_loading_is_what_memory_packs_and_comes_back_bit_for_bit(name, bits, tmp_path):
    model = mixture(name)
    inputs = tiny_inputs(model, labels=False)
    model.save_pretrained(tmp_path / "floats", max_shard_size="20KB")
    loaded = load(name, tmp_path / "floats", quantization_config=ExpertsQuantizationConfig(bits=bits))
    quantize_experts(model, bits)
    assert_same_codes(loaded, model)
    for folder, source in (("loaded", loaded), ("in memory", model)):
        source.save_pretrained(tmp_path / folder, max_shard_size="20KB")
        back = load(name, tmp_path / folder)
        assert_same_codes(back, model)
        assert torch.equal(logits_of(back, inputs), logits_of(model, inputs))
        assert all(torch.equal(value, dict(back.named_parameters())[key]) for key, value in plain(model).items())
    back.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["bits"] == bits
    assert_same_codes(load(name, tmp_path / "again"), model)


def plain(model):
    return {key: value for key, value in model.named_parameters() if not isinstance(value, QuantizedWeight)}


def test_experts_in_four_bits_take_0_15_of_float32_on_disk(tmp_path):
    """Codes and scales of the experts' matrices, against the same matrices in float32."""
    model = tiny_sparse("llama", dense_fields=WIDE)
    model.save_pretrained(tmp_path / "floats")
    quantize_experts(model, 4).save_pretrained(tmp_path / "packed")
    sizes = [
        sum(t.nbytes for key, t in load_file(tmp_path / folder / "model.safetensors").items() if ".experts." in key)
        for folder in ("floats", "packed")
    ]
    assert sizes[1] <= 0.15 * sizes[0]
    files = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in ("floats", "packed")]
    assert files[0] - files[1] > 0.84 * sizes[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_has_the_linears(bits, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if bits == 4:
        linears = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    else:
        linears = hf.BitsAndBytesConfig(load_in_8bit=True)
    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    model = tiny_sparse("llama", dense_fields=WIDE)
    inputs = tiny_inputs(model, labels=False)
    model.save_pretrained(tmp_path / "floats")
    both = load("llama", tmp_path / "floats", quantization_config=ExpertsQuantizationConfig(4, linears))
    assert sum(isinstance(module, kind) for module in both.modules()) == 8  # the attention of two layers
    one_after_the_other = quantize_experts(load("llama", tmp_path / "floats", quantization_config=linears), 4)
    assert_same_codes(both, one_after_the_other)
    expected = logits_of(both, inputs)
    assert torch.equal(expected, logits_of(one_after_the_other, inputs))
    both = load("llama", tmp_path / "floats", quantization_config=ExpertsQuantizationConfig(4, linears))
    both.save_pretrained(tmp_path / "packed")  # a forward on a CPU leaves 4-bit linears in another order
    back = load("llama", tmp_path / "packed")
    assert sum(isinstance(module, kind) for module in back.modules()) == 8
    assert_same_codes(back, both)
    assert torch.equal(logits_of(back, inputs), expected)


REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig
folder, target = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert AutoQuantizationConfig.from_dict(config.quantization_config).bits == 4  # as lm-eval does it
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(**torch.load(f"{folder}/inputs.pt")).logits, f"{folder}/logits.pt")
model.save_pretrained(target)
assert "hf_sparse_moe" not in sys.modules
"""


@pytest.mark.slow
def test_without_the_package(tmp_path):
    """The code that travels beside the weights reads and writes codes."""
    model = quantize_experts(tiny_sparse("llama"), 4)
    model.save_pretrained(tmp_path / "packed")
    inputs = tiny_inputs(model, labels=False)
    torch.save(dict(inputs), tmp_path / "packed" / "inputs.pt")
    run = [sys.executable, "-c", REMOTE, "packed", "again"]
    run = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    torch.testing.assert_close(torch.load(tmp_path / "packed" / "logits.pt"), logits_of(model, inputs))
    assert_same_codes(load("llama", tmp_path / "again"), model)


def tell_of_memory(folder):
    """Write down the most that this process holds while it loads and packs models, beside what it held before."""
    hf.utils.logging.disable_progress_bar()
    config = ExpertsQuantizationConfig(4)
    for name in ("llama", "mixtral"):
        load(name, folder / f"tiny {name}", quantization_config=config)  # whatever is imported for it
        models = []
        peak = peak_bytes(
            lambda name=name, models=models: models.append(load(name, folder / name, quantization_config=config))
        )
        held = sum(value.nbytes for value in models[0].state_dict().values())
        (folder / f"{name}.json").write_text(json.dumps({"peak": peak, "held": held}))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_a_quarter_more_memory_than_the_packed_model_and_one_shard(tmp_path):
    """Of a mixture of ours, stored with all experts in one tensor, and of a stock one, with a matrix an expert."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    stock = {**sizes, "num_local_experts": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    floats, shards = {}, {}
    for name in ("llama", "mixtral"):
        mixture(name).save_pretrained(tmp_path / f"tiny {name}")
        ours = name == "llama"
        config = hf.MixtralConfig(**stock)
        large = tiny_sparse(name, dense_fields=sizes, num_experts=16) if ours else hf.MixtralForCausalLM(config)
        large.save_pretrained(tmp_path / name, max_shard_size="20MB")
        floats[name] = sum(value.nbytes for value in large.state_dict().values())
        shards[name] = max(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors"))
        del large
    assert in_processes(1, tell_of_memory, tmp_path) == [0]
    for name, shard in shards.items():
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told["held"] < 0.2 * floats[name]
        assert told["peak"] <= 1.25 * told["held"] + shard
        assert told["peak"] < 0.4 * floats[name]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_config_that_leaves_the_experts_says_so_and_what_to_do(name, tmp_path, caplog, monkeypatch):
    bits = hf.BitsAndBytesConfig(load_in_8bit=True)
    mixture(name).save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        model = load(name, tmp_path, quantization_config=bits)
    assert not packed(model)
    assert f"`BitsAndBytesConfig` leaves the experts of `{type(model).__name__}` as floats" in caplog.text
    assert "ExpertsQuantizationConfig(bits=4, linears=that_config)" in caplog.text
    caplog.clear()
    load(name, tmp_path, quantization_config=ExpertsQuantizationConfig(4, linears=bits))
    assert "as floats" not in caplog.text


@pytest.mark.parametrize("bits", [4, 8, None])
def test_sizes_card_and_doctor_know_packed_experts(bits, tmp_path):
    model = tiny_sparse("llama")
    if bits:
        quantize_experts(model, bits)
    model.save_pretrained(tmp_path)
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    described = describe_checkpoint(tmp_path)
    assert described.stored_bytes == stored == model.get_memory_footprint(return_buffers=False)
    assert described.parameters["total"]["total"] == tiny_sparse("llama").num_parameters()
    write_model_card(tmp_path)
    precision = next(line for line in (tmp_path / "README.md").read_text().splitlines() if "Precision" in line)
    assert ("experts in" in precision) == bool(bits)
    assert f"experts in {bits} bits (bitsandbytes)" in precision or not bits
    report = doctor(tmp_path)
    assert not [finding for finding in report.findings if finding.verdict in ("failed", "warning")]


def test_what_works_on_floats_refuses_codes_in_one_sentence(tmp_path):
    quantize_experts(tiny_sparse("llama"), 4).save_pretrained(tmp_path / "packed")
    model = load("llama", tmp_path / "packed")
    calls = {
        "export": lambda: export(tmp_path / "packed", tmp_path / "out"),
        "export of a model": lambda: export(model, tmp_path / "out"),
        "more layers": lambda: upcycle(model),
        "to_dense": lambda: to_dense(tmp_path / "packed", output=tmp_path / "out"),
        "upcycle": lambda: upcycle(tmp_path / "packed"),
        "import of a stock model": lambda: import_stock(quantize_experts(stock_mixture("mixtral"))),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes_experts\).*dequantize"):
            call()
        assert not (tmp_path / "out").exists(), name
    for report in (explain_export(tmp_path / "packed"), explain_serving(model)):
        assert report.possible == []
        assert all("experts are packed" in target.obstacles[0] for target in report.targets)
    export(model.dequantize(), tmp_path / "out")
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tiny_inputs(model, labels=False)
    torch.testing.assert_close(logits_of(exported, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-4)


# ---- bad input ----------------------------------------------------------------------------------------------


def test_what_no_kernel_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`bits=3` must be 8 or 4"):
        ExpertsQuantizationConfig(bits=3)
    with pytest.raises(ValueError, match="`block_size=128` must be 64"):
        ExpertsQuantizationConfig(block_size=128)
    with pytest.raises(ValueError, match="takes `bits`, `linears` and `block_size`, not"):
        ExpertsQuantizationConfig(blocksize=64)
    tiny_dense("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`LlamaForCausalLM` has no experts"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ExpertsQuantizationConfig())


@pytest.mark.parametrize("elsewhere", ["disk", "cpu"])
def test_offloading_is_refused(elsewhere, tmp_path):
    tiny_sparse("llama").save_pretrained(tmp_path)
    places = {"": "meta" if elsewhere == "cpu" else "cpu", "dense.model.layers.1": elsewhere}
    with pytest.raises(ValueError, match="packed experts are not offloaded"):
        load("llama", tmp_path, device_map=places, quantization_config=ExpertsQuantizationConfig())


def rewritten(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def halve_the_scales(tensors):
    tensors |= {key: t[:, ::2].contiguous() for key, t in tensors.items() if key.endswith("absmax")}


def drop_the_codes(tensors):
    for key in [key for key in tensors if key.endswith("experts.down_proj")]:
        del tensors[key]


@pytest.mark.parametrize("change", [halve_the_scales, drop_the_codes])
def test_a_packed_file_of_another_form_is_refused_in_one_sentence(change, tmp_path):
    quantize_experts(tiny_sparse("llama"), 4).save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=r"experts\.\w+` is stored as .*not 4 bits in blocks of 64"):
        load("llama", tmp_path)


def test_another_block_size_in_the_config_is_refused(tmp_path):
    quantize_experts(tiny_sparse("llama"), 4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["block_size"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`block_size=128` must be 64"):
        load("llama", tmp_path)


def test_a_packed_file_cut_short_is_refused_in_one_sentence(tmp_path):
    quantize_experts(tiny_sparse("llama"), 4).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors` is cut short"):
        load("llama", tmp_path)
