"""Frozen experts in 8 or 4 bits: really packed, right in every backend, and adapters on them train."""

import copy
import logging
import sys

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_sparse_moe.experts.function as function_module
from adapted_models import STOCK, adapted, logits_of, stock_mixture
from hf_sparse_moe import expert_lora_config, prune_experts
from hf_sparse_moe.adapters import load_expert_lora
from hf_sparse_moe.adapters.low_rank_experts import LowRank, low_rank_experts
from hf_sparse_moe.models.quantized_weight import QuantizedWeight
from hf_sparse_moe.quantization import dequantize_experts, quantize_experts
from pairwise import pairwise
from tiny_models import FAMILIES, tiny_dense, tiny_inputs, tiny_sparse, without_dropout


bitsandbytes = pytest.importorskip("bitsandbytes")

BYTES = {8: 1 + 4 / 64, 4: 1 / 2 + 4 / 64}  # of a weight: its code, and its part of a float32 scale
HALF_STEP = {8: 1 / 254, 4: 0.152}
BACKENDS = ("eager", "grouped_mm", "batched_mm", "sparse_moe", "sparse_moe_recompute")


def mixture(name):
    return without_dropout(stock_mixture(name) if name in STOCK else tiny_sparse(name))


def packed(model):
    return {name: value for name, value in model.named_parameters() if isinstance(value, QuantizedWeight)}


def rounded(model):
    """A copy of a quantised model that holds the same values as floats."""
    return dequantize_experts(copy.deepcopy(model))


