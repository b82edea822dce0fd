"""The experts chosen for a task are the fewest that carry the wanted share of its tokens' router weight."""

import pytest
import torch
from peft import get_peft_model

from adapted_models import stock_mixture
from hf_sparse_moe import expert_lora_config
from hf_sparse_moe.adapters import select_experts
from tiny_models import FAMILIES, tiny_inputs, tiny_sparse


def batches(model, pads=0):
    return [tiny_inputs(model, labels=False, seed=seed, pads=pads) for seed in range(2)]


def router_weights(model, data):
    """`(T, E)` a layer, seen by the router's own output."""
    seen = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def hook(module, inputs, name=name):
                _, index, weights = inputs
                full = torch.zeros(len(index), module.num_experts).scatter(1, index, weights.float())
                seen.setdefault(name, []).append(full)

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("by", ["weight", "count"])
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", [*FAMILIES, "mixtral"])
def test_the_fewest_that_reach_the_share(name, share, by):
    model = stock_mixture(name) if name == "mixtral" else tiny_sparse(name)
    data = batches(model)
    chosen = select_experts(model, data, share=share, by=by)
    for layer, weights in router_weights(model, data).items():
        scores = weights.sum(0) if by == "weight" else (weights > 0).float().sum(0)
        scores = scores / scores.sum()
        best = scores.sort(descending=True).values
        assert scores[chosen[layer]].sum() >= share - 1e-5
        torch.testing.assert_close(scores[chosen[layer]].sum(), best[: len(chosen[layer])].sum())
        assert best[: len(chosen[layer]) - 1].sum() < share


def test_pads_do_not_count():
    model = stock_mixture("mixtral")
    inputs = tiny_inputs(model, labels=False, batch=1)
    padded = {key: torch.cat([value, torch.zeros(1, 9, dtype=torch.long)], dim=1) for key, value in inputs.items()}
    assert select_experts(model, [padded], share=0.7) == select_experts(model, [inputs], share=0.7)


def test_the_choice_is_what_the_config_takes():
    model = stock_mixture("mixtral")
    chosen = select_experts(model, batches(model), share=0.5)
    peft_model = get_peft_model(model, expert_lora_config(model, experts=chosen))
    sizes = {name.split(".lora_")[0]: p.shape[0] for name, p in peft_model.named_parameters() if "lora_" in name}
    for layer, experts in chosen.items():
        assert sizes[f"base_model.model.{layer}"] == len(experts)


@pytest.mark.parametrize("name", ["decoder", "mixtral"])
def test_a_model_that_has_an_adapter_chooses_for_another(name):
    model = stock_mixture(name) if name == "mixtral" else tiny_sparse(name)
    data = batches(model)
    expected = select_experts(model, data, share=0.5)
    peft_model = get_peft_model(model, expert_lora_config(model, experts=expected, router=True))  # changes nothing yet
    for wrapped in (peft_model, model):
        assert select_experts(wrapped, data, share=0.5) == expected
    peft_model.add_adapter("other", expert_lora_config(peft_model, experts=expected))


def test_the_mode_of_the_model_stays():
    model = stock_mixture("mixtral").train()
    select_experts(model, batches(model))
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"share": 0}, "`share=0` must lie above 0"), ({"share": 1.5}, "`share=1.5`"), ({"by": "luck"}, "`by='luck'`")],
)
def test_bad_arguments(arguments, message):
    model = stock_mixture("mixtral")
    with pytest.raises(ValueError, match=message):
        select_experts(model, batches(model), **arguments)


def test_no_data_and_no_experts():
    with pytest.raises(ValueError, match="nothing to choose by"):
        select_experts(stock_mixture("mixtral"), [])
    with pytest.raises(ValueError, match="has no experts"):
        select_experts(stock_mixture("mixtral").get_input_embeddings(), [])
