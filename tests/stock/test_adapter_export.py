"""Adapters go from a mixture to its stock export and back, in PEFT's form and in that of servers."""

import json
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from adapted_models import adapted, logits_of, shake, stock_mixture
from cli_client import run_cli
from hf_sparse_moe import doctor, expert_lora_config, export, export_adapter, import_adapter, load_adapter
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from hf_sparse_moe.stock import EXPORT_TARGETS
from tiny_models import tiny_inputs


WEIGHTS = "adapter_model.safetensors"
ROWS = {row.model_type: row for row in EXPORT_TARGETS}


@pytest.fixture
def make(mixture, variants):
    """A mixture that can become a stock architecture, the same at every call."""

    def make_one(architecture, variant="plain"):
        row = ROWS[architecture]
        return mixture(next(iter(row.dense)), **variants[variant](row, next(iter(row.router))))

    return make_one


def trained(model, **choice):
    """With adapters on experts and attention, and other routers."""
    peft_model = adapted(model, **{"attention": True, "router": True, **choice})
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(-0.7)
    return peft_model


def stock_model(folder):
    config = json.loads((folder / "config.json").read_text())
    auto_class = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    return auto_class.from_pretrained(folder).eval()


def both_ways(make_model, architecture, folder, **choice):
    """An adapter exported with its base, and the logits of what was merged first and exported then."""
    peft_model = trained(make_model(), **choice)
    peft_model.save_pretrained(folder / "ours")
    export_adapter(peft_model, folder / "adapter", architecture=architecture)
    merged = peft_model.merge_and_unload()
    export(merged, folder / "merged", architecture)
    export(make_model(), folder / "stock", architecture)
    inputs = tiny_inputs(merged, labels=False)
    wanted = logits_of(stock_model(folder / "merged"), inputs)
    assert (logits_of(stock_model(folder / "stock"), inputs) - wanted).abs().max() > 0.1
    return inputs, wanted


