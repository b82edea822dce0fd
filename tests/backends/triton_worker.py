"""Runs the Triton backend and the plain one on the same inputs; writes pairs of results. Started by its test."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.activations import ACT2FN

from hf_sparse_moe import SparseMoeEncoderConfig
from hf_sparse_moe.backends.triton_experts import triton_mm_experts_forward
from hf_sparse_moe.models.experts import SparseMoeExperts, make_experts


TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 37, 24, 40, 5, 2
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def experts(gated: bool = True, biased: bool = False, act: str = "silu", dropout: float = 0.0, count: int = EXPERTS):
    config = SparseMoeEncoderConfig(num_experts=count, num_experts_per_tok=1)
    config._experts_implementation = "eager"
    module = make_experts(config, HIDDEN, INTERMEDIATE, ACT2FN[act], dropout, gated=gated, biased=biased)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def routing(tokens: int = TOKENS, count: int = EXPERTS, top_k: int = TOP_K) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(tokens, count).argsort(-1)[:, :top_k], torch.rand(tokens, top_k)


def compare(module: SparseMoeExperts, index: torch.Tensor, weights: torch.Tensor, dtype=torch.float32, autocast=False):
    """Output and gradients of the Triton backend in `dtype`, and of the plain one in float32."""
    hidden, upstream = torch.randn(2, len(index), HIDDEN).to(dtype).unbind(0)
    results = []
    for ours in (True, False):
        module.to(dtype if ours and not autocast else torch.float32)
        x = hidden.detach().to(module.down_proj.dtype if ours else torch.float32).requires_grad_()
        w = weights.clone().requires_grad_()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and ours):
            output = triton_mm_experts_forward(module, x, index, w) if ours else module(x, index, w)
        leaves = [x, w, *module.parameters()]
        results.append([output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))])
    names = ["output", "hidden", "weights", *(name for name, _ in module.named_parameters())]
    return {name: (a.detach(), b.detach()) for name, a, b in zip(names, *results, strict=True)}


def transposed() -> Pairs:
    """An experts module that stores its weights the other way round gives what the same one gives."""
    module, (index, weights) = experts(), routing()
    hidden = torch.randn(TOKENS, HIDDEN)
    turned = experts()
    turned.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().transpose(1, 2).contiguous())
    turned.down_proj = nn.Parameter(module.down_proj.detach().transpose(1, 2).contiguous())
    turned.is_transposed = True
    ours = triton_mm_experts_forward(turned, hidden, index, weights)
    plain = module(hidden, index, weights)
    pairs = {"output": (ours, plain)}
    for name in ("gate_up_proj", "down_proj"):
        (mine,) = torch.autograd.grad(ours.square().sum(), getattr(turned, name), retain_graph=True)
        (theirs,) = torch.autograd.grad(plain.square().sum(), getattr(module, name), retain_graph=True)
        pairs[name] = (mine.transpose(1, 2), theirs)
    return {name: (a.detach(), b.detach()) for name, (a, b) in pairs.items()}


def sigmoid_gate() -> Pairs:
    """A gate of the architecture's own, which no kernel knows."""
    module = experts()

    class Experts(type(module)):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return (up + 1) * gate * (1.5 * gate).sigmoid()

    module.__class__ = Experts
    return compare(module, *routing())


def dropout() -> Pairs:
    """What is dropped in forward is what backward takes for dropped: the gradient is that of the same function."""
    module, (index, weights) = experts(dropout=0.5).train(), routing()
    hidden = torch.randn(TOKENS, HIDDEN)
    direction = torch.randn_like(module.down_proj)
    state = torch.get_rng_state()
    output = triton_mm_experts_forward(module, hidden, index, weights)
    (gradient,) = torch.autograd.grad(output.sum(), module.down_proj)
    # Linear in `down_proj`: with the same values dropped, the gradient along a direction is the exact difference.
    sums = []
    for step in (0.0, 1.0):
        torch.set_rng_state(state)
        with torch.no_grad():
            module.down_proj += step * direction
            sums.append(triton_mm_experts_forward(module, hidden, index, weights).sum())
    return {"down_proj": ((gradient * direction).sum(), sums[1] - sums[0])}


def expert_parallel() -> Pairs:
    """Indices of E and more belong to another rank: the outputs of two ranks sum to that of all experts."""
    module, (index, weights) = experts(), routing()
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    whole = module(hidden, index, weights)
    parts = []
    for first, count in ((0, 2), (2, 3)):
        rank = experts(count=count)
        rank.gate_up_proj = nn.Parameter(module.gate_up_proj.detach()[first : first + count])
        rank.down_proj = nn.Parameter(module.down_proj.detach()[first : first + count])
        rank._is_expert_parallel = True
        here = (index >= first) & (index < first + count)
        local = torch.where(here, index - first, count)
        parts.append(triton_mm_experts_forward(rank, hidden, local, weights * here))
    ours = parts[0] + parts[1]
    pairs = {"output": (ours, whole)}
    for name, total in (("hidden", hidden),):
        grads = [torch.autograd.grad(output.square().sum(), total, retain_graph=True)[0] for output in (ours, whole)]
        pairs[name] = (grads[0], grads[1])
    return {name: (a.detach(), b.detach()) for name, (a, b) in pairs.items()}


def mixtral() -> Pairs:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=64)
    model = MixtralForCausalLM(config)
    ids = torch.randint(0, 64, (2, 12))
    results = []
    for implementation in ("triton_mm", "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return {name: (gradient, results[1][name]) for name, gradient in results[0].items()}


def main() -> None:
    torch.manual_seed(0)
    everyone = torch.arange(EXPERTS).expand(TOKENS, EXPERTS)
    same = torch.full((TOKENS, 1), 3)
    few = torch.tensor([[1, 3]]).expand(TOKENS, 2)
    results = {
        "gated": compare(experts(), *routing()),
        "plain": compare(experts(gated=False, act="relu"), *routing()),
        "gated_biased": compare(experts(biased=True, act="gelu"), *routing()),
        "plain_biased": compare(experts(gated=False, biased=True, act="gelu_new"), *routing()),
        "transposed": transposed(),
        "sigmoid_gate": sigmoid_gate(),
        "dropout": dropout(),
        "bfloat16": compare(experts(act="gelu_pytorch_tanh"), *routing(), dtype=torch.bfloat16),
        "float16": compare(experts(), *routing(), dtype=torch.float16),
        "autocast": compare(experts(), *routing(), autocast=True),
        "one_expert_takes_all": compare(experts(), same, torch.rand(TOKENS, 1)),
        "empty_experts": compare(experts(), few, torch.rand(TOKENS, 2)),
        "one_expert": compare(experts(count=1), torch.zeros(TOKENS, 1, dtype=torch.long), torch.rand(TOKENS, 1)),
        "all_experts": compare(experts(), everyone, torch.rand(TOKENS, EXPERTS)),
        "one_token": compare(experts(), *routing(1)),
        "no_tokens": {"output": (triton_mm_experts_forward(experts(), torch.randn(0, HIDDEN), *routing(0)).detach(),)},
        "expert_parallel": expert_parallel(),
        "mixtral": mixtral(),
    }
    torch.save(results, sys.argv[1])


if __name__ == "__main__":
    main()
