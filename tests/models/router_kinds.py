"""Every kind of router as fields of a config, and one sparse block with a router of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import nn

from hf_sparse_moe.models.feed_forward import find_feed_forwards
from hf_sparse_moe.models.masks import SideTokens
from hf_sparse_moe.models.moe_block import SparseMoeBlock
from hf_sparse_moe.models.routing import RoutingRecord
from tiny_models import architecture_of, enlarge_weights, tiny_config, tiny_sparse


HIDDEN, INTERMEDIATE = 16, 24
_GROUPS = {"num_experts": 8, "n_group": 4, "topk_group": 2}
ROUTERS = {
    "softmax": {},
    "softmax, not normalised": {"norm_topk_prob": False},
    "sigmoid": {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
    "sigmoid, not normalised": {"scoring_func": "sigmoid", "norm_topk_prob": False},
    "cosine": {"scoring_func": "cosine"},
    "groups by their best": _GROUPS,
    "groups by their best two": {**_GROUPS, "scoring_func": "sigmoid", "num_experts_per_tok": 3},
    "capacity": {"capacity_factor": 0.75},
    "capacity, sigmoid": {"capacity_factor": 0.6, "scoring_func": "sigmoid", "num_shared_experts": 1},
    "hash": {"router_type": "hash", "routed_scaling_factor": 1.5},
    "expert choice": {"router_type": "expert_choice"},
    "expert choice, capacity": {"router_type": "expert_choice", "capacity_factor": 1.5, "num_shared_experts": 1},
}


def routers_of(name: str) -> list[str]:
    """The kinds that an architecture may have: in a causal decoder experts cannot choose."""
    causal = architecture_of(name)[1].family == "decoder"
    return [kind for kind, fields in ROUTERS.items() if not (causal and fields.get("router_type") == "expert_choice")]


def pairs_with(*names: str) -> list[tuple[str, str]]:
    """Each architecture with each kind of router."""
    return [(name, kind) for name in names for kind in routers_of(name)]


def one_each(pairs: list[tuple[str, str]]) -> list:
    """The pairs, all but one of each kind marked `conformance`; the architectures take turns."""
    fast = {}
    for number, kind in enumerate(ROUTERS):
        of_kind = [pair for pair in pairs if pair[1] == kind]
        fast[kind] = of_kind[number % len(of_kind)] if of_kind else None
    return [pair if pair == fast[pair[1]] else pytest.param(*pair, marks=pytest.mark.conformance) for pair in pairs]


def settle(module: nn.Module) -> nn.Module:
    """Selection biases that matter and a temperature that does not make the choice hard, in place."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
            if name.endswith("gate.temperature"):
                tensor.fill_(0.3)
    return module


def routed_model(name: str, kind: str, **fields) -> hf.PreTrainedModel:
    """A tiny sparse model with a router of this kind, in evaluation mode."""
    return settle(tiny_sparse(name, **{**ROUTERS[kind], **fields}))


def routed_block(kind: str, backend: str = "eager", **fields) -> SparseMoeBlock:
    """One block of the encoder's side, in evaluation mode."""
    config = tiny_config("encoder", **{**ROUTERS[kind], **fields})
    config._experts_implementation = backend
    dense = hf.LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=4)
    feed_forward = find_feed_forwards(hf.models.llama.modeling_llama.LlamaMLP(dense))[0]
    block = SparseMoeBlock(config, feed_forward, side="encoder")
    return settle(enlarge_weights(block)).eval()


@contextmanager
def known_tokens(hidden_states: torch.Tensor, mask=None, ids=None) -> Iterator[RoutingRecord]:
    """What a model's forward pass tells the routers of `hidden_states` `(B, S, H)`."""
    mask = None if mask is None or mask.dim() not in (2, 3) else mask.ne(0)
    record = RoutingRecord({"encoder": SideTokens(mask, ids, len(hidden_states))}).open()
    try:
        yield record
    finally:
        record.close()
