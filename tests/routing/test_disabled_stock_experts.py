"""A stock mixture without some experts computes what the checkpoint computes from which they were cut out."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_sparse_moe import disable_experts, find_mixture_layers, record_routing, use_top_k
from routing.test_mixture_layers import EXPERTS, FIELDS, MIXTURES, UNSUPPORTED, build, inputs_of


# One of each way to choose; the others run with `make conformance`.
KINDS = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "llama4",
    "phimoe", "gemma4", "dbrx", "jetmoe", "inkling", "longcat_flash", "zaya", "switch_transformers", "nllb_moe",
]  # fmt: skip
FOLDERS = [folder for folder in MIXTURES if folder not in UNSUPPORTED]
CASES = [pytest.param(folder, marks=() if folder in KINDS else pytest.mark.conformance) for folder in FOLDERS]


def mixture(folder):
    """A stock mixture whose scores and selection bias decide together."""
    model = build(folder).eval()
    with torch.no_grad():
        for layer in find_mixture_layers(model):
            for parameter in layer.router.parameters():
                parameter.mul_(10.0 if parameter.dim() == 2 else 1.0)
            if layer.selection_bias is not None:
                layer.selection_bias.normal_(std=0.2)
    return model


def without(model, experts):
    """A copy of the model with these experts cut out: rows of the routers, of the biases, and the experts' weights."""
    model = copy.deepcopy(model)
    for layer in find_mixture_layers(model):
        count = layer.num_experts
        keep = {count: [expert for expert in range(count) if expert not in experts]}  # which rows of how many
        if hasattr(layer.router, "num_router_classes"):  # the last class skips, and has no weights (Zaya)
            keep[count - 1] = [expert for expert in keep[count] if expert < count - 1]
        routers = set(layer.router.modules())
        for module in routers | set(layer.experts.modules()):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                rows = len(tensor) if tensor.dim() else 0
                if tensor.shape == (1, count):
                    tensor.data = tensor.data[:, keep[count]]
                elif rows in keep:
                    tensor.data = tensor.data[keep[rows]]
                elif module in routers and count < rows <= count + 2:  # shared experts are weighed too (Inkling)
                    tensor.data = torch.cat([tensor.data[keep[count]], tensor.data[count:]])
                elif type(module).__name__ == "DbrxExpertGLU":  # experts below each other
                    tensor.data = tensor.data.unflatten(0, (count, -1))[keep[count]].flatten(0, 1)
            if isinstance(module, nn.ModuleDict) and len(module) == count:  # named by their numbers
                kept = [expert for place, expert in enumerate(module.values()) if place in keep[count]]
                module.clear()
                module.update({f"expert_{place}": expert for place, expert in enumerate(kept)})
        if layer.selection_bias is not None and layer.selection_bias.shape[-1] == count:  # the block's
            layer.selection_bias.data = layer.selection_bias.data[keep[count]]
        for module in {*routers, *layer.experts.modules(), layer.block}:
            for name, value in vars(module).items():
                if type(value) is int and value in keep and ("expert" in name or "classes" in name):
                    setattr(module, name, len(keep[value]))
        if count - 1 in keep:
            layer.router.config = copy.deepcopy(layer.router.config)
            layer.router.config.num_experts = len(keep[count - 1])
    return model


def first_output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def routings(model, inputs):
    with record_routing(model) as recorded:
        first_output(model, inputs)
    return list(recorded[0].values())


def used_experts(model, inputs):
    choices = (routing.top_k_index if routing.kept is None else routing.top_k_index[routing.kept]
               for routing in routings(model, inputs))  # fmt: skip
    return torch.cat([choice.flatten() for choice in choices])


