"""LoRA on experts: a `peft.LoraConfig` that reaches every expert of a mixture, and whose file plain PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from hf_sparse_moe.checkpoints.files import read_json

from .expert_factors import pack_in_peft_files
from .expert_layer import layer_class
from .expert_modules import PROJECTIONS, below_adapters, expert_modules, first_projection, follows_interface, shape_of


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

FILE = "expert_lora.json"  # what PEFT's own file has no place for
_OWN = ("experts", "projections", "shared")
_ABSENT_IS_FINE = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
_DOWNLOAD = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
_IGNORED = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_modules", "target_parameters")
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_TASK_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def expert_lora_config(
    model: PreTrainedModel,
    r: int = 16,
    lora_alpha: int = 32,
    *,
    experts: Mapping[str | int, Sequence[int] | None] | None = None,
    projections: Collection[str] = PROJECTIONS,
    shared: bool = False,
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
        model (`PreTrainedModel`): The mixture, or a `PeftModel` of it that is to get another adapter.
        r (`int`, defaults to 16): Rank, of each expert; `rank_pattern` gives others a layer or projection.
        lora_alpha (`int`, defaults to 32): The update is scaled by `lora_alpha / r`.
        experts (`Mapping[str | int, Sequence[int] | None]`, *optional*):
            The experts to adapt, by layer: the name of its experts module, as [`select_experts`] gives it, or the
            layer's number. None stands for all experts of the layer; layers that are not named get no adapter.
        projections (`Collection[str]`, defaults to `("gate", "up", "down")`): Which of them to adapt.
        shared (`bool`, defaults to `False`): One A and B for all adapted experts of a layer, instead of one of each: N
            times fewer parameters for N experts.
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
    model = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    modules = expert_modules(model)
    chosen = None if experts is None else _chosen_experts(modules, experts)
    modules_to_save = list(lora_kwargs.pop("modules_to_save", None) or [])
    modules_to_save += _new_head(model)
    if router:
        modules_to_save += _routers(model, modules)
    name = type(model).__name__
    task_type = next((task for head, task in _TASK_TYPES.items() if name.endswith(head)), None)
    return config_class()(
        r=r,
        lora_alpha=lora_alpha,
        target_parameters=_target_parameters(modules, projections, chosen),
        target_modules=_attention_projections(model) if attention else [],
        modules_to_save=modules_to_save or None,
        experts=chosen,
        projections=None if set(projections) == set(PROJECTIONS) else sorted(projections),
        shared=shared,
        **{"task_type": task_type, **lora_kwargs},
    )


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
    wanted = set(projections) if gated or set(projections) != set(PROJECTIONS) else set(known)
    if not wanted or wanted - set(known):
        raise ValueError(f"`projections={list(projections)}` must be some of {', '.join(known)}.")
    parameters = [first_projection(next(iter(modules.values())))] if wanted - {"down"} else []
    if "down" in wanted:
        parameters.append("down_proj")
    return sorted(f"{name}.{parameter}" for name in (chosen or ["experts"]) for parameter in parameters)


def _routers(model: nn.Module, modules: dict[str, Any]) -> list[str]:
    """The suffixes that name them."""
    names = {name for name, _ in model.named_modules()}
    blocks = [name.rpartition(".")[0] for name in modules]
    routers = [f"{block}.{name}" for block in blocks for name in ("gate", "router") if f"{block}.{name}" in names]
    if len(routers) != len(blocks):
        raise ValueError(
            f"`router=True` finds {len(routers)} routers for {len(blocks)} experts modules. Leave it out, and name "
            "the routers in `modules_to_save`."
        )
    if not any(True for name in routers for _ in model.get_submodule(name).parameters()):
        raise ValueError("`router=True` is not allowed: these routers have no weights to train. Leave it out.")
    return sorted({".".join(name.split(".")[-2:]) for name in routers})


def _new_head(model: PreTrainedModel) -> list[str]:
    """A task's head, which starts at random: PEFT knows those of some classes, and would leave the others frozen."""
    inner: Any = getattr(model, "dense", model)
    # The head is what stands beside the body; T5's for questions has no body of its own, and a head that PEFT knows.
    if not type(model).__name__.endswith(_TASK_HEADS) or not hasattr(inner, inner.base_model_prefix):
        return []
    prefix = "dense." if inner is not model else ""
    heads = {name: child for name, child in inner.named_children() if name != inner.base_model_prefix}
    return [f"{prefix}{name}" for name, child in heads.items() if any(True for _ in child.parameters())]


