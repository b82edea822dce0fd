"""Sharing: the model card, push, pull, and the check of what arrived."""

from typing import Any

import hf_sparse_moe

from .adapter_export import export_adapter, import_adapter
from .adapter_loading import load_adapter
from .checkpoint import save_routing_statistics
from .download import PullReport, pull
from .errors import HubUnavailableError
from .health_check import DoctorReport, doctor
from .model_card import render_model_card, write_model_card
from .publish import PushReport, push
from .trainer_push import add_model_card
from .training_record import ModelCardCallback, record_results


__all__ = [
    "DoctorReport",
    "HubUnavailableError",
    "ModelCardCallback",
    "PullReport",
    "PushReport",
    "add_model_card",
    "doctor",
    "export_adapter",
    "import_adapter",
    "load_adapter",
    "pull",
    "push",
    "record_results",
    "render_model_card",
    "save_routing_statistics",
    "write_model_card",
]


def __getattr__(name: str) -> Any:
    if hf_sparse_moe._RENAMED.get(name, ("",))[0].startswith(".hub"):
        return getattr(hf_sparse_moe, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
