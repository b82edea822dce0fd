"""
Sparse mixtures of experts from any dense Transformers checkpoint.

Importing the package registers its classes, so that `AutoModelForCausalLM.from_pretrained` and its siblings load them.
It loads neither torch nor transformers: each public name is imported on first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any
from warnings import warn

from . import _register


if TYPE_CHECKING:  # for type checkers and editors; `_HOMES` says the same to Python
    from .adapters import (
        expert_lora_config as expert_lora_config,
        select_experts as select_experts,
    )
    from .distributed.consolidation import (
        consolidate as consolidate,
    )
    from .hub import (
        ModelCardCallback as ModelCardCallback,
        add_model_card as add_model_card,
        doctor as doctor,
        export_adapter as export_adapter,
        import_adapter as import_adapter,
        load_adapter as load_adapter,
        pull as pull,
        push as push,
        write_model_card as write_model_card,
    )
    from .insight import (
        explain_routing as explain_routing,
    )
    from .models.configuration_sparse_moe import (
        SparseMoeConfig as SparseMoeConfig,
        SparseMoeDecoderConfig as SparseMoeDecoderConfig,
        SparseMoeEncoderConfig as SparseMoeEncoderConfig,
        SparseMoeEncoderDecoderConfig as SparseMoeEncoderDecoderConfig,
    )
    from .models.feed_forward import (
        explain_layouts as explain_layouts,
    )
    from .models.modeling_sparse_moe import (
        SparseMoeDecoderForCausalLM as SparseMoeDecoderForCausalLM,
        SparseMoeDecoderForQuestionAnswering as SparseMoeDecoderForQuestionAnswering,
        SparseMoeDecoderForSequenceClassification as SparseMoeDecoderForSequenceClassification,
        SparseMoeDecoderForTokenClassification as SparseMoeDecoderForTokenClassification,
        SparseMoeDecoderModel as SparseMoeDecoderModel,
        SparseMoeEncoderDecoderForConditionalGeneration as SparseMoeEncoderDecoderForConditionalGeneration,
        SparseMoeEncoderDecoderForQuestionAnswering as SparseMoeEncoderDecoderForQuestionAnswering,
        SparseMoeEncoderDecoderForSequenceClassification as SparseMoeEncoderDecoderForSequenceClassification,
        SparseMoeEncoderDecoderModel as SparseMoeEncoderDecoderModel,
        SparseMoeEncoderForMaskedLM as SparseMoeEncoderForMaskedLM,
        SparseMoeEncoderForMultipleChoice as SparseMoeEncoderForMultipleChoice,
        SparseMoeEncoderForQuestionAnswering as SparseMoeEncoderForQuestionAnswering,
        SparseMoeEncoderForSequenceClassification as SparseMoeEncoderForSequenceClassification,
        SparseMoeEncoderForTokenClassification as SparseMoeEncoderForTokenClassification,
        SparseMoeEncoderModel as SparseMoeEncoderModel,
    )
    from .models.pretrained_model import (
        SparseMoePreTrainedModel as SparseMoePreTrainedModel,
    )
    from .quantization import (
        ExpertsQuantizationConfig as ExpertsQuantizationConfig,
        experts_as_linears as experts_as_linears,
        quantize_experts as quantize_experts,
    )
    from .routing import (
        RoutingMonitor as RoutingMonitor,
        SelectionBiasCallback as SelectionBiasCallback,
        add_leading_callback as add_leading_callback,
        disable_experts as disable_experts,
        find_mixture_layers as find_mixture_layers,
        fix_balance as fix_balance,
        observe_routing as observe_routing,
        parameter_groups as parameter_groups,
        record_routing as record_routing,
        replay_routing as replay_routing,
        routing_statistics as routing_statistics,
        use_top_k as use_top_k,
    )
    from .stock import (
        explain_export as explain_export,
        explain_serving as explain_serving,
        export as export,
        import_stock as import_stock,
    )
    from .surgery import (
        expand as expand,
        measure_experts as measure_experts,
        merge_experts as merge_experts,
        prune_experts as prune_experts,
        to_dense as to_dense,
    )
    from .upcycling import (
        plan as plan,
        upcycle as upcycle,
        verify as verify,
    )


__version__ = "0.1.0"

# The module of each public name.
_HOMES = {
    ".adapters": "expert_lora_config select_experts",
    ".distributed.consolidation": "consolidate",
    ".hub": (
        "ModelCardCallback add_model_card doctor export_adapter import_adapter load_adapter pull push write_model_card"
    ),
    ".insight": "explain_routing",
    ".models.configuration_sparse_moe": (
        "SparseMoeConfig SparseMoeDecoderConfig SparseMoeEncoderConfig SparseMoeEncoderDecoderConfig"
    ),
    ".models.feed_forward": "explain_layouts",
    ".models.modeling_sparse_moe": (
        "SparseMoeDecoderForCausalLM SparseMoeDecoderForQuestionAnswering "
        "SparseMoeDecoderForSequenceClassification SparseMoeDecoderForTokenClassification SparseMoeDecoderModel "
        "SparseMoeEncoderDecoderForConditionalGeneration SparseMoeEncoderDecoderForQuestionAnswering "
        "SparseMoeEncoderDecoderForSequenceClassification SparseMoeEncoderDecoderModel SparseMoeEncoderForMaskedLM "
        "SparseMoeEncoderForMultipleChoice SparseMoeEncoderForQuestionAnswering "
        "SparseMoeEncoderForSequenceClassification SparseMoeEncoderForTokenClassification SparseMoeEncoderModel"
    ),
    ".models.pretrained_model": "SparseMoePreTrainedModel",
    ".quantization": "ExpertsQuantizationConfig experts_as_linears quantize_experts",
    ".routing": (
        "RoutingMonitor SelectionBiasCallback add_leading_callback disable_experts find_mixture_layers fix_balance "
        "observe_routing parameter_groups record_routing replay_routing routing_statistics use_top_k"
    ),
    ".stock": "explain_export explain_serving export import_stock",
    ".surgery": "expand measure_experts merge_experts prune_experts to_dense",
    ".upcycling": "plan upcycle verify",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)

# Names of version 0.1, which work for one more release: old name -> (module, new name). Where the arguments changed,
# the module holds a function of the old name that takes the old ones.
_RENAMED: dict[str, tuple[str, str]] = {
    "dequantize_experts": (".quantization", "quantization.dequantize_experts"),
    "explain": (".models.feed_forward", "explain_layouts"),
    "import_native": (".stock", "import_stock"),
    "list_feed_forward_layouts": (".models.feed_forward", "explain_layouts"),
    "load_expert_lora": (".adapters", "load_adapter"),
    "push_adapter": (".hub.publish", "push"),
    "push_folder": (".hub.publish", "push"),
    "push_to_hub": (".hub.publish", "push"),
    "push_trainer": (".hub.publish", "push"),
    "render_model_card": (".hub", "hub.render_model_card"),
    "stream_upcycle": (".upcycling.mixtures", "upcycle"),
    "upcycle_into_shards": (".upcycling.mixtures", "upcycle"),
}

# The same for folders: old name -> the folders that hold now what it held.
_MOVED = {
    "analysis": ("routing", "insight"),
    "backends": ("experts",),
    "export": ("stock",),
    "train": ("routing",),
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name], __name__), name)
        globals()[name] = value
        return value
    if name in _RENAMED:
        home, new_name = _RENAMED[name]
        warn(f"`hf_sparse_moe.{name}` is now `hf_sparse_moe.{new_name}`.", FutureWarning, stacklevel=2)
        module = import_module(home, __name__)
        return getattr(module, name if hasattr(module, name) else new_name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _MovedFolder(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        old_name = self.__name__.rpartition(".")[2]
        for folder in _MOVED[old_name]:
            module = import_module(f".{folder}", __package__)
            if hasattr(module, name):
                warn(f"`{self.__name__}` is now `{module.__name__}`.", FutureWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")


for _name in _MOVED:
    sys.modules[f"{__name__}.{_name}"] = _MovedFolder(f"{__name__}.{_name}")
_register.register()
