"""What the optimizer is given: routers and experts at rates of their own, and weight decay where it belongs."""

from __future__ import annotations

from math import isfinite
from typing import Any

from torch import nn

from .mixture_layers import find_mixture_layers


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    router_learning_rate: float | None = None,
    expert_learning_rate: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """
    The parameter groups of a mixture for any optimizer of torch. Frozen parameters are left out; routers, norms and
    biases get no weight decay.

    Args:
        model (`nn.Module`): A mixture of this package or of transformers, alone or inside PEFT, DDP or so.
        learning_rate (`float`): The rate of all that is neither a router's nor a routed expert's. A shared expert,
            which serves every token as a dense feed-forward does, learns at this rate too.
        router_learning_rate (`float`, *optional*): The routers' rate. Defaults to `learning_rate`.
        expert_learning_rate (`float`, *optional*): The routed experts' rate, that of adapters on them included.
            Defaults to `learning_rate`.
        weight_decay (`float`, defaults to 0.0): The decay of all other parameters.

    Returns:
        `list[dict]`: `{"params", "lr", "weight_decay"}`, one for each pair of rate and decay (and each device mesh
        that parameters are sharded on). Schedulers scale each group's own rate.

    Raises:
        ValueError: a number that is not allowed, a model without sparse layers, one with nothing to train, or a rate
            for routers or experts that are all frozen.
    """
    rates = {
        "learning_rate": learning_rate,
        "router_learning_rate": router_learning_rate,
        "expert_learning_rate": expert_learning_rate,
    }
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        fine = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0
        if not fine and (value is not None or name not in ("router_learning_rate", "expert_learning_rate")):
            raise ValueError(f"`{name}={value!r}` is not allowed: it must be a finite number of at least 0.")
    layers = find_mixture_layers(model)
    role_of = {id(each): "expert_learning_rate" for layer in layers for each in layer.experts.parameters()}
    role_of |= {id(each): "router_learning_rate" for layer in layers for each in layer.router.parameters()}
    groups: dict[Any, dict[str, Any]] = {}
    seen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of.get(id(parameter), "learning_rate")
        seen.add(role)
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in its place
        decays = role != "router_learning_rate" and "bias" not in name and len(shape) > 1
        rate = learning_rate if rates[role] is None else rates[role]
        key = (rate, decays, getattr(parameter, "device_mesh", None))
        decay = weight_decay if decays else 0.0
        groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay})["params"].append(parameter)
    if not groups:
        raise ValueError("`model` has no parameter that requires a gradient. Unfreeze what is to be trained.")
    idle = [role for role in ("router_learning_rate", "expert_learning_rate") if rates[role] is not None]
    idle = [role for role in idle if role not in seen]
    if idle:
        raise ValueError(
            f"`{idle[0]}={rates[idle[0]]!r}` has nothing to act on: the {idle[0].split('_')[0]}s of `model` have no "
            "parameter that requires a gradient. Unfreeze them, or leave the argument out."
        )
    return list(groups.values())
