"""Sharing: the model card and the push."""

from .model_card import render_model_card, write_model_card
from .publish import push_to_hub
from .training_record import ModelCardCallback


__all__ = ["ModelCardCallback", "push_to_hub", "render_model_card", "write_model_card"]
