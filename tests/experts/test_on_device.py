"""Backends, LoRA and packed experts on one device equal the oracle: the CPU, or what SPARSE_MOE_TEST_DEVICE names."""

import copy
import os

import pytest
import torch
from peft import PeftModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_sparse_moe.experts  # noqa: F401  registers ours
from adapted_models import STOCK, adapted, logits_of, stock_mixture
from experts.experts_modules import inputs, make
from experts.experts_oracle import experts_oracle
from hf_sparse_moe.adapters import dequantize_experts, quantize_experts
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse, without_dropout


DEVICE = os.environ.get("SPARSE_MOE_TEST_DEVICE", "cpu")
# Two are downloads, one the door of LoRA, which has tests of its own below, and the last the names of version 0.1.
OTHERS = {"deepgemm", "sonicmoe", "adapted_experts", "auto", "segment_mm", "segment_mm_recompute"}
OURS = {"sparse_moe": "ours, gated, biased", "sparse_moe_recompute": "ours, plain, biased"}
BACKENDS = sorted({"eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()} - OTHERS)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest
SIZES = {"H": 64, "I": 96, "E": 8}  # multiples of 16 bytes, which `grouped_mm` asks for


def on_device(kind: str, backend: str, dtype: torch.dtype):
    experts = make(kind, backend, dtype, **SIZES).to(DEVICE)
    hidden, index, weights = inputs(300, 2, SIZES["E"], SIZES["H"], dtype)
    tensors = [tensor.detach().to(DEVICE) for tensor in (hidden, index, weights)]
    return experts, [tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors]


def output_and_gradients(call, experts, tensors) -> list[torch.Tensor]:
    output = call(*tensors)
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(output.shape, generator=generator).to(output)
    wanted = [tensors[0], tensors[2], *experts.parameters()]
    return [output, *torch.autograd.grad(output, wanted, direction, allow_unused=True)]


def assert_close(found: list, expected: list, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * max(scale, 1e-3))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend, dtype, autocast):
    if autocast and dtype is torch.bfloat16:
        pytest.skip("autocast is for float32 weights")
    kind = OURS.get(backend, "mixtral")
    experts, tensors = on_device(kind, backend, dtype)

    def call(*arguments):
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16, enabled=autocast):
            return experts(*arguments)

    expected = output_and_gradients(lambda *arguments: experts_oracle(experts, *arguments), experts, tensors)
    tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
    assert_close(output_and_gradients(call, experts, tensors), expected, tolerance)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", *FAMILIES])
def test_lora_equals_pefts(name, tmp_path):
    def mixture():
        return (stock_mixture(name) if name in STOCK else without_dropout(tiny_sparse(name))).to(DEVICE)

    def logits_and_gradients(model):
        """The gradients' norms alone, for the two keep their factors in other shapes."""
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
        logits = model(**batch).logits
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), trained)
        return [logits, torch.stack([gradient.norm() for gradient in gradients]).sort().values]

    ours = adapted(mixture())
    ours.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(mixture(), tmp_path).eval()
    assert any(isinstance(module, ExpertLora) for module in ours.modules())
    assert not any(isinstance(module, ExpertLora) for module in plain.modules())
    batch = {key: value.to(DEVICE) for key, value in tiny_inputs(ours.get_base_model(), labels=False).items()}
    assert_close(logits_and_gradients(ours), logits_and_gradients(plain), TOLERANCE[torch.float32])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["mixtral", *FAMILIES])
def test_packed_experts_equal_their_floats(name, bits):
    pytest.importorskip("bitsandbytes")
    model = (stock_mixture(name) if name in STOCK else without_dropout(tiny_sparse(name))).to(DEVICE)
    quantize_experts(model, bits)
    floats = dequantize_experts(copy.deepcopy(model))
    batch = {key: value.to(DEVICE) for key, value in tiny_inputs(model, labels=False).items()}
    assert_close([logits_of(model, batch)], [logits_of(floats, batch)], TOLERANCE[torch.float32])
