"""Tiny experts of every kind that transformers' interface knows, stock and ours, with inputs."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_sparse_moe.models.experts import make_experts
from tiny_models import tiny_config


class LearnedActivation(nn.Module):
    """An activation with a parameter, as XIELU has."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x * self.slope) * x


def _sizes(hidden: int, intermediate: int, **fields: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "moe_intermediate_size": intermediate, **fields}


def _stock(experts_class: type, config_class: type, experts_field: str):
    def make(H: int, I: int, E: int) -> nn.Module:  # noqa: E741
        return experts_class(config_class(**_sizes(H, I, **{experts_field: E})))

    return make


def _nemotron(H: int, I: int, E: int) -> nn.Module:  # noqa: E741
    return NemotronHExperts(hf.NemotronHConfig(**_sizes(H, I), n_routed_experts=E))


def _aria(H: int, I: int, E: int) -> nn.Module:  # noqa: E741
    fields = {"num_attention_heads": 1, "head_dim": 2}  # of the attention, which nothing here has
    return AriaExperts(hf.AriaTextConfig(hidden_size=H, intermediate_size=I, moe_num_experts=E, **fields))


def _ours(gated: bool, biased: bool, activation: str = "gelu", dropout: float = 0.0):
    def make(H: int, I: int, E: int) -> nn.Module:  # noqa: E741
        act_fn = LearnedActivation() if activation == "learned" else ACT2FN[activation]
        config = tiny_config("encoder", num_experts=E, num_experts_per_tok=1)
        return make_experts(config, H, I, act_fn, dropout, gated=gated, biased=biased)

    return make


KINDS = {
    "mixtral": _stock(MixtralExperts, hf.MixtralConfig, "num_local_experts"),
    "qwen3_moe": _stock(Qwen3MoeExperts, hf.Qwen3MoeConfig, "num_experts"),
    "olmoe": _stock(OlmoeExperts, hf.OlmoeConfig, "num_experts"),
    "gpt_oss, interleaved, transposed, biased": _stock(GptOssExperts, hf.GptOssConfig, "num_local_experts"),
    "nemotron_h, without gate": _nemotron,
    "aria, transposed": _aria,
    "ours, gated": _ours(True, False),
    "ours, gated, biased": _ours(True, True, "silu"),
    "ours, plain": _ours(False, False, "relu"),
    "ours, plain, biased": _ours(False, True),
    "ours, learned activation": _ours(False, True, "learned"),
    "ours, learned gate": _ours(True, False, "learned"),
}


def make(kind: str, implementation: str, dtype: torch.dtype = torch.float32, H=16, I=24, E=5) -> nn.Module:  # noqa: E741
    experts = KINDS[kind](H, I, E) if kind in KINDS else _ours(kind == "gated dropout", False, "silu", 0.5)(H, I, E)
    experts.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(0)
    for name, parameter in experts.named_parameters():
        if name.partition(".")[0] != "act_fn":
            nn.init.normal_(parameter, std=0.25, generator=generator)
    return experts.to(dtype).eval()


def inputs(T: int, K: int, E: int = 5, H: int = 16, dtype: torch.dtype = torch.float32, seed: int = 1):
    """Hidden states, the K experts of each token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(T, E, generator=generator).argsort(dim=-1)[:, :K]
    weights = torch.rand(T, K, generator=generator).to(dtype).requires_grad_()
    return hidden, index, weights