@pytest.mark.parametrize("bits", BYTES)
@pytest.mark.parametrize("name", [*FAMILIES, *STOCK])
def test_all_experts_are_packed_and_nothing_else_changes(name, bits):
    model = mixture(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    assert quantize_experts(model, bits) is model
    weights = packed(model)
    assert set(weights) == {key for key, value in before.items() if ".experts." in key and value.dim() == 3}
    assert list(before) == [key for key, _ in model.named_parameters()]
    for key, weight in weights.items():
        assert weight.codes.dtype == torch.uint8
        assert weight.codes.nbytes == weight.numel() * bits // 8
        assert weight.nbytes == BYTES[bits] * weight.numel()
        assert not weight.requires_grad
        assert (weight.shape, weight.dtype) == (before[key].shape, before[key].dtype)
    for key, value in model.named_parameters():
        if key not in weights:
            assert torch.equal(value, before[key])
            assert value.requires_grad


@pairwise("name,bits,backend", ["decoder", "encoder", "mixtral", "qwen3_moe", "olmoe", "gpt_oss"], BYTES, BACKENDS)
def test_every_backend_computes_with_the_rounded_weights(name, bits, backend):
    model = quantize_experts(mixture(name), bits)
    floats = rounded(model)
    inputs = tiny_inputs(model)
    results = []
    for one in (model, floats):
        one.set_experts_implementation(backend)
        one.get_input_embeddings().weight.grad = None
        output = one(**inputs)
        output.loss.backward()
        results.append((output.logits, one.get_input_embeddings().weight.grad))
    for quantised, expected in zip(*results, strict=True):
        torch.testing.assert_close(quantised, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", BYTES)
def test_the_output_is_off_by_no_more_than_the_steps_allow(bits):
    """Each weight is off by half a step at most; from there on, exact interval arithmetic through the gated expert."""
    experts = stock_mixture("mixtral").model.layers[0].mlp.experts
    tokens = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    expert, one = torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)

    def step(weight):
        blocks = weight.abs().reshape(-1, 64).amax(1, keepdim=True)
        return (HALF_STEP[bits] * 1.001 * blocks).expand(-1, 64).reshape(weight.shape)

    with torch.no_grad():
        first, down = experts.gate_up_proj[0], experts.down_proj[0]
        (gate, up), (gate_off, up_off) = (tokens @ first.t()).chunk(2, 1), (tokens.abs() @ step(first).t()).chunk(2, 1)
        hidden = F.silu(gate) * up
        # silu rises by less than 1.1 a unit
        hidden_off = 1.1 * gate_off * (up.abs() + up_off) + F.silu(gate).abs() * up_off
        allowed = hidden_off @ (down.abs() + step(down)).t() + hidden.abs() @ step(down).t()
        exact = experts(tokens, expert, one)
        quantised_weights = {
            name: QuantizedWeight.quantize(weight, bits) for name, weight in experts.named_parameters()
        }
        for name, weight in quantised_weights.items():
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        off = (experts(tokens, expert, one) - exact).abs()
    assert (off <= allowed + 1e-5).all()
    assert off.max() > 0


@pytest.mark.parametrize("name", ["decoder", "qwen3_moe"])
def test_eight_bits_come_nearer_than_four(name):
    model = mixture(name)
    inputs = tiny_inputs(model)
    exact = logits_of(model, inputs)
    off = {bits: logits_of(quantize_experts(copy.deepcopy(model), bits), inputs).sub(exact).norm() for bits in BYTES}
    assert 0 < off[8] < off[4] / 5
    assert off[4] < exact.norm()


@pytest.mark.parametrize("bits", BYTES)
@pytest.mark.parametrize("name", [*FAMILIES, *STOCK])
def test_only_adapters_train_on_it_and_the_loss_falls(name, bits):
    model = quantize_experts(mixture(name), bits)
    codes = {key: weight.codes.clone() for key, weight in packed(model).items()}
    inputs = tiny_inputs(model)
    peft_model = get_peft_model(model, expert_lora_config(model, r=4))
    trainable = [value for value in peft_model.parameters() if value.requires_grad]
    assert len(trainable) == 2 * len(codes)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = peft_model.train()(**inputs).loss
        loss.backward()
        assert all((value.grad is not None) == value.requires_grad for value in peft_model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        torch.equal(weight.codes, old) for weight, old in zip(packed(model).values(), codes.values(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("mixtral", False), ("gpt_oss", False), pytest.param("mixtral", True, marks=pytest.mark.slow)],
)
def test_adapters_get_the_gradients_that_they_get_on_the_rounded_weights(name, compiled):
    """Compiled, the experts run by grouped products, as they do on an accelerator."""
    inputs = tiny_inputs(model := quantize_experts(mixture(name), 4))
    gradients = []
    for one in (model, rounded(model)):
        one.set_experts_implementation("grouped_mm")
        peft_model = adapted(one)
        forward = torch.compile(peft_model, fullgraph=True, backend="aot_eager") if compiled else peft_model
        forward(**inputs).loss.backward()
        gradients.append([value.grad for value in peft_model.parameters() if value.requires_grad])
    for quantised, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(quantised, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["grouped_mm", "sparse_moe", "adapters on a CPU", "adapters on an accelerator"])
def test_no_floats_of_experts_wait_for_backward(monkeypatch, how):
    model = quantize_experts(mixture("mixtral"), 4)
    experts = model.model.layers[0].mlp.experts
    low_rank = [
        LowRank(torch.randn(4, 2, inputs), torch.randn(4, 2, outputs), 1.0, tuple(range(4)), slice(None))
        for _, outputs, inputs in (experts.gate_up_proj.shape, experts.down_proj.shape)
    ]
    forward = {
        "adapters on a CPU": lambda *call: low_rank_experts(experts, *call, *[[one] for one in low_rank]),
    }.get(how.replace("an accelerator", "a CPU"), experts)
    if how == "adapters on an accelerator":
        monkeypatch.setattr(function_module, "_is_accelerator", lambda tensor: True)
    if how in BACKENDS:
        model.set_experts_implementation(how)
    hidden = torch.randn(5, 32, requires_grad=True)
    routing = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3]]), torch.full((5, 2), 0.5)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward(hidden, *routing)
    output.sum().backward()
    assert hidden.grad.any()
    assert kept
    matrices = {shape for weight in packed(model).values() for shape in (weight.shape[1:], weight.mT.shape[1:])}
    assert not [tensor for tensor in kept if type(tensor) is torch.Tensor and tensor.shape[-2:] in matrices]