def _attention_projections(model: nn.Module) -> list[str]:
    names = {
        f"{attention_name}.{name}".removesuffix(".base_layer")
        for attention_name, attention in model.named_modules()
        if "Attention" in type(attention).__name__
        for name, module in attention.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name
    }
    if not names:
        raise ValueError(f"`attention=True` finds no attention in `{type(model).__name__}`. Leave it out.")
    return sorted(names)


@cache
def config_class() -> type[Any]:
    """`ExpertLoraConfig`; made on first use, since PEFT is an extra."""
    from peft import LoraConfig

    pack_in_peft_files()

    @dataclass
    class ExpertLoraConfig(LoraConfig):
        """
        Args:
            experts (`dict[str, list[int]]`, *optional*): The adapted experts of each experts module, by its name.
            projections (`list[str]`, *optional*): Which of "gate", "up" and "down" are adapted.
            shared (`bool`, defaults to `False`): Whether the experts of a layer share one adapter.
        """

        experts: dict[str, list[int]] | None = None
        projections: list[str] | None = None
        shared: bool = False

        def __post_init__(self):
            super().__post_init__()
            self._register_custom_module({nn.Module: cast(type[nn.Module], _make_layer)})  # PEFT only calls it

        def to_dict(self) -> dict[str, Any]:
            """What plain PEFT reads."""
            return {name: value for name, value in super().to_dict().items() if name not in _OWN}

        def save_pretrained(self, save_directory: str, **kwargs) -> None:
            super().save_pretrained(save_directory, **kwargs)
            own = {name: getattr(self, name) for name in _OWN}
            path = Path(save_directory, FILE)
            path.unlink(missing_ok=True)
            if any(own.values()):
                path.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs):
            name = str(pretrained_model_name_or_path)
            base = LoraConfig.from_pretrained(name, **kwargs)
            settings = {field.name: getattr(base, field.name) for field in fields(base) if field.init}
            where = {key: kwargs[key] for key in _DOWNLOAD if kwargs.get(key) is not None}
            path = cached_file(name, FILE, **where, **_ABSENT_IS_FINE)
            return cls(**settings | (read_json(Path(path)) if path else {}))

    # `pickle` and `copy` look a class up by these.
    ExpertLoraConfig.__qualname__ = "ExpertLoraConfig"
    return ExpertLoraConfig


def _make_layer(target: Any, adapter_name: str, config: LoraConfig, **kwargs) -> nn.Module | None:
    """The layer for `target`, or None for what is left to PEFT; PEFT calls it for every target of a config."""
    if kwargs.get("parameter_name") is None or not follows_interface(below_adapters(target)):
        return None
    return layer_class()(target, adapter_name, config=config, **kwargs)


def serve_plain_config(config: Any) -> None:
    """Have a plain LoRA config reach this package's layers, where it asks for what PEFT's own refuse on experts."""
    is_plain = not getattr(config, "_custom_modules", True)
    if is_plain and config.target_parameters and (config.lora_dropout or config.use_dora):
        pack_in_peft_files()
        config._register_custom_module({nn.Module: cast(type[nn.Module], _make_layer)})


def load_expert_lora(
    model: PreTrainedModel, adapter: str, adapter_name: str = "default", is_trainable: bool = False, **kwargs
) -> PeftModel:
    """
    `PeftModel.from_pretrained`, with its arguments, with this package's layers for a LoRA of its own or of plain PEFT.

    Raises:
        ValueError, RuntimeError: it does not fit the model.
    """
    from peft import PeftModel

    config = config_class().from_pretrained(adapter, **{name: kwargs[name] for name in _DOWNLOAD if name in kwargs})
    return PeftModel.from_pretrained(
        model, adapter, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **kwargs
    )


def __getattr__(name: str) -> type:
    if name == "ExpertLoraConfig":
        return config_class()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
