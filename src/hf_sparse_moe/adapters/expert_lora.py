"""LoRA on experts: a `peft.LoraConfig` that reaches every expert of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from peft import LoraConfig


# What PEFT 0.21 refuses deep inside, or ignores without a word, for parameters that are no modules.
_UNSUPPORTED = ("lora_dropout", "use_dora", "lora_bias", "alora_invocation_tokens")
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
    attention: bool = False,
    router: bool = False,
    **lora_kwargs,
) -> LoraConfig:
    """
    A LoRA config whose targets are the projections of all experts of `model`, for `peft.get_peft_model`.

    Works on every model whose experts are fused 3-D parameters of a module called `experts`: this library's, and
    transformers' own mixtures. Biases of experts are not adapted.

    Args:
        model (`PreTrainedModel`): The mixture, not yet wrapped by PEFT.
        r (`int`, defaults to 16): Rank, of each expert.
        lora_alpha (`int`, defaults to 32): The update is scaled by `lora_alpha / r`.
        attention (`bool`, defaults to `False`): Adapt the linear layers of the attention too.
        router (`bool`, defaults to `False`): Train the routers too, in full: they are small. Off by default, since a
            router that moves can unlearn its balance on little data.
        **lora_kwargs: Further arguments of `peft.LoraConfig`, such as `use_rslora=True`.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: no expert, or not every expert, can be reached; or an argument that PEFT does not support, or
            silently ignores, on experts.

    Example:
        ```python
        model = get_peft_model(model, expert_lora_config(model, r=16))
        ```
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('`expert_lora_config` needs PEFT. Run: pip install "hf-sparse-moe[peft]"') from error

    for name in (*_UNSUPPORTED, *_IGNORED):
        if lora_kwargs.get(name):
            verb = "is not supported by" if name in _UNSUPPORTED else "is set here, and ignored by,"
            raise ValueError(f"`{name}={lora_kwargs[name]!r}` {verb} PEFT's LoRA on experts. Leave it out.")
    modules_to_save = list(lora_kwargs.pop("modules_to_save", None) or [])
    if router:
        modules_to_save += sorted({".".join(name.split(".")[-2:]) for name in _routers(model)})
    lora_kwargs.setdefault("task_type", _task_type(model))
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_parameters=_expert_parameters(model),
        target_modules=_attention_projections(model) if attention else [],
        modules_to_save=modules_to_save or None,
        **lora_kwargs,
    )


def _expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            yield name, module


def _expert_parameters(model: nn.Module) -> list[str]:
    found: list[str] = []
    missed: list[str] = []
    suffixes: set[str] = set()
    for name, module in _expert_modules(model):
        fused = [f"experts.{key}" for key, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
        (found if len(fused) == 2 else missed).append(name)
        suffixes.update(fused)
    if not found and not missed:
        raise ValueError(f"`{type(model).__name__}` has no experts. Pass a mixture, such as what `upcycle` returns.")
    if missed:
        raise ValueError(
            f"{len(missed)} of {len(found) + len(missed)} experts modules of `{type(model).__name__}` do not hold two "
            f"fused 3-D parameters (first: `{missed[0]}`), so LoRA would reach only a part. Pass a model that is not "
            "yet wrapped or quantised, with fused experts."
        )
    return sorted(suffixes)


def _routers(model: nn.Module) -> list[str]:
    names = {name for name, _ in model.named_modules()}
    parents = [name.rpartition(".")[0] for name, _ in _expert_modules(model)]
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
