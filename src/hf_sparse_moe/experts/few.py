"""The experts for the few tokens of a decoding step, where keeping book of rows costs more than the products."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch.nn import functional as F

from .activation import Activation
from .segments import require_experts


FEW_PAIRS = 32  # of a token and an expert: with more, a sort in numpy is the cheaper book


def few_rows_forward(
    experts: Any,
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    up: tuple[torch.Tensor, torch.Tensor | None],
    down: tuple[torch.Tensor, torch.Tensor | None],
    activation: Activation,
) -> torch.Tensor:
    """
    `(T, H)` of experts that are all here, without gradient: one product for each expert that has rows. `up` and
    `down` are weight (E, ..., ...) and bias.
    """
    num_tokens, top_k = index_TK.shape
    pairs_of: dict[int, list[int]] = {}
    for pair, expert in enumerate(index_TK.flatten().tolist()):
        pairs_of.setdefault(expert, []).append(pair)
    if not 0 <= min(pairs_of) <= max(pairs_of) < experts.num_experts:
        require_experts(index_TK, experts.num_experts)  # says which
    pair_R = [pair for pairs in pairs_of.values() for pair in pairs]
    lengths = [len(pairs) for pairs in pairs_of.values()]

    def project(rows: Iterable[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        matrices = weight.mT if experts.is_transposed else weight
        pieces = zip(pairs_of, rows, strict=False)
        return torch.cat([F.linear(x, matrices[e], None if bias is None else bias[e]) for e, x in pieces])

    dtype = up[0].dtype
    rows_TH, weights_TK = hidden_TH.to(dtype), weights_TK.to(dtype)
    if len(pairs_of) == top_k and num_tokens == 1:  # a row each, in the order of the weights
        activated_RI = activation(project(repeat(rows_TH), *up)).to(dtype)
        return (weights_TK @ project(activated_RI.split(1), *down)).to(hidden_TH.dtype)
    token_R = torch.tensor([pair // top_k for pair in pair_R])
    activated_RI = activation(project(rows_TH.index_select(0, token_R).split(lengths), *up)).to(dtype)
    output_RH = project(activated_RI.split(lengths), *down)
    row_P = torch.tensor(sorted(range(len(pair_R)), key=pair_R.__getitem__))
    output_TKH = output_RH.index_select(0, row_P).view(num_tokens, top_k, -1)
    return torch.bmm(weights_TK[:, None], output_TKH)[:, 0].to(hidden_TH.dtype)
