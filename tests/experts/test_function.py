"""The CPU backend equals the per-token oracle, output and gradients, and keeps and computes no more than it must."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hf_sparse_moe.experts.function as function_module
from experts.experts_modules import KINDS, inputs, make
from experts.experts_oracle import experts_oracle
from hf_sparse_moe.experts.few import few_rows_forward
from hf_sparse_moe.experts.segments import padded_lengths
from pairwise import pairwise


BACKENDS = ("sparse_moe", "sparse_moe_recompute")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the largest
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


class Products(TorchDispatchMode):
    """Records the dtype of every matrix product, backward included."""

    def __init__(self):
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def results(output, experts, tensors) -> dict[str, torch.Tensor]:
    """The output and the gradients of the inputs and of every parameter."""
    wanted = {"input": tensors[0], "weights": tensors[2], **dict(experts.named_parameters())}
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    gradients = torch.autograd.grad(output, list(wanted.values()), direction)
    return {"output": output, **dict(zip(wanted, gradients, strict=True))}


def assert_equals_oracle(experts, tensors, tolerance: float) -> None:
    found = results(experts(*tensors), experts, tensors)
    expected = results(experts_oracle(experts, *tensors), experts, tensors)
    for name, value in expected.items():
        assert found[name].dtype == tensors[0].dtype if name == "output" else found[name].shape == value.shape
        scale = max(value.abs().max().item(), 1e-3) if value.numel() else 1.0
        if name.startswith("act_fn") and tolerance > 1e-3:
            scale *= 30  # one number, the sum over all rows and features of terms that cancel
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pairwise("backend,kind,dtype", BACKENDS, KINDS, TOLERANCE)
def test_equals_oracle(backend, kind, dtype):
    experts, tensors = make(kind, backend, dtype), inputs(90, 2, dtype=dtype)
    counts = torch.bincount(tensors[1].flatten()).numpy()
    assert (padded_lengths(counts) > counts).any()  # so that half precision has rows that only fill up
    assert_equals_oracle(experts, tensors, TOLERANCE[dtype])


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """One batch, grouped products, and a host that does not wait for the routing: on the CPU's own `grouped_mm`."""
    monkeypatch.setattr(function_module, "_is_accelerator", lambda tensor: True)
    refused = AssertionError("the host waited")
    monkeypatch.setattr(function_module, "find_segments", lambda *_, **__: (_ for _ in ()).throw(refused))


