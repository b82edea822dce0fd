"""LoRA on experts through `get_peft_model`: it reaches what was asked, trains, merges, and refuses what it cannot."""

import copy
import pickle

import pytest
import torch
from peft import ArrowConfig, get_peft_model
from peft.tuners.lora import BdLoraConfig, MontecloraConfig

from adapted_models import STOCK, adapted, logits_of, stock_mixture
from hf_sparse_moe import expert_lora_config
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse, without_dropout


def train(peft_model, inputs, steps=3):
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = peft_model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mixtures():
    return [*FAMILIES, *STOCK]


def mixture(name):
    return stock_mixture(name) if name in STOCK else tiny_sparse(name)


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", mixtures())
def test_every_expert_is_adapted_and_nothing_else_trains(name):
    model = mixture(name)
    peft_model = get_peft_model(model, expert_lora_config(model, r=2))
    layers = [module for module in peft_model.modules() if isinstance(module, ExpertLora)]
    # two projections in every sparse layer, A and B of each
    assert len(trainable(peft_model)) == 2 * len(layers)
    for parameter_name, parameter in trainable(peft_model).items():
        assert ".experts." in parameter_name
        assert ".lora_" in parameter_name
        assert parameter.shape[:2] == (4, 2)


@pytest.mark.parametrize("name", mixtures())
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_merges(name):
    model = without_dropout(mixture(name))
    inputs = tiny_inputs(model)
    before = logits_of(model, inputs)
    peft_model = get_peft_model(model, expert_lora_config(model, r=2))
    torch.testing.assert_close(logits_of(peft_model, inputs), before, rtol=1e-4, atol=1e-4)

    frozen = {key: value.clone() for key, value in peft_model.named_parameters() if not value.requires_grad}
    losses = train(peft_model, inputs)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, frozen[key]) for key, value in peft_model.named_parameters() if key in frozen)
    after = logits_of(peft_model, inputs)
    assert (after - before).abs().max() > 1e-3

    peft_model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits_of(peft_model, inputs), after, rtol=1e-4, atol=1e-4)
    peft_model.unmerge_adapter()
    torch.testing.assert_close(logits_of(peft_model, inputs), after, rtol=1e-4, atol=1e-4)
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits_of(peft_model, inputs), before, rtol=1e-4, atol=1e-4)
    merged = peft_model.merge_and_unload()
    assert not any(isinstance(module, ExpertLora) for module in merged.modules())
    torch.testing.assert_close(logits_of(merged, inputs), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["decoder", "encoder", "gpt_oss"])
def test_experts_that_share_an_adapter_train_as_ones_that_are_kept_equal(name):
    """One A and B instead of four; the gradient is the sum over the experts of those of equal ones."""
    model, each_model = (without_dropout(mixture(name)) for _ in range(2))
    inputs = tiny_inputs(model)
    peft_model = adapted(model, shared=True)
    each = adapted(each_model)
    count = sum(parameter.numel() for parameter in trainable(each).values())
    assert 4 * sum(parameter.numel() for parameter in trainable(peft_model).values()) == count
    with torch.no_grad():
        for key, parameter in trainable(each).items():
            parameter.copy_(trainable(peft_model)[key].expand_as(parameter))
    for one in (peft_model, each):
        one(**inputs).loss.backward()
    for key, parameter in trainable(each).items():
        summed = parameter.grad.sum(0, keepdim=True)
        torch.testing.assert_close(trainable(peft_model)[key].grad, summed, rtol=1e-3, atol=1e-5)
        assert summed.any()
    losses = train(peft_model, inputs)
    assert losses[-1] < losses[0]
    after = logits_of(peft_model, inputs)
    peft_model.merge_adapter()
    torch.testing.assert_close(logits_of(peft_model, inputs), after, rtol=1e-4, atol=1e-4)
    peft_model.unmerge_adapter()
    torch.testing.assert_close(logits_of(peft_model, inputs), after, rtol=1e-4, atol=1e-4)


def test_a_broken_adapter_does_not_merge():
    peft_model = adapted(tiny_sparse("decoder"))
    next(iter(trainable(peft_model).values())).data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="seems to be broken"):
        peft_model.merge_adapter(safe_merge=True)


