"""LoRA on experts: a `peft.LoraConfig` that reaches every expert of a mixture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .expert_config import config_class
from .expert_layer import PROJECTIONS, follows_interface, shape_of


if TYPE_CHECKING:
    from peft import LoraConfig


_IGNORED = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_modules", "target_parameters")

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def expert_lora_config(
    model: PreTrainedModel,
    r: int = 16,
    lora_alpha: int = 32,
    *,
    experts: Mapping[str | int, Sequence[int] | None] | None = None,
    projections: Collection[str] = PROJECTIONS,
    attention: bool = False,
    router: bool = False,
    **lora_kwargs,
) -> LoraConfig:
    """
    A LoRA config whose targets are the experts of `model`, for `peft.get_peft_model`.

    Works on every model whose experts are fused 3-D parameters of a module called `experts`: this library's, and
    transformers' own mixtures. Its layers compute `W x + s B (A x)` for the experts that the tokens use, and build no
    update of W, as PEFT's do; its files are PEFT's own. Biases of experts are not adapted.

    Args:
        model (`PreTrainedModel`): The mixture, not yet wrapped by PEFT.
        r (`int`, defaults to 16): Rank, of each expert; `rank_pattern` gives others a layer or projection.
        lora_alpha (`int`, defaults to 32): The update is scaled by `lora_alpha / r`.
        experts (`Mapping[str | int, Sequence[int] | None]`, *optional*):
            The experts to adapt, by layer: the name of its experts module, as [`select_experts`] gives it, or the
            layer's number. None stands for all experts of the layer; layers that are not named get no adapter.
        projections (`Collection[str]`, defaults to `("gate", "up", "down")`): Which of them to adapt.
        attention (`bool`, defaults to `False`): Adapt the linear layers of the attention too.
        router (`bool`, defaults to `False`): Train the routers too, in full: they are small. Off by default, since a
            router that moves can unlearn its balance on little data.
        **lora_kwargs: Further arguments of `peft.LoraConfig`, such as `lora_dropout=0.05` or `use_rslora=True`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: no expert, or not every expert, can be reached; a layer, expert or projection that the model does
            not have; or an argument that PEFT silently ignores on experts.

    Example:
        ```python
        model = get_peft_model(model, expert_lora_config(model, r=16))
        ```
    """
    if find_spec("peft") is None:
        raise ImportError('`expert_lora_config` needs PEFT. Run: pip install "hf-sparse-moe[peft]"')
    for name in _IGNORED:
        if lora_kwargs.get(name):
            raise ValueError(
                f"`{name}={lora_kwargs[name]!r}` is set here, and ignored by PEFT's LoRA on experts. Leave it out; "
                "`experts` chooses layers and experts."
            )
    modules = expert_modules(model)
    chosen = None if experts is None else _chosen_experts(modules, experts)
    modules_to_save = list(lora_kwargs.pop("modules_to_save", None) or [])
    if router:
        modules_to_save += sorted({".".join(name.split(".")[-2:]) for name in _routers(model, modules)})
    lora_kwargs.setdefault("task_type", _task_type(model))
    return config_class()(
        r=r,
        lora_alpha=lora_alpha,
        target_parameters=_target_parameters(modules, projections, chosen),
        target_modules=_attention_projections(model) if attention else [],
        modules_to_save=modules_to_save or None,
        experts=chosen,
        projections=None if set(projections) == set(PROJECTIONS) else sorted(projections),
        **lora_kwargs,
    )


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """
    The experts of all layers, by name.

    Raises:
        ValueError: there are none, or not all are fused 3-D parameters.
    """
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"}
    if not found:
        raise ValueError(f"`{type(model).__name__}` has no experts. Pass a mixture, such as what `upcycle` returns.")
    missed = [name for name, module in found.items() if not follows_interface(module)]
    if missed:
        raise ValueError(
            f"{len(missed)} of {len(found)} experts modules of `{type(model).__name__}` do not hold two "
            f"fused 3-D parameters (first: `{missed[0]}`), so only a part would be reached. Pass a model with fused "
            "experts, not yet wrapped by PEFT, nor quantised by other means than `quantize_experts`."
        )
    return found


def _chosen_experts(
    modules: dict[str, Any], experts: Mapping[str | int, Sequence[int] | None]
) -> dict[str, list[int]]:
    chosen = {}
    for layer, numbers in experts.items():
        matches = [name for name in modules if name == layer or str(layer) in name.split(".")]
        if len(matches) != 1:
            raise ValueError(
                f"`experts` names layer {layer!r}, which {len(matches)} experts modules match. Name one of: "
                f"{', '.join(modules)}."
            )
        count = shape_of(modules[matches[0]].down_proj)[0]  # `num_experts` is a rank's in expert parallelism
        numbers = list(range(count) if numbers is None else numbers)
        if not numbers or not all(0 <= number < count for number in numbers):
            raise ValueError(f"`experts` gives {numbers} for layer {layer!r}, which has experts 0 to {count - 1}.")
        chosen[matches[0]] = sorted(set(numbers))
    if not chosen:
        raise ValueError("`experts` is empty. Name a layer, or leave it out to adapt all experts.")
    return chosen


def _target_parameters(
    modules: dict[str, Any], projections: Collection[str], chosen: dict[str, list[int]] | None
) -> list[str]:
    """The suffixes that name them in every layer, or whole names where layers are chosen."""
    gated = all(module.has_gate for module in modules.values())
    known = PROJECTIONS if gated else PROJECTIONS[1:]
    wrong = set(projections) - set(known) if gated or set(projections) != set(PROJECTIONS) else set()
    if wrong or not projections:
        raise ValueError(f"`projections={list(projections)}` must be some of {', '.join(known)}.")
    up = {"gate", "up"} & set(projections)
    parameters = ["gate_up_proj" if gated else "up_proj"] if up else []
    if "down" in projections:
        parameters.append("down_proj")
    return sorted(f"{name}.{parameter}" for name in (chosen or ["experts"]) for parameter in parameters)


def _routers(model: nn.Module, modules: dict[str, Any]) -> list[str]:
    names = {name for name, _ in model.named_modules()}
    parents = [name.rpartition(".")[0] for name in modules]
    routers = [f"{parent}.{gate}" for parent in parents for gate in ("gate", "router") if f"{parent}.{gate}" in names]
    if len(routers) != len(parents):
        raise ValueError(
            f"`router=True` finds {len(routers)} routers for {len(parents)} experts modules. Leave it out, and name "
            "the routers in `modules_to_save`."
        )
    return routers


def _attention_projections(model: nn.Module) -> list[str]:
    names = [
        f"{attention_name}.{name}"
        for attention_name, attention in model.named_modules()
        if "Attention" in type(attention).__name__
        for name, module in attention.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    if not names:
        raise ValueError(f"`attention=True` finds no attention in `{type(model).__name__}`. Leave it out.")
    return sorted(set(names))


def _task_type(model: nn.Module) -> str | None:
    name = type(model).__name__
    return next((task for head, task in _TASK_TYPES.items() if name.endswith(head)), None)
