"""The products of adapted experts equal, gradients too, those of a loop over tokens with the update added to W."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.autograd import gradcheck
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import hf_sparse_moe.experts.function as function_module
from hf_sparse_moe.adapters.low_rank_experts import LowRank, low_rank_experts
from hf_sparse_moe.models.experts import make_experts


HIDDEN, INNER, EXPERTS, TOP_K, RANK = 16, 24, 5, 2, 3
KINDS = ("mixtral", "gpt_oss", "ours_plain_biased", "ours_gated_biased")


def make(kind: str, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    if kind.startswith("ours"):
        config = hf.MixtralConfig(num_local_experts=EXPERTS)
        module = make_experts(config, HIDDEN, INNER, nn.GELU(), 0.0, gated="gated" in kind, biased=True)
    else:
        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS}
        module = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts}[kind](
            {"mixtral": hf.MixtralConfig, "gpt_oss": hf.GptOssConfig}[kind](**sizes)
        )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    module = module.to(dtype).requires_grad_(False).eval()
    module.up_name = "gate_up_proj" if module.has_gate else "up_proj"
    return module


def adapter(experts: nn.Module, name: str, chosen=tuple(range(EXPERTS)), columns=slice(None), **fields) -> LowRank:
    weight = getattr(experts, name)
    out, features = weight.shape[:0:-1] if experts.is_transposed else weight.shape[1:]
    out = len(range(*columns.indices(out)))
    a = torch.randn(len(chosen), RANK, features, dtype=weight.dtype).mul_(0.3).requires_grad_()
    b = torch.randn(len(chosen), RANK, out, dtype=weight.dtype).mul_(0.3).requires_grad_()
    return LowRank(a, b, 0.7, chosen, columns, **fields)


def tokens_of(count: int = 11, dtype=torch.float64):
    hidden = torch.randn(count, HIDDEN, dtype=dtype, requires_grad=True)
    weights, index = torch.randn(count, EXPERTS).softmax(-1).topk(TOP_K)
    return hidden, index, weights.to(dtype).detach().requires_grad_()


def updated(experts: nn.Module, name: str, expert: int, adapters) -> torch.Tensor:
    """`(out, in)`: W_e + s B_e A_e."""
    module = experts
    weight = getattr(module, name)[expert]
    weight = (weight.t() if module.is_transposed else weight).clone()
    for one in adapters:
        if expert in one.experts:
            slot = one.experts.index(expert)
            weight[one.columns] = weight[one.columns] + one.scale * one.b[slot].t() @ one.a[slot]
    return weight


def oracle(experts: nn.Module, hidden, index, weights, up, down) -> torch.Tensor:
    """Token after token."""
    module, rows = experts, []
    for token in range(len(hidden)):
        row = torch.zeros(HIDDEN, dtype=hidden.dtype)
        for slot, expert in enumerate(index[token].tolist()):
            if expert >= EXPERTS:
                continue
            up_bias = getattr(module, f"{experts.up_name}_bias")[expert] if module.has_bias else 0
            down_bias = module.down_proj_bias[expert] if module.has_bias else 0
            inner = updated(experts, experts.up_name, expert, up) @ hidden[token] + up_bias
            inner = (module._apply_gate if module.has_gate else module.act_fn)(inner[None])[0]
            result = updated(experts, "down_proj", expert, down) @ inner + down_bias
            row = row + weights[token, slot] * result
        rows.append(row)
    return torch.stack(rows)


def with_gradients(function, experts, tokens, up, down):
    hidden, index, weights = tokens
    factors = [factor for one in (*up, *down) for factor in (one.a, one.b)]
    output = function(experts, hidden, index, weights, up, down)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad(output, [hidden, weights, *factors], grad)]


def grouped_in_float32(experts, hidden, index, weights, up, down):
    """As on an accelerator, where the host does not wait for the routing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function_module, "_is_accelerator", lambda tensor: True)
        return low_rank_experts(experts, hidden, index, weights, up, down)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [tuple(range(EXPERTS)), (1, 4)])
