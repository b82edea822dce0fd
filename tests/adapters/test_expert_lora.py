"""LoRA on experts reaches every expert, trains, and round-trips through PEFT's own files."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

from hf_sparse_moe import expert_lora_config
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse, without_dropout


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def trained(model, config, inputs):
    """Three steps that move the adapter away from its zero start."""
    peft_model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = peft_model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return peft_model, losses


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_adapted_and_nothing_else_trains(family):
    model = tiny_sparse(family)
    peft_model = get_peft_model(model, expert_lora_config(model, r=2))
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert all(".experts." in name and ".lora_" in name for name in trainable)
    # A and B, of two projections, in every sparse layer
    assert len(trainable) == 4 * len(model.sparse_blocks)
    for name, parameter in peft_model.named_parameters():
        if name in trainable and "lora_A" in name:
            assert parameter.shape[0] == 2 * model.config.num_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_load_merge(family, tmp_path):
    inputs = tiny_inputs(tiny_sparse(family))
    model = without_dropout(tiny_sparse(family))
    before = logits_of(model, inputs)
    peft_model, losses = trained(model, expert_lora_config(model, r=2), inputs)
    assert losses[-1] < losses[0]
    adapted = logits_of(peft_model, inputs)
    assert (adapted - before).abs().max() > 1e-3

    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_sparse(family), tmp_path)
    torch.testing.assert_close(logits_of(loaded, inputs), adapted, rtol=0, atol=1e-6)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), adapted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again, inputs), logits_of(merged, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_router_only_when_asked(family):
    model = tiny_sparse(family)
    config = expert_lora_config(model, r=2, attention=True, router=True)
    peft_model = get_peft_model(model, config)
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    routers = {name for name in trainable if ".gate." in name}
    assert len(routers) == len(model.sparse_blocks)
    attention = {name for name in trainable if ".experts." not in name and ".gate." not in name}
    assert attention
    assert all("lora_" in name for name in attention)
    loss = peft_model.train()(**tiny_inputs(model)).loss
    loss.backward()
    for name, parameter in peft_model.named_parameters():
        if name in routers:
            assert parameter.grad.abs().max() > 0, name


def test_router_is_frozen_by_default():
    model = tiny_sparse("decoder")
    peft_model = get_peft_model(model, expert_lora_config(model, r=2))
    assert not any(p.requires_grad for name, p in peft_model.named_parameters() if name.endswith("gate.weight"))


def test_stock_mixture():
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    peft_model = get_peft_model(model, expert_lora_config(model, r=2, router=True))
    trainable = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert sum("lora_" in name for name in trainable) == 8
    assert sum("gate" in name and "lora_" not in name for name in trainable) == 2


def test_a_partial_match_raises():
    model = tiny_sparse("decoder")
    get_peft_model(model, expert_lora_config(model, r=2))  # wraps the experts, so that they cannot be reached again
    with pytest.raises(ValueError, match=r"experts modules of .* do not hold two fused"):
        expert_lora_config(model)


def test_a_dense_model_raises():
    model = tiny_sparse("decoder")
    with pytest.raises(ValueError, match="has no experts"):
        expert_lora_config(model.dense.get_input_embeddings())


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_dropout", 0.1), ("use_dora", True), ("layers_to_transform", [0]), ("exclude_modules", ["experts"])],
)
def test_what_peft_refuses_or_ignores_is_refused_with_a_sentence(name, value):
    with pytest.raises(ValueError, match=f"`{name}=.*Leave it out"):
        expert_lora_config(tiny_sparse("decoder"), **{name: value})
