"""Every trained parameter is in one group, at the rate of its role, and decays where it is a matrix of no router."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from transformers import Trainer

from adapted_models import adapted, stock_mixture
from hf_sparse_moe import parameter_groups, upcycle
from monitored_training import make_model, make_rows, make_trainer
from tiny_models import tiny_dense, tiny_sparse


RATES = {"learning_rate": 1e-3, "router_learning_rate": 1e-4, "expert_learning_rate": 2e-3, "weight_decay": 0.1}


def by_name(model, groups):
    """(rate, decay) of each parameter, by its name; fails where one is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(each)], (group["lr"], group["weight_decay"])) for group in groups for each in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def expected(name, parameter):
    router = any(part in name.split(".") for part in ("gate", "router"))
    rate = 1e-4 if router else 2e-3 if ".experts." in name else 1e-3
    decays = not router and parameter.dim() > 1 and "bias" not in name
    return rate, 0.1 if decays else 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_sparse("decoder", scoring_func="cosine"),
        lambda: tiny_sparse("gpt2"),
        lambda: tiny_sparse("t5_gated", num_shared_experts=1),
        lambda: tiny_sparse("bert", mlp_layer_types=["dense", "sparse"]),
        lambda: stock_mixture("mixtral"),
        lambda: stock_mixture("gpt_oss"),
    ],
    ids=["cosine", "gpt2", "t5", "bert", "mixtral", "gpt_oss"],
)
def test_every_parameter_has_the_rate_and_the_decay_of_its_role(make):
    model = make()
    found = by_name(model, parameter_groups(model, **RATES))
    assert found == {name: expected(name, parameter) for name, parameter in model.named_parameters()}
    assert {rate for rate, _ in found.values()} == {1e-3, 1e-4, 2e-3}


def test_one_rate_makes_two_groups():
    groups = parameter_groups(tiny_sparse("decoder"), 1e-3, weight_decay=0.1)
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [(1e-3, 0.0), (1e-3, 0.1)]


def test_frozen_parameters_are_left_out_and_adapters_learn_at_the_rate_of_what_they_adapt():
    model = adapted(tiny_sparse("decoder"))
    found = by_name(model, parameter_groups(model, 1e-3, expert_learning_rate=2e-3))
    assert sorted(found) == sorted(name for name, each in model.named_parameters() if each.requires_grad)
    assert {rate for rate, _ in found.values()} == {2e-3}

    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"])
    model = get_peft_model(stock_mixture("mixtral"), config)
    found = by_name(model, parameter_groups(model, **RATES))
    roles = {"q_proj": (1e-3, 0.1), "gate": (1e-4, 0.0), "experts": (2e-3, 0.1)}
    assert found == {
        name: next(role for part, role in roles.items() if part in name.split("."))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_trainer_moves_each_role_at_its_own_rate(tmp_path):
    """With SGD a step is rate times gradient: a rate of 0 leaves the experts as they are."""
    model = make_model("decoder")
    groups = parameter_groups(model, 1e-3, router_learning_rate=1e-2, expert_learning_rate=0.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, make_rows(model), max_steps=1, learning_rate=1e-3, max_grad_norm=0.0)
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"params": groups})
    gradients = {}
    step = torch.optim.SGD.step

    def keep(self, *args, **kwargs):
        gradients.update({name: each.grad.clone() for name, each in model.named_parameters()})
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", keep)
        trainer.train()
    for name, parameter in model.named_parameters():
        rate = 1e-2 if ".gate." in name else 0.0 if ".experts." in name else 1e-3
        assert rate == 0.0 or gradients[name].any(), name
        torch.testing.assert_close(parameter, before[name] - rate * gradients[name], rtol=0, atol=1e-7)


def test_the_arguments_of_trainer_take_the_groups(tmp_path):
    model = make_model("mixtral")
    groups = parameter_groups(model, **RATES)
    arguments = make_trainer(model, tmp_path, make_rows(model), max_steps=2).args
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=make_rows(model),
        optimizer_cls_and_kwargs=(AdamW, {"params": groups}),
    )
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [group["lr"] for group in groups]


@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, True, "1e-3"])
@pytest.mark.parametrize("name", sorted(RATES))
def test_a_number_that_is_not_allowed_is_named(name, value):
    with pytest.raises(ValueError, match=rf"`{name}=.*` is not allowed"):
        parameter_groups(tiny_sparse("decoder"), **{**RATES, name: value})


def test_what_has_nothing_to_train_says_so():
    with pytest.raises(ValueError, match="no sparse layer was found"):
        parameter_groups(tiny_dense("llama"), 1e-3)
    hashed = upcycle(tiny_dense("llama"), num_experts=4, router_type="hash")
    parameter_groups(hashed, 1e-3, expert_learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"`router_learning_rate=0\.01` has nothing to act on: the routers"):
        parameter_groups(hashed, 1e-3, router_learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"`expert_learning_rate=0\.01` has nothing to act on: the experts"):
        parameter_groups(
            get_peft_model(tiny_sparse("decoder"), LoraConfig(target_modules=["q_proj"])),
            1e-3,
            expert_learning_rate=1e-2,
        )
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        parameter_groups(hashed.requires_grad_(False), 1e-3)