@pytest.mark.parametrize("bits", BYTES)
@pytest.mark.parametrize("name", ["decoder", "mixtral"])
def test_an_adapter_is_saved_and_loaded(name, bits, tmp_path):
    model = quantize_experts(mixture(name), bits)
    inputs = tiny_inputs(model)
    fresh = copy.deepcopy(model)
    peft_model = adapted(model)
    peft_model.save_pretrained(tmp_path)
    expected = logits_of(peft_model, inputs)
    assert (expected - logits_of(fresh, inputs)).abs().max() > 1e-3
    ours = load_expert_lora(copy.deepcopy(fresh), str(tmp_path))
    plain = PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(logits_of(ours, inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(plain, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BYTES)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "decoder"])
def test_adapters_merge_into_codes_and_the_lost_part_is_told(name, bits, tmp_path, caplog, monkeypatch):
    """The merged codes are those of the exact sum; what rounding took of the update is what the log says."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    model = quantize_experts(mixture(name), bits)
    inputs = tiny_inputs(model)
    peft_model = adapted(model)
    before, codes = logits_of(peft_model, inputs), {key: w.codes.clone() for key, w in packed(peft_model).items()}
    exact = dequantize_experts(adapted(quantize_experts(mixture(name), bits))).merge_and_unload()
    rounded_once = quantize_experts(copy.deepcopy(exact), bits)
    with caplog.at_level("WARNING"):
        peft_model.merge_adapter()
    lost = [int(record.getMessage().split("by ")[1].split("%")[0]) for record in caplog.records]
    assert len(lost) == len(codes)
    assert all({8: (0, 10), 4: (5, 150)}[bits][0] <= one <= {8: (0, 10), 4: (5, 150)}[bits][1] for one in lost)
    assert torch.equal(logits_of(peft_model, inputs), logits_of(rounded_once, inputs))
    peft_model.unmerge_adapter()
    assert all(torch.equal(weight.codes, codes[key]) for key, weight in packed(peft_model).items())
    torch.testing.assert_close(logits_of(peft_model, inputs), before)
    merged = peft_model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), logits_of(rounded_once, inputs)
    )


def test_floats_merge_without_loss(tmp_path):
    model = quantize_experts(mixture("mixtral"), 4)
    inputs = tiny_inputs(model)
    peft_model = adapted(model, attention=True)
    expected = logits_of(peft_model, inputs)
    merged = dequantize_experts(peft_model).merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), inputs), expected)


def test_adapters_of_peft_itself_do_not_merge_either():
    model = quantize_experts(mixture("mixtral"), 4)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    with pytest.raises(NotImplementedError, match="would change quantised experts"):
        get_peft_model(model, config).merge_adapter()


def test_an_adapter_that_matches_nothing_is_refused():
    model = quantize_experts(mixture("mixtral"), 4)
    with pytest.raises(ValueError, match="target_parameters"):
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["experts.no_such_proj"]))


@pytest.mark.parametrize("name", ["decoder", "mixtral"])
def test_what_is_unpacked_saves_as_floats(name, tmp_path):
    model = quantize_experts(mixture(name), 4)
    floats = rounded(model)
    assert not hasattr(floats.config, "quantization_config")
    floats.save_pretrained(tmp_path / "floats")
    inputs = tiny_inputs(model)
    expected = logits_of(model, inputs)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    torch.testing.assert_close(logits_of(loaded, inputs), expected)
    model.save_pretrained(tmp_path / "packed")
    model.dequantize().save_pretrained(tmp_path / "transformers")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")
    torch.testing.assert_close(logits_of(loaded, inputs), expected)


@pytest.mark.parametrize("name", ["decoder", "mixtral"])
def test_it_loads_a_state_dict_of_floats_or_codes(name):
    model = mixture(name)
    inputs = tiny_inputs(model)
    expected = quantize_experts(copy.deepcopy(model), 8)
    for source in (model, expected):
        target = mixture(name)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.mul_(0.5)
        quantize_experts(target, 8).load_state_dict(source.state_dict())
        torch.testing.assert_close(logits_of(target, inputs), logits_of(expected, inputs))


@pytest.mark.parametrize("backend", ["sparse_moe", "grouped_mm"])
def test_it_casts_and_computes_under_autocast(backend):
    model = quantize_experts(mixture("decoder"), 8)
    floats = rounded(model)
    inputs = tiny_inputs(model)
    for one in (model, floats):
        one.set_experts_implementation(backend)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits_of(model, inputs), logits_of(floats, inputs))
    weights = packed(model.to(torch.bfloat16))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert {weight.nbytes / weight.numel() for weight in weights.values()} == {BYTES[8]}
    torch.testing.assert_close(logits_of(model, inputs), logits_of(floats.to(torch.bfloat16), inputs))


def test_it_generates_as_its_rounded_twin():
    model = quantize_experts(mixture("decoder"), 4)
    ids = tiny_inputs(model)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), rounded(model).generate(ids, **options))


def test_trainer_saves_and_resumes_adapters_on_it(tmp_path):
    """Stopped after 2 of 4 steps and resumed, the adapter is what 4 steps make of it."""

    def trained(folder, stop=None):
        torch.manual_seed(0)
        model = quantize_experts(mixture("decoder"), 4)
        rows = tiny_inputs(model)
        data = [{key: value[i % len(value)] for key, value in rows.items()} for i in range(8)]
        arguments = TrainingArguments(
            output_dir=folder, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to="none", disable_tqdm=True, use_cpu=True, label_names=["labels"],
        )  # fmt: skip
        peft_model = get_peft_model(model, expert_lora_config(model, r=2))
        Trainer(peft_model, arguments, train_dataset=data).train(resume_from_checkpoint=stop)
        return [value.detach() for value in peft_model.parameters() if value.requires_grad]

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", stop=str(tmp_path / "whole" / "checkpoint-2"))
    for left, right in zip(whole, resumed, strict=True):
        torch.testing.assert_close(left, right)


def test_distributed_data_parallel_leaves_the_codes(tmp_path):
    model = quantize_experts(mixture("mixtral"), 4)
    inputs = tiny_inputs(model)
    codes = [weight.codes.clone() for weight in packed(model).values()]
    peft_model = adapted(model)
    expected = logits_of(peft_model, inputs)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(peft_model)
        wrapped(**inputs).loss.backward()
        torch.testing.assert_close(logits_of(wrapped, inputs), expected)
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(weight.codes, old) for weight, old in zip(packed(model).values(), codes, strict=True))


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="`bits=2` must be 8 or 4"):
        quantize_experts(mixture("mixtral"), 2)


def test_quantising_twice_is_refused():
    model = quantize_experts(mixture("mixtral"), 8)
    with pytest.raises(ValueError, match=r"MixtralExperts.gate_up_proj` is not a plain .*quantise it once"):
        quantize_experts(model, 4)
    assert {weight.nbytes / weight.numel() for weight in packed(model).values()} == {BYTES[8]}


def test_what_is_not_a_plain_mixture_is_refused():
    with pytest.raises(ValueError, match="has no experts"):
        quantize_experts(tiny_dense("llama"))
    with pytest.raises(ValueError, match="on meta"):
        quantize_experts(mixture("mixtral").to("meta"))
    model = mixture("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"not a plain float tensor in memory \(torch.int8"):
        quantize_experts(model)
    assert not packed(model)


def test_floats_are_not_dequantised():
    with pytest.raises(ValueError, match="has no experts that `quantize_experts` has quantised"):
        dequantize_experts(mixture("mixtral"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"hf-sparse-moe\[quantize\]"):
        quantize_experts(mixture("mixtral"))


def test_what_a_surgery_makes_of_packed_experts_is_saved_packed(tmp_path):
    model = quantize_experts(mixture("decoder"), 4)
    pruned = prune_experts(model, drop=[1])
    assert packed(pruned).keys() == packed(model).keys()
    pruned.save_pretrained(tmp_path)
    inputs = tiny_inputs(model, labels=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, inputs), logits_of(pruned, inputs))
