"""How stock architectures say which of their layers are sparse: each function gives the config fields for a list."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


Layers = dict[str, list[str]]  # side to "dense" or "sparse", one a layer


def all_sparse(layers: Layers) -> dict[str, Any]:
    """No field: every layer is sparse."""
    return {}


def mlp_only_layers(layers: Layers) -> dict[str, Any]:
    """A list of the dense layers (Qwen2-MoE, Qwen3-MoE)."""
    dense = [number for number, kind in enumerate(layers["decoder"]) if kind == "dense"]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def first_k_dense_replace(layers: Layers) -> dict[str, Any]:
    """The number of dense layers before the first sparse one (DeepSeek-V3, GLM-4.5, dots.llm1)."""
    return {"first_k_dense_replace": [*layers["decoder"], "sparse"].index("sparse")}


def mlp_layer_types(layers: Layers) -> dict[str, Any]:
    """The list itself."""
    return {"mlp_layer_types": list(layers["decoder"])}


def moe_layer_interval(layers: Layers) -> dict[str, Any]:
    """Every n-th layer from a first to a last one (ERNIE 4.5)."""
    sparse = [number for number, kind in enumerate(layers["decoder"]) if kind == "sparse"]
    steps = {after - before for before, after in pairwise(sparse)}
    interval = steps.pop() if len(steps) == 1 else 1
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": interval}


def num_sparse_layers(layers: Layers) -> dict[str, Any]:
    """The number of sparse layers a side, spread evenly (Switch Transformers)."""
    return {f"num_sparse_{side}_layers": layers[side].count("sparse") for side in ("encoder", "decoder")}