def test_a_router_without_weights_cannot_be_trained():
    with pytest.raises(ValueError, match="`router=True` is not allowed: these routers have no weights"):
        expert_lora_config(tiny_sparse("llama", router_type="hash"), r=2, router=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_router_only_when_asked(family):
    model = tiny_sparse(family)
    config = expert_lora_config(model, r=2, attention=True, router=True)
    peft_model = get_peft_model(model, config)
    names = set(trainable(peft_model))
    routers = {name for name in names if ".gate." in name}
    assert len(routers) == len(model.sparse_blocks)
    attention = {name for name in names if ".experts." not in name and ".gate." not in name}
    assert attention
    assert all("lora_" in name for name in attention)
    peft_model.train()(**tiny_inputs(model)).loss.backward()
    for name, parameter in peft_model.named_parameters():
        if name in routers:
            assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients():
    inputs, gradients = tiny_inputs(tiny_sparse("decoder")), []
    for checkpointing in (False, True):
        model = without_dropout(tiny_sparse("decoder"))
        peft_model = adapted(model, lora_dropout=0.3)
        if checkpointing:
            peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        peft_model.train()(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in trainable(peft_model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["decoder", "mixtral"])
def test_autocast_reaches_experts_and_adapters(name):
    peft_model = adapted(mixture(name))
    seen = set()
    layer = next(module for module in peft_model.modules() if isinstance(module, ExpertLora))
    layer.experts.act_fn.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        peft_model.train()(**tiny_inputs(peft_model.get_base_model())).loss.backward()
    assert seen == {torch.bfloat16}
    assert {parameter.grad.dtype for parameter in trainable(peft_model).values()} == {torch.float32}


def test_compiled_as_one_graph():
    peft_model = adapted(tiny_sparse("decoder"))
    layer = next(module for module in peft_model.modules() if isinstance(module, ExpertLora))
    hidden = torch.randn(6, 32)
    weights, index = torch.rand(6, 4).topk(2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, index, weights), layer(hidden, index, weights), rtol=1e-4, atol=1e-4)


def test_a_model_with_adapters_copies_and_pickles():
    peft_model = adapted(tiny_sparse("decoder"))
    inputs = tiny_inputs(peft_model.get_base_model(), labels=False)
    expected = logits_of(peft_model, inputs)
    for again in (copy.deepcopy(peft_model), pickle.loads(pickle.dumps(peft_model))):
        assert torch.equal(logits_of(again, inputs), expected)


@pytest.mark.parametrize("choice", [{}, {"experts": {1: [0, 2]}}, {"attention": True, "router": True}], ids=str)
def test_a_model_that_has_an_adapter_gets_another(choice):
    model = tiny_sparse("decoder")
    expected = expert_lora_config(model, r=3, **choice)
    peft_model = get_peft_model(model, expert_lora_config(model, r=2, **choice))
    for wrapped in (model, peft_model):
        assert expert_lora_config(wrapped, r=3, **choice) == expected
    peft_model.add_adapter("other", expected)
    assert {p.shape[1] for name, p in peft_model.named_parameters() if ".experts." in name and ".other." in name} == {
        3
    }


def test_a_dense_model_raises():
    model = tiny_sparse("decoder")
    with pytest.raises(ValueError, match="has no experts"):
        expert_lora_config(model.dense.get_input_embeddings())


@pytest.mark.parametrize(("name", "value"), [("layers_to_transform", [0]), ("exclude_modules", ["experts"])])
def test_what_peft_ignores_is_refused_with_a_sentence(name, value):
    with pytest.raises(ValueError, match=f"`{name}=.*Leave it out"):
        expert_lora_config(tiny_sparse("decoder"), **{name: value})


UNSUPPORTED = {
    "lora_bias": True,
    "init_lora_weights": "pissa",
    "r": 0,
    "use_qalora": True,
    "use_bdlora": BdLoraConfig(),
    "arrow_config": ArrowConfig(),
    "monteclora_config": MontecloraConfig(),
}


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED.items(), ids=list(UNSUPPORTED))
def test_what_is_not_built_is_refused_with_a_sentence(name, value):
    model = stock_mixture("mixtral")
    with pytest.raises(ValueError, match=f"`{name}="):
        get_peft_model(model, expert_lora_config(model, **{name: value}))


def test_quantised_experts_are_refused_with_a_sentence():
    model = stock_mixture("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj` is quantised \(torch.int8\)"):
        get_peft_model(model, expert_lora_config(model))


def test_packed_experts_are_refused_with_a_sentence():
    """As bitsandbytes leaves them: behind a parametrisation."""
    model = stock_mixture("mixtral")
    experts = model.model.layers[1].mlp.experts
    torch.nn.utils.parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    with pytest.raises(ValueError, match="not quantised by other means"):
        expert_lora_config(model)
