"""Sharing: the model card, push, pull, and the check of what arrived."""

from .adapter_loading import load_adapter
from .adapter_publish import push_adapter
from .checkpoint import save_routing_statistics
from .doctor import Diagnosis, doctor
from .errors import HubUnavailableError
from .model_card import render_model_card, write_model_card
from .publish import Published, push_folder, push_to_hub
from .pull import Pulled, pull
from .trainer_push import add_model_card, push_trainer
from .training_record import ModelCardCallback, record_results


__all__ = [
    "Diagnosis",
    "HubUnavailableError",
    "ModelCardCallback",
    "Published",
    "Pulled",
    "add_model_card",
    "doctor",
    "load_adapter",
    "pull",
    "push_adapter",
    "push_folder",
    "push_to_hub",
    "push_trainer",
    "record_results",
    "render_model_card",
    "save_routing_statistics",
    "write_model_card",
]