def test_forward_and_gradients_equal_the_oracle(kind, chosen):
    experts, tokens = make(kind), tokens_of()
    up = [adapter(experts, experts.up_name, chosen), adapter(experts, experts.up_name)]
    down = [adapter(experts, "down_proj", chosen)]
    ours = with_gradients(low_rank_experts, experts, tokens, up, down)
    for value, expected in zip(ours, with_gradients(oracle, experts, tokens, up, down), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("chosen", [tuple(range(EXPERTS)), (1, 4)])
def test_grouped_products_equal_the_oracle(kind, chosen):
    experts, tokens = make(kind, torch.float32), tokens_of(dtype=torch.float32)
    half = slice(0, INNER) if kind == "mixtral" else slice(0, None, 2)
    up, down = [adapter(experts, experts.up_name, chosen, half)], [adapter(experts, "down_proj", chosen)]
    ours = with_gradients(grouped_in_float32, experts, tokens, up, down)
    for value, expected in zip(ours, with_gradients(oracle, experts, tokens, up, down), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def shared_out(experts, hidden, index, weights, up, down):
    """As two ranks compute it, each with experts and adapters of its own, and a weight of 0 for the other's."""
    total = 0
    for start, count in ((0, 2), (2, 3)):
        mine = copy.deepcopy(experts)
        mine.num_experts = count
        for parameter in mine.parameters():
            parameter.data = parameter.data[start : start + count]
        elsewhere = (index < start) | (index >= start + count)
        places = (index - start).masked_fill(elsewhere, count), weights.masked_fill(elsewhere, 0)
        adapters = ([one.of_experts(start, count) for one in side] for side in (up, down))
        total = total + low_rank_experts(mine, hidden, *places, *adapters)
    return total


@pytest.mark.parametrize("chosen", [tuple(range(EXPERTS)), (3, 4)])
def test_parts_of_the_experts_add_up(chosen):
    experts, tokens = make("ours_gated_biased"), tokens_of()
    up, down = [adapter(experts, experts.up_name, chosen)], [adapter(experts, "down_proj", chosen)]
    ours = with_gradients(shared_out, experts, tokens, up, down)
    for value, expected in zip(ours, with_gradients(oracle, experts, tokens, up, down), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("columns", [slice(0, INNER), slice(INNER, None), slice(1, None, 2)])
def test_one_half_of_a_packed_projection(columns):
    experts, tokens = make("mixtral"), tokens_of()
    up = [adapter(experts, experts.up_name, columns=columns)]
    ours = with_gradients(low_rank_experts, experts, tokens, up, [])
    for value, expected in zip(ours, with_gradients(oracle, experts, tokens, up, []), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def routings():
    every = torch.arange(EXPERTS).expand(7, EXPERTS)
    return {
        "all tokens to one expert": torch.full((7, 1), 3),
        "k = E": every,
        "tokens of another rank": torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [2, 1]]),
        "no tokens": torch.empty(0, 2, dtype=torch.long),
        "one token": torch.tensor([[4, 0]]),
    }


@pytest.mark.parametrize("function", [low_rank_experts, grouped_in_float32], ids=["loop", "grouped"])
@pytest.mark.parametrize("routing", routings())
def test_odd_routings(routing, function):
    index = routings()[routing]
    experts = make("gpt_oss", torch.float32)
    hidden = torch.randn(2 * len(index), HIDDEN, requires_grad=True)[::2]  # not contiguous
    weights = torch.rand(index.shape).masked_fill(index >= EXPERTS, 0.0).requires_grad_()
    up, down = [adapter(experts, experts.up_name)], [adapter(experts, "down_proj")]
    tokens = hidden, index, weights
    if not len(index):
        assert function(experts, *tokens, up, down).shape == (0, HIDDEN)
        return
    ours = with_gradients(function, experts, tokens, up, down)
    for value, expected in zip(ours, with_gradients(oracle, experts, tokens, up, down), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_gradients_agree_with_finite_differences():
    experts, (hidden, index, weights) = make("ours_gated_biased"), tokens_of(2)
    up, down = adapter(experts, experts.up_name), adapter(experts, "down_proj", (0, 2))

    def function(hidden, weights, *factors):
        a, b, c, d = factors
        one, two = LowRank(a, b, 0.7, up.experts, slice(None)), LowRank(c, d, 0.7, down.experts, slice(None))
        return low_rank_experts(experts, hidden, index, weights, [one], [two])

    assert gradcheck(function, (hidden, weights, up.a, up.b, down.a, down.b))


def test_bfloat16_is_as_near_to_the_oracle_as_bfloat16_allows():
    exact = make("mixtral", torch.float32)
    experts = make("mixtral", torch.bfloat16)
    hidden, index, weights = tokens_of(200, torch.float32)
    up, down = [adapter(exact, "gate_up_proj")], [adapter(exact, "down_proj")]
    expected = oracle(exact, hidden, index, weights, up, down)
    output = low_rank_experts(experts, hidden.bfloat16(), index, weights.bfloat16(), up, down)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() / expected.norm() < 0.02


def computed_dtypes(experts: nn.Module, function) -> set[torch.dtype]:
    """The dtypes that the activation sees."""
    seen = set()
    experts.act_fn.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    function()
    return seen


@pytest.mark.parametrize("autocast", [False, True])
def test_experts_and_adapters_compute_in_the_dtype_of_autocast(autocast):
    experts = make("mixtral", torch.float32)
    hidden, index, weights = tokens_of(dtype=torch.float32)
    up, down = [adapter(experts, "gate_up_proj")], [adapter(experts, "down_proj")]
    gradients = []

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = low_rank_experts(experts, hidden, index, weights, up, down)
        gradients.extend(torch.autograd.grad(output.sum(), [up[0].a, hidden]))

    assert computed_dtypes(experts, step) == {torch.bfloat16 if autocast else torch.float32}
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


class One(nn.Module):
    def forward(self, gate):
        return torch.ones_like(gate)


@pytest.mark.slow
def test_dropout_keeps_the_mean_and_its_gradient_uses_the_same_mask():
    experts, (hidden, index, weights) = make("mixtral"), tokens_of(3)
    plain = [adapter(experts, "gate_up_proj")]
    dropping = [LowRank(plain[0].a, plain[0].b, 0.7, plain[0].experts, slice(None), dropout=0.5)]

    def run(adapters, seed=0):
        torch.manual_seed(seed)
        return low_rank_experts(experts, hidden, index, weights, adapters, [])

    assert not torch.equal(run(dropping, 0), run(dropping, 1))
    assert torch.equal(run(dropping, 0), run(dropping, 0))

    def seeded(hidden, weights, a, b):
        torch.manual_seed(0)
        one = LowRank(a, b, 0.7, plain[0].experts, slice(None), dropout=0.5)
        return low_rank_experts(experts, hidden, index, weights, [one], [])

    assert gradcheck(seeded, (hidden, weights, plain[0].a, plain[0].b))
    # With a gate of one the output is linear in the mask, so that its mean over masks is what no dropout gives.
    linear = make("mixtral")
    linear.act_fn = One()
    with torch.no_grad():
        mean = sum(low_rank_experts(linear, hidden, index, weights, dropping, []) for _ in range(400)) / 400
        exact = low_rank_experts(linear, hidden, index, weights, plain, [])
    assert (mean - exact).norm() / exact.norm() < 0.1


def test_dropout_of_the_experts_themselves():
    torch.manual_seed(0)
    config = hf.MixtralConfig(num_local_experts=EXPERTS)
    module = make_experts(config, HIDDEN, INNER, nn.SiLU(), 0.5, gated=True, biased=False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts = module.double().requires_grad_(False).train()
    hidden, index, weights = tokens_of(2)
    up, down = adapter(experts, "gate_up_proj"), adapter(experts, "down_proj")

    def function(hidden, weights, a, b):
        torch.manual_seed(0)
        return low_rank_experts(experts, hidden, index, weights, [LowRank(a, b, 0.7, up.experts, slice(None))], [down])

    assert gradcheck(function, (hidden, weights, up.a, up.b))


def test_only_what_is_wanted_gets_a_gradient():
    experts, (hidden, index, weights) = make("mixtral"), tokens_of()
    up = [adapter(experts, "gate_up_proj")]
    output = low_rank_experts(experts, hidden.detach(), index, weights.detach(), up, [])
    output.sum().backward()
    assert up[0].a.grad.abs().max() > 0
    assert hidden.grad is None
    assert weights.grad is None
    assert experts.gate_up_proj.grad is None
