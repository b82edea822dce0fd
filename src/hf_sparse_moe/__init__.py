"""
Sparse mixtures of experts from any dense Transformers checkpoint.

Importing the package registers its classes, so that `AutoModelForCausalLM.from_pretrained` and its siblings load them.
"""

from importlib import import_module
from typing import Any

from . import experts  # noqa: F401  registers the experts implementations
from .models.configuration_sparse_moe import (
    SparseMoeConfig,
    SparseMoeDecoderConfig,
    SparseMoeEncoderConfig,
    SparseMoeEncoderDecoderConfig,
)
from .models.feed_forward import explain, list_feed_forward_layouts
from .models.modeling_sparse_moe import (
    AUTO_CLASSES,
    SparseMoeDecoderForCausalLM,
    SparseMoeDecoderForQuestionAnswering,
    SparseMoeDecoderForSequenceClassification,
    SparseMoeDecoderForTokenClassification,
    SparseMoeDecoderModel,
    SparseMoeEncoderDecoderForConditionalGeneration,
    SparseMoeEncoderDecoderForQuestionAnswering,
    SparseMoeEncoderDecoderForSequenceClassification,
    SparseMoeEncoderDecoderModel,
    SparseMoeEncoderForMaskedLM,
    SparseMoeEncoderForMultipleChoice,
    SparseMoeEncoderForQuestionAnswering,
    SparseMoeEncoderForSequenceClassification,
    SparseMoeEncoderForTokenClassification,
    SparseMoeEncoderModel,
)
from .models.pretrained_model import SparseMoePreTrainedModel
from .registration import register_auto_classes


__version__ = "0.1.0"

register_auto_classes(AUTO_CLASSES)

# Found on first use, so that importing the package needs torch and transformers only.
_LAZY = {
    "ModelCardCallback": ".hub",
    "RoutingMonitor": ".routing",
    "SelectionBiasCallback": ".routing",
    "add_leading_callback": ".routing",
    "add_model_card": ".hub",
    "consolidate": ".distributed.consolidation",
    "dequantize_experts": ".adapters",
    "disable_experts": ".routing",
    "doctor": ".hub",
    "expand": ".upcycling",
    "expert_lora_config": ".adapters",
    "explain_export": ".stock",
    "find_mixture_layers": ".routing",
    "fix_balance": ".routing",
    "import_native": ".stock",
    "load_adapter": ".hub",
    "load_expert_lora": ".adapters",
    "observe_routing": ".routing",
    "plan": ".upcycling",
    "pull": ".hub",
    "push_adapter": ".hub",
    "push_folder": ".hub",
    "push_to_hub": ".hub",
    "push_trainer": ".hub",
    "quantize_experts": ".adapters",
    "record_routing": ".routing",
    "render_model_card": ".hub",
    "replay_routing": ".routing",
    "select_experts": ".adapters",
    "stream_upcycle": ".upcycling",
    "upcycle": ".upcycling",
    "upcycle_into_shards": ".distributed.upcycling",
    "use_top_k": ".routing",
    "verify": ".upcycling",
    "write_model_card": ".hub",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name], __name__), name)


__all__ = [
    "ModelCardCallback",
    "RoutingMonitor",
    "SelectionBiasCallback",
    "SparseMoeConfig",
    "SparseMoeDecoderConfig",
    "SparseMoeDecoderForCausalLM",
    "SparseMoeDecoderForQuestionAnswering",
    "SparseMoeDecoderForSequenceClassification",
    "SparseMoeDecoderForTokenClassification",
    "SparseMoeDecoderModel",
    "SparseMoeEncoderConfig",
    "SparseMoeEncoderDecoderConfig",
    "SparseMoeEncoderDecoderForConditionalGeneration",
    "SparseMoeEncoderDecoderForQuestionAnswering",
    "SparseMoeEncoderDecoderForSequenceClassification",
    "SparseMoeEncoderDecoderModel",
    "SparseMoeEncoderForMaskedLM",
    "SparseMoeEncoderForMultipleChoice",
    "SparseMoeEncoderForQuestionAnswering",
    "SparseMoeEncoderForSequenceClassification",
    "SparseMoeEncoderForTokenClassification",
    "SparseMoeEncoderModel",
    "SparseMoePreTrainedModel",
    "add_leading_callback",
    "add_model_card",
    "consolidate",
    "dequantize_experts",
    "disable_experts",
    "doctor",
    "expand",
    "expert_lora_config",
    "explain",
    "explain_export",
    "find_mixture_layers",
    "fix_balance",
    "import_native",
    "list_feed_forward_layouts",
    "load_adapter",
    "load_expert_lora",
    "observe_routing",
    "plan",
    "pull",
    "push_adapter",
    "push_folder",
    "push_to_hub",
    "push_trainer",
    "quantize_experts",
    "record_routing",
    "render_model_card",
    "replay_routing",
    "select_experts",
    "stream_upcycle",
    "upcycle",
    "upcycle_into_shards",
    "use_top_k",
    "verify",
    "write_model_card",
]
