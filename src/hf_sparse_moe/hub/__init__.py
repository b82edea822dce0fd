"""Sharing: the model card and the push."""

from hf_sparse_moe.hub.model_card import render_model_card
from hf_sparse_moe.hub.publish import push_to_hub


__all__ = ["push_to_hub", "render_model_card"]
