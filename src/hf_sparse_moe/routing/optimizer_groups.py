"""What the optimizer is given: routers and experts at rates of their own, and weight decay where it belongs."""

from __future__ import annotations

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
    own = {"router_learning_rate": router_learning_rate, "expert_learning_rate": expert_learning_rate}
    asked = {name: rate for name, rate in own.items() if rate is not None}
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay, **asked}.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise ValueError(f"`{name}={value!r}` is not allowed: it must be a finite number of at least 0.")
    layers = find_mixture_layers(model)
    role_of = {id(each): "expert_learning_rate" for layer in layers for each in layer.experts.parameters()}
    role_of |= {id(each): "router_learning_rate" for layer in layers for each in layer.router.parameters()}
    groups: dict[Any, dict[str, Any]] = {}
    idle = set(asked)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = role_of.get(id(parameter), "learning_rate")
            idle.discard(role)
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in its place
            decays = role != "router_learning_rate" and "bias" not in name and len(shape) > 1
            rate, decay = asked.get(role, learning_rate), weight_decay if decays else 0.0
            key = (rate, decays, getattr(parameter, "device_mesh", None))
            groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay})["params"].append(parameter)
    if not groups:
        raise ValueError("`model` has no parameter that requires a gradient. Unfreeze what is to be trained.")
    for name in sorted(idle):
        raise ValueError(
            f"`{name}={asked[name]!r}` has nothing to act on: the {name.split('_')[0]}s of `model` have no parameter "
            "that requires a gradient. Unfreeze them, or leave the argument out."
        )
    return list(groups.values())
