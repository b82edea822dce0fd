"""DoRA on experts computes and trains what PEFT's DoRA on a linear layer an expert does."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from adapted_models import adapted, logits_of, stock_mixture
from hf_sparse_moe import expert_lora_config, export_adapter, load_adapter
from hf_sparse_moe.adapters.expert_dora import row_norms
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from tiny_models import tiny_inputs, tiny_sparse, without_dropout


def mixture(name):
    model = stock_mixture(name) if name == "gpt_oss" else without_dropout(tiny_sparse(name))
    model.set_experts_implementation("eager")  # `grouped_mm` knows no float64
    return model.double()


def with_dora(model, **choice):
    peft_model = adapted(model, use_dora=True, **choice)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
    return peft_model


def linear_twin(layer, expert):
    """PEFT's own DoRA on one expert's matrix."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    weight = layer.get_param()[expert].detach()
    weight = weight.mT if layer.experts.is_transposed else weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    config = LoraConfig(r=a.rank, lora_alpha=4, target_modules=["0"], use_dora=True)
    twin = get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    inner = twin.base_model.model[0]
    inner.lora_A["default"].weight.data = a.weight[expert].detach().clone()
    inner.lora_B["default"].weight.data = b.weight[expert].detach().mT.clone()
    inner.lora_magnitude_vector["default"].weight.data = (
        layer.lora_magnitude_vector["default"].weight[expert].detach().clone()
    )
    return twin, inner


@pytest.mark.parametrize("name", ["decoder", "gpt2", "gpt_oss"])
def test_outputs_and_gradients_are_those_of_a_linear_layer_an_expert(name):
    peft_model = with_dora(mixture(name))
    outer = next(module for module in peft_model.modules() if isinstance(module, ExpertLora))
    inner, experts = outer.base_layer, outer.experts
    hidden = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    index = torch.stack([torch.arange(9) % 4, (torch.arange(9) + 1) % 4], 1)
    weights = torch.rand(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = outer(hidden, index, weights)
    layers = {layer.parameter_name: layer for layer in (outer, inner)}
    first = next(name for name in layers if name != "down_proj")
    twins = {(key, expert): linear_twin(layer, expert) for key, layer in layers.items() for expert in range(4)}

    def through(key, expert, x):
        y = twins[key, expert][0](x)
        return y + getattr(experts, f"{key}_bias")[expert] if experts.has_bias else y

    same = hidden.detach().clone().requires_grad_()
    expected = torch.zeros_like(same)
    for token in range(9):
        for place, expert in enumerate(index[token].tolist()):
            up = through(first, expert, same[token : token + 1])
            up = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
            update = weights[token, place] * through("down_proj", expert, up)
            expected = expected + torch.zeros_like(expected).index_add(0, torch.tensor([token]), update)
    torch.testing.assert_close(output, expected, rtol=1e-8, atol=1e-8)
    for one in (output, expected):
        one.square().sum().backward()
    torch.testing.assert_close(hidden.grad, same.grad, rtol=1e-6, atol=1e-6)
    for (key, expert), (_, twin) in twins.items():
        layer = layers[key]
        for ours, theirs in (
            (layer.lora_A["default"].weight.grad[expert], twin.lora_A["default"].weight.grad),
            (layer.lora_B["default"].weight.grad[expert].mT, twin.lora_B["default"].weight.grad),
            (
                layer.lora_magnitude_vector["default"].weight.grad[expert],
                twin.lora_magnitude_vector["default"].weight.grad,
            ),
        ):
            assert theirs.any()
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_norms_of_rows_without_the_update():
    w, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 7), (2, 7), (2, 5)))
    torch.testing.assert_close(row_norms(w, a, b, 0.5), (w + 0.5 * b.mT @ a).norm(dim=1))


CHOICES = [{}, {"experts": {1: [0, 2]}, "projections": ("gate", "down")}, {"shared": True, "attention": True}]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("name", ["decoder", "gpt_oss"])
def test_a_fresh_one_changes_nothing_and_a_trained_one_merges_and_travels(name, choice, tmp_path):
    inputs = tiny_inputs(mixture(name), labels=False)
    before = logits_of(mixture(name), inputs)
    fresh = get_peft_model(
        (model := mixture(name)), expert_lora_config(model, r=2, use_dora=True, **choice), autocast_adapter_dtype=False
    )
    torch.testing.assert_close(logits_of(fresh, inputs), before, rtol=1e-8, atol=1e-8)
    peft_model = with_dora(mixture(name), **choice)
    after = logits_of(peft_model, inputs)
    assert (after - before).abs().max() > 1e-2
    peft_model.save_pretrained(tmp_path)
    assert any(
        key.endswith("experts.lora_magnitude_vector") for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    for load in (load_adapter, PeftModel.from_pretrained):  # which has no DoRA on experts of its own
        if load is load_adapter or not choice:
            torch.testing.assert_close(logits_of(load(mixture(name), tmp_path), inputs), after, rtol=1e-8, atol=1e-8)
    peft_model.merge_adapter()
    torch.testing.assert_close(logits_of(peft_model, inputs), after, rtol=1e-8, atol=1e-8)
    peft_model.unmerge_adapter()
    torch.testing.assert_close(logits_of(peft_model, inputs), after, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logits_of(peft_model.merge_and_unload(), inputs), after, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_with_dropout_and_is_not_exported(dtype, tmp_path):
    model = tiny_sparse("decoder").to(dtype)
    inputs = tiny_inputs(model)
    peft_model = get_peft_model(model, expert_lora_config(model, r=2, use_dora=True, lora_dropout=0.1))
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = peft_model.train()(**inputs).loss
        loss.backward()
        assert all(p.grad is not None for p in peft_model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="only LoRA without them is converted"):
        export_adapter(peft_model, tmp_path / "out")
