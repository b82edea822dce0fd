"""Whole models, ours and stock, with the CPU backend chosen as any other: by `experts_implementation`."""

import logging

import pytest
import torch
import transformers as hf
from transformers import Trainer, TrainingArguments

from experts.experts_modules import inputs, make
from experts.test_function import Products
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_sparse, without_dropout


SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
}
STOCK = {
    "mixtral": hf.MixtralConfig,
    "qwen3_moe": hf.Qwen3MoeConfig,
    "olmoe": hf.OlmoeConfig,
    "gpt_oss": hf.GptOssConfig,
}


def logits_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": outputs.logits.detach(), **gradients}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 2e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["sparse_moe", "sparse_moe_recompute"])
@pytest.mark.parametrize("name", STOCK)
def test_stock_models_compute_the_same(name, backend):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(STOCK[name](**SIZES), experts_implementation="eager")
    ids = torch.randint(5, VOCAB_SIZE, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    expected = logits_and_gradients(model, batch)
    model.set_experts_implementation(backend)
    with Products() as products:
        found = logits_and_gradients(model, batch)
    assert products.dtypes
    assert_same(found, expected)
    prompt = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids[:, :4], **prompt)
    model.set_experts_implementation("eager")
    assert torch.equal(generated, model.generate(ids[:, :4], **prompt))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["encoder", "decoder", "encoder_decoder"])
def test_our_models_compute_the_same(name, checkpointing):
    model = without_dropout(tiny_sparse(name)).train()
    batch = tiny_inputs(model, pads=2)
    model.set_experts_implementation("eager")
    expected = logits_and_gradients(model, batch)
    model.set_experts_implementation("sparse_moe")
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert_same(logits_and_gradients(model, batch), expected)


def test_trainer_in_bf16_computes_the_experts_in_bf16(tmp_path):
    """With float32 weights; the stock backend computes them in float32."""
    model = tiny_sparse("decoder")
    rows = [{"input_ids": [7, 8, 9, 10, 11], "labels": [7, 8, 9, 10, 11]}] * 4
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=4, bf16=True, use_cpu=True, report_to=[], save_strategy="no"
    )
    dtypes = {}
    for backend in ("sparse_moe", "grouped_mm"):
        model.set_experts_implementation(backend)
        with ExpertsDtypes() as dtypes[backend]:
            Trainer(model, arguments, train_dataset=rows).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert dtypes["sparse_moe"].seen == {torch.bfloat16}
    assert dtypes["grouped_mm"].seen == {torch.float32}


class ExpertsDtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """The dtypes of the experts' products: no other module calls these two operators."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.out, torch.ops.aten._grouped_mm.default):
            self.seen.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def warnings_of_the_backend(caplog):
    library = logging.getLogger("hf_sparse_moe")
    library.propagate, before = True, library.propagate
    hf.utils.logging.get_logger("hf_sparse_moe").warning_once.cache_clear()
    yield caplog
    library.propagate = before


def test_a_norm_after_the_experts_is_left_to_grouped_mm_with_one_line(warnings_of_the_backend):
    experts, tensors = make("mixtral", "sparse_moe"), inputs(20, 2)
    experts.has_post_expert_norm, experts.post_expert_norm = True, torch.nn.RMSNorm(16)
    found = [experts(*tensors), experts(*tensors)]
    experts.config._experts_implementation = "grouped_mm"
    assert torch.equal(found[0], experts(*tensors))
    lines = [record.message for record in warnings_of_the_backend.records]
    assert lines == ["`sparse_moe` does not run with a norm after the experts: these experts run with `grouped_mm`."]
    assert torch.equal(*found)
