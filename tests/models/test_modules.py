"""A mixture is an ordinary module: it is copied, moved, cast, frozen, and its layers are where the contract says."""

import copy
import pickle

import pytest
import torch

from tiny_models import ARCHITECTURES, BACKBONES, FAMILIES, tiny_inputs, tiny_sparse


ONE_A_FAMILY = [names[0] for names in FAMILIES.values()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_and_shapes_that_other_tools_key_on(name):
    model = tiny_sparse(name, num_experts=3)
    assert len(model.sparse_blocks) == 2 * (1 + model.config.is_encoder_decoder)
    for block in model.sparse_blocks:
        experts = block.experts
        assert block.gate.weight.shape == (3, 32)
        assert experts.down_proj.shape == (3, 32, 48)
        if experts.gated:
            assert experts.gate_up_proj.shape == (3, 2 * 48, 32)
        else:
            assert experts.up_proj.shape == (3, 48, 32)
        biases = {key: bias.shape for key, bias in experts.named_parameters() if key.endswith("bias")}
        expected = {f"{experts.up_name}_bias": (3, 48 * (1 + experts.gated)), "down_proj_bias": (3, 32)}
        assert biases == (expected if experts.biased else {})


@pytest.mark.parametrize("name", BACKBONES)
def test_a_deep_copy_is_equal_and_independent(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model)
    copied = copy.deepcopy(model)
    expected = model(**inputs, output_router_logits=True)
    torch.testing.assert_close(copied(**inputs).logits, expected.logits)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(**inputs).logits, expected.logits)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_a_pickled_model_computes_the_same(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_cast(name, dtype):
    model = tiny_sparse(name).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    outputs = model(**tiny_inputs(model))
    assert outputs.logits.dtype == dtype
    assert torch.isfinite(outputs.loss)


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_autocast_keeps_the_router_in_float32(name):
    model = tiny_sparse(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**tiny_inputs(model), output_router_logits=True)
    assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
    outputs.loss.backward()
    assert all(torch.isfinite(block.gate.weight.grad).all() for block in model.sparse_blocks)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_of_the_mixture_gets_a_gradient(name):
    model = tiny_sparse(name, num_shared_experts=1).train()
    model(**tiny_inputs(model, batch=4, length=12)).loss.backward()
    for block in model.sparse_blocks:
        for key, parameter in block.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_attention_implementation_reaches_the_dense_model(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    assert model.dense.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