CASES = [
    ("mixtral", "plain", {}),
    ("qwen3_moe", "rich", {}),
    ("olmoe", "plain", {}),
    ("granitemoeshared", "rich", {}),
    ("deepseek_v3", "rich", {}),
    ("ernie4_5_moe", "rich", {}),
    ("switch_transformers", "rich", {"attention": False}),
    ("mixtral", "plain", {"experts": {1: [0, 2], 3: None}, "projections": ("gate", "down")}),
    ("mixtral", "plain", {"shared": True, "experts": {1: [0, 2], 3: None}}),
    ("qwen3_moe", "plain", {"rank_pattern": {r".*layers\.1\..*": 5}, "use_rslora": True}),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks at target modules only
@pytest.mark.parametrize(
    ("architecture", "variant", "choice"), CASES, ids=lambda one: one if isinstance(one, str) else "-".join(one)
)
def test_it_computes_on_the_stock_model_what_merging_first_does(architecture, variant, choice, make, tmp_path):
    inputs, wanted = both_ways(partial(make, architecture, variant), architecture, tmp_path, **choice)
    plain = PeftModel.from_pretrained(stock_model(tmp_path / "stock"), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(plain, inputs), wanted, rtol=1e-4, atol=1e-4)
    if architecture != "switch_transformers":  # experts in modules of their own are PEFT's linear layers
        ours = load_adapter(stock_model(tmp_path / "stock"), tmp_path / "adapter")
        assert any(isinstance(module, ExpertLora) for module in ours.modules())
        torch.testing.assert_close(logits_of(ours, inputs), wanted, rtol=1e-4, atol=1e-4)
    # and back
    import_adapter(tmp_path / "adapter", make(architecture, variant), tmp_path / "back", architecture=architecture)
    back = load_adapter(make(architecture, variant), tmp_path / "back")
    torch.testing.assert_close(logits_of(back, inputs), wanted, rtol=1e-4, atol=1e-4)
    if not choice:
        before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def on_the_checkpoint(stock, adapter, output):
    """What a server computes: each pair of matrices is laid onto the tensor of the checkpoint of its name."""
    model = stock_model(stock)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]  # the scale is 1
    tensors, factors = load_file(stock / "model.safetensors"), load_file(adapter / WEIGHTS)
    leaves = set()
    for name in [name for name in factors if ".lora_A." in name]:
        a, b = factors.pop(name), factors.pop(name.replace(".lora_A.", ".lora_B."))
        place = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        assert a.shape[0] == b.shape[1] == config["r"]
        tensors[place] += b @ a
        leaves.add(place.split(".")[-2])
    assert not factors
    assert leaves == {*config["target_modules"]}
    model.config.save_pretrained(output)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    return stock_model(output)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    ("architecture", "choice"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"rank_pattern": {r".*layers\.1\..*": 5}, "use_rslora": True}),
        ("olmoe", {"experts": {1: [0, 2]}, "projections": ("gate",)}),
        ("deepseek_v3", {}),
    ],
)
def test_servers_get_two_matrices_a_projection_of_an_expert(architecture, choice, make, tmp_path):
    inputs, wanted = both_ways(partial(make, architecture), architecture, tmp_path, router=False, **choice)
    base = tmp_path / "base"
    make(architecture).save_pretrained(base)
    export_adapter(tmp_path / "ours", tmp_path / "vllm", "vllm", architecture=architecture, base=base)
    served = on_the_checkpoint(tmp_path / "stock", tmp_path / "vllm", tmp_path / "served")
    torch.testing.assert_close(logits_of(served, inputs), wanted, rtol=1e-4, atol=1e-4)
    # SGLang has one set of names for projections.
    export_adapter(tmp_path / "ours", tmp_path / "sglang", "sglang", architecture=architecture, base=base)
    one, other = (load_file(tmp_path / server / WEIGHTS) for server in ("vllm", "sglang"))
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    renamed = {".".join(names.get(part, part) for part in name.split(".")): value for name, value in one.items()}
    assert renamed.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in renamed.items())


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_peft_reads_the_matrices_of_servers_too(architecture, make, tmp_path):
    """By its own conversion to fused experts."""
    inputs, wanted = both_ways(partial(make, architecture), architecture, tmp_path, router=False)
    make(architecture).save_pretrained(tmp_path / "base")
    export_adapter(tmp_path / "ours", tmp_path / "vllm", "vllm", base=tmp_path / "base")
    model = PeftModel.from_pretrained(stock_model(tmp_path / "stock"), tmp_path / "vllm")
    torch.testing.assert_close(logits_of(model, inputs), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_trained_on_the_export_comes_back(make, tmp_path):
    export(make("mixtral"), tmp_path / "stock")
    stock = stock_model(tmp_path / "stock")
    config = expert_lora_config(stock, r=3, attention=True, router=True, lora_dropout=0.1)
    peft_model = shake(get_peft_model(stock, config))
    peft_model.save_pretrained(tmp_path / "adapter")
    inputs = tiny_inputs(stock, labels=False)
    make("mixtral").save_pretrained(tmp_path / "ours")
    report = import_adapter(tmp_path / "adapter", tmp_path / "ours", tmp_path / "back")
    assert report.architecture == "sparse_moe_decoder"
    back = load_adapter(make("mixtral"), tmp_path / "back")
    torch.testing.assert_close(logits_of(back, inputs), logits_of(peft_model, inputs), rtol=1e-4, atol=1e-4)
    assert back.peft_config["default"].lora_dropout == 0.1


def test_what_a_reader_does_not_read_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="is trained in full, which vllm does not read"):
        export_adapter(trained(make("mixtral")), tmp_path / "out", "vllm")
    with pytest.raises(ValueError, match="`MixtralForCausalLM` is not a mixture of this package"):
        export_adapter(adapted(stock_mixture("mixtral")), tmp_path / "out")
    peft_model = adapted(make("granitemoe"))
    with pytest.raises(ValueError, match="keeps all experts in one tensor, for which sglang reads no adapter"):
        export_adapter(peft_model, tmp_path / "out", "sglang")
    with pytest.raises(ValueError, match="must be one of stock, vllm, sglang"):
        export_adapter(peft_model, tmp_path / "out", "tgi")
    peft_model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not load onto"):
        import_adapter(tmp_path / "adapter", make("mixtral"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_from_the_shell(make, tmp_path):
    inputs, wanted = both_ways(partial(make, "mixtral"), "mixtral", tmp_path)
    make("mixtral").save_pretrained(tmp_path / "base")
    finished = run_cli("export", tmp_path / "ours", tmp_path / "out", "--base", tmp_path / "base")
    assert "mixtral" in finished.out
    model = PeftModel.from_pretrained(stock_model(tmp_path / "stock"), tmp_path / "out")
    torch.testing.assert_close(logits_of(model, inputs), wanted, rtol=1e-4, atol=1e-4)
    assert "Give it: `--base`" in run_cli("import-stock", tmp_path / "out", tmp_path / "back").err
    run_cli("import-stock", tmp_path / "out", tmp_path / "back", "--base", tmp_path / "base")
    found = logits_of(load_adapter(make("mixtral"), tmp_path / "back"), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


HOW = {
    "ours": load_adapter,
    "peft": PeftModel.from_pretrained,
    "transformers": lambda model, folder: model.load_adapter(str(folder)),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("choice", [{}, {"attention": True}], ids=str)
def test_an_adapter_of_the_mixture_is_not_laid_onto_its_export_in_silence(how, choice, make, tmp_path):
    """It found no tensor there, and did nothing: off by as much as it should have changed."""
    export(make("mixtral"), tmp_path / "stock")
    ours = adapted(make("mixtral"), **choice)
    ours.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"0 of (16|48) adapted tensors found.*`export_adapter`"):
        HOW[how](stock_model(tmp_path / "stock"), tmp_path / "adapter")
    own = make("mixtral")
    inputs = tiny_inputs(own, labels=False)
    HOW[how](own, tmp_path / "adapter")  # which changes it in place
    torch.testing.assert_close(logits_of(own, inputs), logits_of(ours, inputs), rtol=1e-4, atol=1e-4)


def test_doctor_counts_the_tensors_that_it_finds_and_that_moved(make, tmp_path):
    make("mixtral").save_pretrained(tmp_path / "base")
    export(make("mixtral"), tmp_path / "stock")
    peft_model = trained(make("mixtral"))
    for name, parameter in peft_model.named_parameters():
        if "q_proj.lora_B" in name:
            parameter.data.zero_()
    peft_model.save_pretrained(tmp_path / "adapter")
    finding = doctor(tmp_path / "adapter", base=tmp_path / "base").findings[0]
    # 4 layers of 4 attention projections, 2 tensors of experts and a router; those of q_proj change nothing
    assert finding.detail == "On SparseMoeDecoderForCausalLM, 28 of 28 adapted tensors found, 24 moved."
    wrong = doctor(tmp_path / "adapter", base=tmp_path / "stock")
    assert not wrong.healthy