@pytest.mark.parametrize("folder", CASES)
def test_it_is_the_model_from_which_they_were_cut_out(folder):
    model = mixture(folder)
    inputs = inputs_of(model)
    before = copy.deepcopy(model.state_dict())
    whole = first_output(model, inputs)
    busiest = used_experts(model, inputs).bincount().argsort(descending=True)[:2].tolist()
    with disable_experts(model, busiest):
        found, used = first_output(model, inputs), used_experts(model, inputs)
    assert found.isfinite().all()
    assert not set(used.tolist()) & set(busiest)
    torch.testing.assert_close(found, first_output(without(model, busiest), inputs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(first_output(model, inputs), whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_whatever_the_selection_bias_says():
    """A bias of -10 on all others does not bring a disabled expert back, whose score of 0 would be higher."""
    model = mixture("deepseek_v3")
    with torch.no_grad():
        for layer in find_mixture_layers(model):
            layer.selection_bias[3:] = -10.0
    with disable_experts(model, [0, 1, 2]):
        assert used_experts(model, inputs_of(model)).min() == 3


def test_groups_must_keep_enough():
    model = mixture("deepseek_v3")
    for layer in find_mixture_layers(model):
        layer.router.num_group, layer.router.topk_group = 2, 1
    with disable_experts(model, [0, 1]):
        assert used_experts(model, inputs_of(model)).min() == 2
    with (
        pytest.raises(ValueError, match="of 1 enabled, whichever 1 of its 2 groups"),
        disable_experts(model, [0, 1, 2]),
    ):
        pass


@pytest.mark.parametrize("folder", ["mixtral", "deepseek_v3", "switch_transformers"])
def test_switches_nest_and_end_with_an_error_too(folder):
    model = mixture(folder)
    inputs, before = inputs_of(model), copy.deepcopy(model.state_dict())
    whole = first_output(model, inputs)
    names = [set(vars(module)) for module in model.modules()]

    def fail():
        with disable_experts(model, [0]):
            with disable_experts(model, {0: [1]}):
                first, *_ = routings(model, inputs)
                assert not {0, 1} & set(first.top_k_index.flatten().tolist())
                with pytest.raises(ValueError, match="of 0 enabled"), disable_experts(model, range(2, EXPERTS)):
                    pass
            first, *_ = routings(model, inputs)
            assert set(first.top_k_index.unique().tolist()) <= set(range(1, EXPERTS))
            if folder == "mixtral":
                with use_top_k(model, 1):
                    assert 0 not in used_experts(model, inputs)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    assert names == [set(vars(module)) for module in model.modules()]
    assert torch.equal(first_output(model, inputs), whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("folder", ["mixtral", "deepseek_v4", "phimoe"])
def test_the_loss_and_its_gradient_are_finite(folder):
    model = mixture(folder).train()
    inputs = inputs_of(model)
    with disable_experts(model, [0, 1]):
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    for layer in find_mixture_layers(model):
        for parameter in layer.router.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype):
    model = mixture("mixtral").to(dtype)
    with disable_experts(model, [0, 1]):
        assert used_experts(model, inputs_of(model)).min() == 2


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        ("mixtral", {"target_parameters": ["mlp.gate.weight"]}),
        ("dbrx", {"target_modules": ["router.layer"]}),
    ],
)
def test_inside_peft(folder, target):
    """An adapter of as many rows as there are experts is not the router's product."""
    bare = mixture(folder)
    config = LoraConfig(r=EXPERTS, init_lora_weights=False, **{"target_modules": ["q_proj"], **target})
    model = get_peft_model(bare, config).eval()
    inputs = inputs_of(bare)
    with disable_experts(model, [0, 1]):
        assert first_output(model, inputs).isfinite().all()
        assert used_experts(model, inputs).min() == 2


def test_what_cannot_is_refused(monkeypatch):
    monkeypatch.setitem(FIELDS, "deepseek_v4", {"num_hash_layers": 1})
    hashed = build("deepseek_v4")
    with pytest.raises(ValueError, match="the token's id decides"), disable_experts(hashed, [0]):
        pass
    model = mixture("mixtral")
    for layer in find_mixture_layers(model):
        gate = layer.router
        gate.forward = lambda x, gate=gate: ((logits := x @ gate.weight.T), *logits.topk(2))
    with disable_experts(model, [0]), pytest.raises(ValueError, match="does not compute its router logits by"):
        first_output(model, inputs_of(model))
