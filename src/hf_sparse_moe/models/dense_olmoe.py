"""
OLMoE with one dense feed-forward a layer: the sibling that OLMoE has not in transformers.

It normalises before each sub-layer, as Llama does, and norms queries and keys over all heads, as OLMo 2 does. It is
registered with the Auto classes when a config asks for it.
"""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeMLP, OlmoeModel


@strict
class DenseOlmoeConfig(OlmoeConfig):
    """[`OlmoeConfig`] without experts; `intermediate_size` is that of the feed-forward."""

    model_type = "dense_olmoe"

    num_experts: int = 1
    num_experts_per_tok: int = 1


class DenseOlmoeModel(OlmoeModel):
    config_class = DenseOlmoeConfig

    def __init__(self, config: DenseOlmoeConfig):
        super().__init__(config)
        _use_dense_layers(self, config)


class DenseOlmoeForCausalLM(OlmoeForCausalLM):
    config_class = DenseOlmoeConfig

    def __init__(self, config: DenseOlmoeConfig):
        super().__init__(config)
        _use_dense_layers(self.model, config)


def _use_dense_layers(model: OlmoeModel, config: DenseOlmoeConfig) -> None:
    for layer in model.layers:
        layer.mlp = OlmoeMLP(config)
    model.post_init()


AutoConfig.register("dense_olmoe", DenseOlmoeConfig, exist_ok=True)
AutoModel.register(DenseOlmoeConfig, DenseOlmoeModel, exist_ok=True)
AutoModelForCausalLM.register(DenseOlmoeConfig, DenseOlmoeForCausalLM, exist_ok=True)
