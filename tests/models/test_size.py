"""What a config counts equals what the built module has and does."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny_models import ARCHITECTURES, FAMILIES, tiny_config, tiny_inputs, tiny_sparse


VARIANTS = [{}, {"num_experts_per_tok": 1}, {"num_shared_experts": 2}, {"moe_intermediate_size": 20}]
# Products of two activations, which grow with the sequence: attention scores. The rest multiplies by a weight.
WEIGHT_PRODUCTS = ("mm", "addmm")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_the_built_module(name):
    model = tiny_sparse(name)
    assert model.config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_active_parameters_are_those_of_a_model_with_k_experts(name, fields):
    """But for the router, which scores all experts."""
    config = tiny_config(name, **fields)
    active = tiny_config(name, **fields | {"num_experts": config.num_experts_per_tok})
    blocks = len(tiny_sparse(name).sparse_blocks)
    idle_router_rows = blocks * (config.num_experts - config.num_experts_per_tok) * config.hidden_size
    assert config.num_parameters(only_active=True) == active.num_parameters() + idle_router_rows
    assert active.num_parameters(only_active=True) == active.num_parameters()


# DeBERTa projects its relative positions once a sequence and not once a token.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "deberta_v2"])
def test_flops_are_those_that_a_forward_pass_makes(name):
    assert measured_flops_per_token(name) == tiny_config(name).flops_per_token()


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_flops_follow_the_mixture_s_fields(name, fields):
    assert measured_flops_per_token(name, **fields) == tiny_config(name, **fields).flops_per_token()


@torch.no_grad()
def measured_flops_per_token(name: str, **fields) -> float:
    model = tiny_sparse(name, **fields)
    model.set_experts_implementation("eager")  # plain products, which the counter knows
    input_ids = tiny_inputs(model, labels=False)["input_ids"]
    inputs = {"input_ids": input_ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    flops = {
        str(operation).removeprefix("aten."): count for operation, count in counter.get_flop_counts()["Global"].items()
    }
    return sum(count for operation, count in flops.items() if operation in WEIGHT_PRODUCTS) / input_ids.numel()
