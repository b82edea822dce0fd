"""Several adapters, mixed batches, chosen experts and projections, a rank of its own for a layer."""

import copy

import pytest
import torch
from peft import get_peft_model

from adapted_models import adapted, logits_of, shake, stock_mixture
from hf_sparse_moe import expert_lora_config
from hf_sparse_moe.adapters.expert_layer import ExpertLora
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse


def two_adapters(model):
    peft_model = adapted(model)
    config = copy.deepcopy(peft_model.peft_config["default"])
    config.r = 3
    peft_model.add_adapter("other", config)
    return shake(peft_model, "other", seed=1).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_switching_and_adding_up(family):
    model = tiny_sparse(family)
    inputs = tiny_inputs(model, labels=False)
    base = logits_of(model, inputs)
    peft_model = two_adapters(model)
    first = logits_of(peft_model, inputs)
    peft_model.set_adapter("other")
    second = logits_of(peft_model, inputs)
    assert min((first - base).abs().max(), (second - base).abs().max(), (first - second).abs().max()) > 1e-2
    peft_model.base_model.set_adapter(["default", "other"])
    both = logits_of(peft_model, inputs)
    merged = peft_model.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits_of(merged, inputs), both, rtol=1e-4, atol=1e-4)


def test_deleting_one_leaves_the_other():
    model = tiny_sparse("decoder")
    inputs = tiny_inputs(model, labels=False)
    peft_model = two_adapters(model)
    first = logits_of(peft_model, inputs)
    peft_model.delete_adapter("other")
    assert torch.equal(logits_of(peft_model, inputs), first)
    assert not any("other" in name for name, _ in peft_model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_sequence_of_a_mixed_batch_gets_its_own_adapter(family):
    model = tiny_sparse(family)
    inputs = tiny_inputs(model, labels=False, batch=3)
    base = logits_of(model, inputs)
    peft_model = two_adapters(model)
    first = logits_of(peft_model, inputs)
    peft_model.set_adapter("other")
    second = logits_of(peft_model, inputs)
    mixed = logits_of(peft_model, inputs, adapter_names=["other", "__base__", "default"])
    expected = torch.stack([second[0], base[1], first[2]])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)


def test_generation_with_a_mixed_batch():
    model = stock_mixture("mixtral")
    inputs = {key: value[:2] for key, value in tiny_inputs(model, labels=False).items()}
    peft_model = two_adapters(model)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    mixed = peft_model.generate(**inputs, **options, adapter_names=["default", "other"])
    for row, name in enumerate(("default", "other")):
        peft_model.set_adapter(name)
        assert torch.equal(peft_model.generate(**inputs, **options)[row], mixed[row])


def test_mixed_batches_that_cannot_work_are_refused():
    model = tiny_sparse("decoder")
    inputs = tiny_inputs(model, labels=False)
    peft_model = two_adapters(model)
    with pytest.raises(ValueError, match="`adapter_names` has 3 entries"):
        peft_model(**inputs, adapter_names=["default"] * 3)
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="not merged"):
        peft_model(**inputs, adapter_names=["default", "other"])


def factors(peft_model):
    return {name: p for name, p in peft_model.named_parameters() if "lora_" in name}


def layer_names(model):
    return [name for name, _ in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_chosen_experts_alone_change(name):
    model = stock_mixture(name)
    layer = layer_names(model)[1]
    peft_model = adapted(model, experts={1: [0, 2]})
    assert {name.split(".lora_")[0] for name in factors(peft_model)} == {
        f"base_model.model.{layer}", f"base_model.model.{layer}.base_layer"
    }  # fmt: skip
    assert all(parameter.shape[0] == 2 for parameter in factors(peft_model).values())
    inputs = tiny_inputs(model, labels=False)
    after, untouched = logits_of(peft_model, inputs), stock_mixture(name)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), after, rtol=1e-4, atol=1e-4)
    before = dict(untouched.named_parameters())
    for name, parameter in merged.named_parameters():
        changed = (
            {n for n in range(4) if not torch.equal(parameter[n], before[name][n])} if parameter.dim() == 3 else {}
        )
        expected = {0, 2} if name.startswith(layer) and parameter.dim() == 3 else set()
        assert set(changed) == expected, name


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("projections", [("gate",), ("up",), ("down",), ("gate", "down"), ("gate", "up")])
def test_chosen_projections_alone_change(name, projections):
    peft_model = adapted(stock_mixture(name), projections=projections)
    inputs = tiny_inputs(stock_mixture(name), labels=False)
    after = logits_of(peft_model, inputs)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), after, rtol=1e-4, atol=1e-4)
    before = dict(stock_mixture(name).named_parameters())
    changed = set()
    for key, parameter in merged.named_parameters():
        if key.endswith("down_proj") and not torch.equal(parameter, before[key]):
            changed.add("down")
        if key.endswith("gate_up_proj"):
            moved = (parameter - before[key]).abs().amax(dim=(0, 1) if name == "gpt_oss" else (0, 2)) > 0
            halves = (moved[::2], moved[1::2]) if name == "gpt_oss" else moved.chunk(2)
            changed |= {part for part, half in zip(("gate", "up"), halves, strict=True) if half.any()}
    assert changed == set(projections)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT looks at target modules only
def test_a_rank_of_its_own_for_a_layer():
    peft_model = adapted(stock_mixture("mixtral"), r=2, rank_pattern={r"layers\.1\..*": 5})
    ranks = {name: p.shape[1] for name, p in factors(peft_model).items()}
    assert {rank for name, rank in ranks.items() if ".layers.0." in name} == {2}
    assert {rank for name, rank in ranks.items() if ".layers.1." in name} == {5}


def test_rank_stabilised_scale():
    for use_rslora, scale in ((False, 16 / 4), (True, 16 / 4**0.5)):
        peft_model = adapted(stock_mixture("mixtral"), r=4, lora_alpha=16, use_rslora=use_rslora)
        assert {m.scaling["default"] for m in peft_model.modules() if isinstance(m, ExpertLora)} == {scale}


def test_a_is_drawn_as_a_linear_layer_of_its_own_for_each_expert():
    model = stock_mixture("mixtral")
    peft_model = get_peft_model(model, expert_lora_config(model, r=64))
    layer = next(module for module in peft_model.modules() if isinstance(module, ExpertLora))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    linear = torch.nn.Linear(layer.in_features, 4 * 64, bias=False).weight
    assert abs(a.std() / linear.std() - 1) < 0.05
    assert a.abs().max() <= layer.in_features**-0.5
    assert b.count_nonzero() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": {7: [0]}}, "names layer 7, which 0 experts modules match"),
        ({"experts": {0: [4]}}, r"gives \[4\] for layer 0, which has experts 0 to 3"),
        ({"experts": {0: []}}, r"gives \[\] for layer 0"),
        ({"experts": {}}, "`experts` is empty"),
        ({"projections": ("side",)}, "must be some of gate, up, down"),
        ({"projections": ()}, "must be some of gate, up, down"),
    ],
)
def test_what_the_model_does_not_have_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        expert_lora_config(stock_mixture("mixtral"), **arguments)


def test_experts_without_gate_have_two_projections():
    model = tiny_sparse("gpt2")
    with pytest.raises(ValueError, match="must be some of up, down"):
        expert_lora_config(model, projections=("gate",))
    assert factors(adapted(model, projections=("up",)))
