"""Every experts backend equals the per-token oracle, output and gradients. T tokens, E experts, K experts a token."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_sparse_moe.models.feed_forward import find_feed_forwards
from hf_sparse_moe.models.moe_block import SparseMoeBlock
from models.oracle import block_oracle
from pairwise import pairwise
from tiny_models import BACKBONES, enlarge_weights, tiny_config, tiny_inputs, tiny_sparse


BACKENDS = ("eager", "grouped_mm", "batched_mm", "sparse_moe")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest value
HIDDEN, INTERMEDIATE = 16, 24

ROUTINGS = {
    "softmax": {},
    "softmax, not normalised": {"norm_topk_prob": False},
    "sigmoid, scaled": {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
    "sigmoid, not normalised": {"scoring_func": "sigmoid", "norm_topk_prob": False},
    "shared experts": {"num_shared_experts": 2, "routed_scaling_factor": 0.5},
}
SHAPES = {
    "K = 1": ({"num_experts_per_tok": 1, "norm_topk_prob": False}, 9),
    "K = E": ({"num_experts_per_tok": 4}, 9),
    "E = 1": ({"num_experts": 1, "num_experts_per_tok": 1}, 9),
    "one token": ({}, 1),
    "experts without a token": ({"num_experts": 32}, 3),
    "own intermediate size": ({"moe_intermediate_size": 8}, 9),
}


class Gated(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=bias)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=bias)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=bias)
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Plain(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, INTERMEDIATE, bias=bias)
        self.fc2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=bias)
        self.act = ACT2FN["gelu"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


def make_block(backend: str, feed_forward: nn.Module, dtype: torch.dtype = torch.float32, **fields) -> SparseMoeBlock:
    config = tiny_config("encoder", **fields)
    config._experts_implementation = backend
    block = SparseMoeBlock(config, find_feed_forwards(feed_forward)[0], side="encoder")
    return enlarge_weights(block).to(dtype)


def hidden_states(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def assert_equals_oracle(block: SparseMoeBlock, x: torch.Tensor) -> None:
    """The output, the gradient of the input and that of each parameter."""
    parameters = dict(block.named_parameters())
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for output in (block(x), block_oracle(block, x)):
        gradients = torch.autograd.grad((output * direction).sum(), [x, *parameters.values()])
        results.append([output, *gradients])
    for name, result, expected in zip(["output", "input", *parameters], *results, strict=True):
        assert result.dtype == x.dtype, name
        scale = expected.abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(
            result.double(),
            expected.double(),
            rtol=0,
            atol=TOLERANCE[x.dtype] * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pairwise("backend,layout,bias,routing,dtype", BACKENDS, [Gated, Plain], [True, False], ROUTINGS, TOLERANCE)
def test_backend_equals_oracle(backend, layout, bias, routing, dtype):
    block = make_block(backend, layout(bias), dtype, **ROUTINGS[routing])
    assert_equals_oracle(block, hidden_states(9, dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_oracle_at_the_edges(backend, shape):
    fields, tokens = SHAPES[shape]
    assert_equals_oracle(make_block(backend, Gated(bias=True), **fields), hidden_states(tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_on_one_expert(backend):
    block = make_block(backend, Gated(bias=False), num_experts_per_tok=1, norm_topk_prob=False)
    x = hidden_states(9).abs().detach().requires_grad_()
    with torch.no_grad():
        block.gate.weight.copy_(block.gate.weight.abs() * torch.tensor([-1.0, -1.0, 1.0, -1.0])[:, None])
    assert block.gate(x)[2].unique().tolist() == [2]
    assert_equals_oracle(block, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_need_not_be_contiguous(backend):
    block = make_block(backend, Plain(bias=True))
    x = hidden_states(12).detach().reshape(3, 4, HIDDEN).transpose(0, 1).requires_grad_()
    assert not x.is_contiguous()
    assert_equals_oracle(block, x)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_model_computes_the_same_with_every_backend(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, pads=2)
    results = {}
    for backend in BACKENDS:
        model.set_experts_implementation(backend)
        assert {block.experts.config._experts_implementation for block in model.sparse_blocks} == {backend}
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        results[backend] = {"logits": outputs.logits, **gradients}
    for backend in BACKENDS[1:]:
        for key, expected in results["eager"].items():
            atol = 2e-5 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(results[backend][key], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_default_backend_is_ours(name):
    assert tiny_sparse(name).config._experts_implementation == "sparse_moe"


@pytest.mark.parametrize("name", ["encoder", "decoder", "encoder_decoder"])
def test_from_config_takes_a_backend_and_refuses_an_unknown_one(name):
    model = tiny_sparse(name)
    chosen = type(model)._from_config(model.config, experts_implementation="batched_mm")
    assert chosen.config._experts_implementation == "batched_mm"
    with pytest.raises((ValueError, KeyError), match="magic"):
        model.set_experts_implementation("magic")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [Gated, Plain])
def test_expert_dropout_drops_in_training_only(backend, layout):
    block = make_block(backend, layout(bias=False), expert_dropout=0.5)
    x = hidden_states(9)
    expected = block_oracle(block.eval(), x).float()
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    block.train()
    torch.manual_seed(0)
    mean = torch.stack([block(x) for _ in range(400)]).mean(dim=0)
    assert not torch.allclose(block(x), expected, atol=1e-2)
    assert (mean - expected).abs().mean() < 0.15 * expected.abs().mean()  # dropout keeps the expected value
