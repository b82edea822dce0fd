"""Makes the families known to the Auto classes, and publishing known to the models."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig

from .models.pretrained_model import SparseMoePreTrainedModel


def register_auto_classes(auto_classes: dict[Any, dict[Any, type]]) -> None:
    """Register each config with `AutoConfig` and each class with its Auto class."""
    for config_class, classes in auto_classes.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in classes.items():
            auto_class.register(config_class, model_class, exist_ok=True)
    SparseMoePreTrainedModel.publisher = staticmethod(_publish)


def _publish(model: SparseMoePreTrainedModel, repo_id: str, **kwargs):
    # The models import nothing of the package, since they travel without it; so the package hands them this.
    return import_module(".hub", __package__).push_to_hub(model, repo_id, **kwargs)
