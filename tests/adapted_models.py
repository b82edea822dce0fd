"""Mixtures with adapters for the tests: stock ones, and adapters that are far from their zero start."""

import copy

import torch
import transformers as hf
from peft import get_peft_model
from torch import nn

from hf_sparse_moe import expert_lora_config
from tiny_models import VOCAB_SIZE, enlarge_weights


_SIZES = {
    "vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
STOCK = {
    "mixtral": hf.MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": hf.Qwen3MoeConfig(
        **_SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "olmoe": hf.OlmoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2),
    # transposed, biased and interleaved
    "gpt_oss": hf.GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}


def stock_mixture(name: str) -> hf.PreTrainedModel:
    """A mixture of transformers in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    return enlarge_weights(hf.AutoModelForCausalLM.from_config(copy.deepcopy(STOCK[name]))).eval()


@torch.no_grad()
def shake(peft_model: nn.Module, adapter: str = "default", seed: int = 0) -> nn.Module:
    """Redraw the factors of an adapter, so that it matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return peft_model


def adapted(model: hf.PreTrainedModel, **arguments) -> nn.Module:
    """`model` with a shaken adapter, in evaluation mode."""
    arguments = {"r": 2, "lora_alpha": 4, **arguments}
    return shake(get_peft_model(model, expert_lora_config(model, **arguments))).eval()


def logits_of(model: nn.Module, inputs: dict, **arguments) -> torch.Tensor:
    """Without gradients, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**inputs, **arguments).logits