@pairwise("backend,kind,dtype", BACKENDS, KINDS, [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_products_equal_oracle(as_on_an_accelerator, backend, kind, dtype):
    assert_equals_oracle(make(kind, backend, dtype), inputs(90, 2, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["gated dropout", "plain dropout"])
def test_grouped_products_drop_in_backward_what_they_dropped(as_on_an_accelerator, kind):
    experts, tensors = make(kind, "sparse_moe").train(), inputs(40, 2)
    torch.manual_seed(3)
    dropped = [experts.act_fn, experts.dropout][kind == "gated dropout"]
    masks = []
    hook = (dropped.dropout if kind == "plain dropout" else dropped).register_forward_hook(
        lambda module, args, output: masks.append(output.detach() != 0)
    )
    experts(*tensors).sum().backward()
    hook.remove()
    assert len(masks) == 2
    assert torch.equal(*masks)


def test_grouped_products_skip_the_pairs_of_another_rank(as_on_an_accelerator):
    experts = make("ours, learned activation", "sparse_moe")
    hidden, index, weights = inputs(20, 3, E=6)  # 5 is not among 0 to 4
    assert_equals_oracle(experts, (hidden, index, weights), 1e-5)


def test_grouped_products_compute_in_the_dtype_of_autocast(as_on_an_accelerator):
    experts, tensors = make("mixtral", "sparse_moe"), inputs(40, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(*tensors)
    expected = results(experts_oracle(experts, *tensors), experts, tensors)
    for name, value in results(output, experts, tensors).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(), expected[name].double(), rtol=0, atol=3e-2 * expected[name].abs().max().item()
        )


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_equals_oracle_whatever_the_shapes(data):
    num_experts = data.draw(st.integers(1, 9), label="E")
    tokens, top_k = data.draw(st.integers(0, 12), label="T"), data.draw(st.integers(1, num_experts), label="K")
    hidden, intermediate = (data.draw(st.integers(1, 20), label=name) for name in "HI")
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), label="dtype")
    kind = data.draw(st.sampled_from(list(KINDS)), label="kind")
    experts = make(kind, data.draw(st.sampled_from(BACKENDS)), dtype, hidden, intermediate, num_experts)
    tensors = inputs(tokens, top_k, num_experts, hidden, dtype, seed=data.draw(st.integers(0, 9)))
    # Small sizes leave little to average over, so that a sum's rounding shows more.
    assert_equals_oracle(experts, tensors, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("batch_bytes", [1, 1000])
def test_equals_oracle_however_the_rows_are_batched(monkeypatch, batch_bytes):
    monkeypatch.setattr(function_module, "BATCH_BYTES", batch_bytes)
    assert_equals_oracle(make("ours, learned gate", "sparse_moe"), inputs(40, 2), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    experts = make(kind, "sparse_moe", torch.float64, H=4, I=3, E=3)
    hidden, index, weights = inputs(5, 2, 3, 4, torch.float64)

    def call(hidden, weights, *_):
        return experts(hidden, index, weights)

    assert torch.autograd.gradcheck(call, (hidden, weights, *experts.parameters()))


@pytest.mark.parametrize("kind", ["gated dropout", "plain dropout"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_drops_what_forward_dropped(monkeypatch, backend, kind):
    monkeypatch.setattr(function_module, "BATCH_BYTES", 100)  # several batches, each with masks of its own
    experts = make(kind, backend, torch.float64, H=4, I=6, E=3).train()
    hidden, index, weights = inputs(6, 2, 3, 4, torch.float64)

    def call(hidden, weights, *_):
        torch.manual_seed(3)
        return experts(hidden, index, weights)

    assert not torch.allclose(call(hidden, weights), experts.eval()(hidden, index, weights))
    experts.train()
    assert torch.autograd.gradcheck(call, (hidden, weights, *experts.parameters()))


def test_backward_leaves_the_random_numbers_alone():
    experts = make("plain dropout", "sparse_moe").train()
    tensors = inputs(6, 2)
    output = experts(*tensors)
    state = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


UNEVEN = {
    "all on one": [[2]] * 41,
    "empty experts": [[0], [4]] * 5,
    "k = E": [[4, 3, 2, 1, 0]] * 3,
    "one twice": [[1, 1], [3, 0]],
}


@pytest.mark.parametrize("index", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uneven_loads(index, dtype):
    hidden, _, weights = inputs(len(index), len(index[0]), dtype=dtype)
    assert_equals_oracle(
        make("mixtral", "sparse_moe", dtype), (hidden, torch.tensor(index), weights), TOLERANCE[dtype]
    )


def test_arguments_need_not_be_contiguous():
    hidden, index, weights = inputs(12, 2)
    strided = [t.detach().t().contiguous().t() for t in (hidden, index, weights)]
    strided[0].requires_grad_()
    strided[2].requires_grad_()
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_equals_oracle(make("mixtral", "sparse_moe"), strided, 1e-5)


def test_a_gradient_need_not_be_contiguous():
    experts, tensors = make("mixtral", "sparse_moe"), inputs(12, 2)
    (found,) = torch.autograd.grad(experts(*tensors).sum(), tensors[0])  # an expanded scalar
    (expected,) = torch.autograd.grad(experts_oracle(experts, *tensors).sum(), tensors[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes_compute_in_that_of_the_experts(hidden_dtype, weights_dtype, dtype):
    experts = make("mixtral", "sparse_moe", dtype)
    hidden, index, _ = inputs(20, 2, dtype=hidden_dtype)
    tensors = hidden, index, inputs(20, 2, dtype=weights_dtype)[2]
    with Products() as products:
        assert_equals_oracle(experts, tensors, TOLERANCE[torch.bfloat16])
    assert {d for d in products.dtypes if d != torch.float64} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend, kind):
    experts, tensors = make(kind, backend), inputs(40, 2)
    with Products() as products:
        with torch.autocast("cpu", torch.bfloat16):
            output = experts(*tensors)
        assert set(products.dtypes) == {torch.bfloat16}
        found = results(output, experts, tensors)
    assert set(products.dtypes) == {torch.bfloat16}
    expected = results(experts_oracle(experts, *tensors), experts, tensors)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        atol = value.abs().max().item() * (0.3 if name.startswith("act_fn") else 3e-2)
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_without_gradient(kind, dtype):
    """As each step of `generate` has them: the weights of experts that they do not choose may hold anything."""
    for tokens in (1, 3, 40):
        hidden, index, weights = inputs(tokens, 2, dtype=dtype)
        experts = make(kind, "sparse_moe", dtype).eval()
        unchosen = [expert for expert in range(5) if expert not in index]
        with torch.no_grad():
            for name, parameter in experts.named_parameters():
                if not name.startswith("act_fn"):
                    parameter[unchosen] = torch.nan
            found, expected = experts(hidden, index, weights), experts_oracle(experts, hidden, index, weights)
        atol = TOLERANCE[dtype] * expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


def test_few_tokens_without_gradient_heed_autocast_and_odd_sizes():
    hidden, index, weights = inputs(3, 2, H=18)
    experts = make("mixtral", "sparse_moe", H=18, I=23).eval()  # rows of 72 and 92 bytes
    with torch.no_grad():
        torch.testing.assert_close(
            experts(hidden, index, weights), experts_oracle(experts, hidden, index, weights).float()
        )
        with Products() as products, torch.autocast("cpu", torch.bfloat16):
            make("mixtral", "sparse_moe").eval()(*inputs(3, 2))
    assert set(products.dtypes) == {torch.bfloat16}


def test_autocast_leaves_float64_alone():
    experts, tensors = make("mixtral", "sparse_moe", torch.float64), inputs(9, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_oracle(experts, tensors, 1e-12)


def test_only_the_experts_hit_are_touched():
    experts = make("ours, gated, biased", "sparse_moe", E=8)
    hit = [2, 5]
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[[e for e in range(8) if e not in hit]] = torch.nan
    hidden, _, weights = inputs(6, 2)
    found = results(experts(hidden, torch.tensor([hit] * 6), weights), experts, (hidden, None, weights))
    for name, value in found.items():
        assert value.isfinite().all(), name
        if name not in ("output", "input", "weights"):
            assert (value.flatten(1).abs().sum(1) > 0).nonzero().flatten().tolist() == hit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_that_is_not_finite_reaches_its_own_experts_only(dtype):
    experts = make("mixtral", "sparse_moe", dtype)
    hidden, _, weights = inputs(44, 1, dtype=dtype)
    index = torch.tensor([[0]] * 3 + [[1]] * 41)
    with torch.no_grad():
        hidden[0] = torch.nan
    found = results(experts(hidden, index, weights), experts, (hidden, index, weights))
    assert found["output"][1:].isfinite().all()
    assert found["input"][1:].isfinite().all()
    assert found["down_proj"][1:].isfinite().all()
    assert found["gate_up_proj"][0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_of_another_expert_parallel_rank_add_nothing(dtype):
    experts = make("ours, gated, biased", "sparse_moe", dtype)
    experts._is_expert_parallel = True
    hidden, index, weights = inputs(20, 3, E=6, dtype=dtype)  # 5 is not among 0 to 4
    index[3] = 5
    assert_equals_oracle(experts, (hidden, index, weights), TOLERANCE[dtype])
    assert (torch.autograd.grad(experts(hidden, index, weights).sum(), weights)[0][index == 5] == 0).all()


@pytest.mark.parametrize("expert", [5, -1])
def test_an_expert_that_does_not_exist_is_refused(expert):
    hidden, index, weights = inputs(4, 2)
    index[2, 1] = expert
    for backend, learns in (("sparse_moe", True), ("sparse_moe", True), ("sparse_moe", False)):
        with (
            torch.set_grad_enabled(learns),
            pytest.raises(ValueError, match=rf"`top_k_index` names expert {expert}, but the experts are 0 to 4"),
        ):
            make("mixtral", backend).train(learns)(hidden, index, weights)


def kept_bytes(experts, tensors) -> int:
    """What autograd keeps of the call, beyond its arguments and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (*tensors, *experts.parameters())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = experts(*tensors)
    assert output.requires_grad
    return sum(size for storage, size in kept.items() if storage not in known)


@pytest.mark.parametrize("kind", ["ours, plain", "mixtral", "ours, gated, biased"])
def test_keeps_the_first_projection_or_nothing(kind):
    tensors = inputs(40, 2)
    rows, width = 40 * 2, 24 * (1 if kind == "ours, plain" else 2)
    assert kept_bytes(make(kind, "sparse_moe"), tensors) == rows * width * 4
    assert kept_bytes(make(kind, "sparse_moe_recompute"), tensors) == 0


def test_frozen_parameters_cost_no_product():
    """Of the 6 products an expert, 2 are the weights' gradients, 1 the input's, and 1 reaches the router and input."""
    hidden, index, weights = inputs(40, 2)
    experts = make("mixtral", "sparse_moe")

    def count(backward_of) -> int:
        with Products() as products:
            output = experts(hidden, index, weights)
            torch.autograd.grad(output.sum(), [t for t in backward_of if t.requires_grad])
        return len(products.dtypes) // 5

    assert count([hidden, weights, *experts.parameters()]) == 6
    assert all(g is not None for g in torch.autograd.grad(experts(hidden, index, weights).sum(), [hidden, weights]))
    experts.requires_grad_(False)
    assert count([hidden, weights]) == 4
    hidden.requires_grad_(False)
    assert count([weights]) == 3  # as where the router alone learns
    experts.down_proj.requires_grad_(True)
    weights.requires_grad_(False)
    assert count([experts.down_proj]) == 3


@pytest.mark.parametrize("frozen", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
def test_a_frozen_parameter_gets_no_gradient_and_the_others_keep_theirs(frozen):
    experts, tensors = make("ours, gated, biased", "sparse_moe"), inputs(20, 2)
    expected = results(experts(*tensors), experts, tensors)
    getattr(experts, frozen).requires_grad_(False)
    experts(*tensors).backward(torch.randn(20, 16, generator=torch.Generator().manual_seed(2)))
    for name, parameter in experts.named_parameters():
        if name == frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name])


def test_backward_twice_over_one_graph():
    experts, tensors = make("ours, gated", "sparse_moe"), inputs(20, 2)
    output = experts(*tensors).sum()
    first = torch.autograd.grad(output, list(experts.parameters()), retain_graph=True)
    experts(*tensors).sum().backward()  # another call between the two
    for a, b in zip(first, torch.autograd.grad(output, list(experts.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    experts, tensors = make("gated dropout", "sparse_moe").train(), inputs(20, 2)
    collected = []
    for call in (experts, lambda *args: checkpoint(experts, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        collected.append(results_by_backward(call(*tensors), experts, tensors))
    for a, b in zip(*collected, strict=True):
        torch.testing.assert_close(a, b)


def results_by_backward(output, experts, tensors) -> list[torch.Tensor]:
    leaves = [tensors[0], tensors[2], *experts.parameters()]
    for leaf in leaves:
        leaf.grad = None
    output.sin().sum().backward()
    return [output, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "learned" not in kind])
def test_second_derivatives(kind, backend):
    experts, (hidden, index, weights) = (
        make(kind, backend, torch.float64, H=4, I=3),
        inputs(3, 2, H=4, dtype=torch.float64),
    )
    wanted = {"input": hidden, "weights": weights, **dict(experts.named_parameters())}

    def function(*values):
        parameters = dict(list(zip(wanted, values, strict=True))[2:])
        return torch.func.functional_call(experts, parameters, (values[0].tanh(), index, values[1]))

    values = [value.detach().requires_grad_() for value in wanted.values()]
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_second_derivatives_where_the_weights_depend_on_the_input():
    found = []
    for implementation in ("sparse_moe", "eager"):
        experts = make("ours, gated, biased", implementation, torch.float64)
        hidden, index, _ = inputs(9, 2, dtype=torch.float64)
        output = experts(hidden, index, hidden[:, :2].sigmoid())
        (gradient,) = torch.autograd.grad(output.square().sum(), hidden, create_graph=True)
        leaves = (hidden, *experts.parameters())
        found.append([gradient, *torch.autograd.grad(gradient.square().sum(), leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_no_second_derivative_with_a_learned_activation():
    experts, tensors = make("ours, learned activation", "sparse_moe"), inputs(5, 2)
    with pytest.raises(NotImplementedError, match=r'no second derivative.*set_experts_implementation\("eager"\)'):
        torch.autograd.grad(experts(*tensors).sum(), tensors[0], create_graph=True)


def test_runs_under_strict_determinism_and_repeats_itself():
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        experts, tensors = (
            make("ours, gated, biased", "sparse_moe", torch.bfloat16),
            inputs(40, 2, dtype=torch.bfloat16),
        )
        first, second = (results(experts(*tensors), experts, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_graph_holds_grouped_mm_instead(backend):
    torch.compiler.reset()
    experts, tensors = make("mixtral", backend), inputs(20, 2)
    compiled = torch.compile(copy.deepcopy(experts), fullgraph=True, backend="aot_eager")
    found = results(compiled(*tensors), compiled, tensors)
    for a, b in zip(found.values(), results(experts(*tensors), experts, tensors).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [("auto", "sparse_moe"), ("segment_mm", "sparse_moe"), ("segment_mm_recompute", "sparse_moe_recompute")],
)
def test_old_names_compute_the_same_and_tell_the_new_one(old, new):
    tensors = inputs(12, 2)
    with pytest.warns(FutureWarning, match=f'"{old}"` is now "{new}"'):
        found = make("mixtral", old)(*tensors)
    assert torch.equal(found, make("mixtral", new)(*tensors))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20))
def test_padded_lengths_are_few_and_near(lengths):
    import numpy as np

    padded = padded_lengths(np.array(lengths))
    for length, longer in zip(lengths, padded.tolist(), strict=True):
        assert length <= longer <= max(length + 7, length * 17 / 16)
        assert padded_lengths(np.array([longer]))[0] == longer
    assert len(set(padded_lengths(np.arange(1, 1025)).tolist())) < 100


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 3), (4, 2), (16, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_few_tokens_of_a_decoding_step(kind, tokens, k, monkeypatch):
    called = []
    monkeypatch.setattr(function_module, "few_rows_forward", lambda *a: called.append(0) or few_rows_forward(*a))
    for dtype in (torch.float32, torch.bfloat16):
        experts, tensors = make(kind, "sparse_moe", dtype), inputs(tokens, k, dtype=dtype)
        with torch.no_grad():
            found, right = experts(*tensors).float(), experts_oracle(experts, *tensors).float()
        assert (found - right).abs().max() <= TOLERANCE[dtype] * right.abs().max()
    assert len(called) == 2


def test_few_tokens_of_another_dtype_and_an_expert_that_is_named_twice():
    experts = make("mixtral", "sparse_moe", torch.bfloat16)
    hidden, _, weights = inputs(1, 2)
    with torch.no_grad():
        twice = experts(hidden, torch.tensor([[3, 3]]), weights)
        once = experts(hidden, torch.tensor([[3]]), weights.sum(dim=-1, keepdim=True))
    assert twice.dtype == torch.float32
    torch.testing.assert_close(twice, once, rtol=2e-2, atol=2e-2)
