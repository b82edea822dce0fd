"""Which rows each expert computes: the (token, expert) pairs in the order of their experts, a segment an expert."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Segment(NamedTuple):
    """The rows `start` to `stop` belong to `expert`."""

    expert: int
    start: int
    stop: int


class Segments(NamedTuple):
    """R rows cut into segments, one an expert that has any. T tokens, K experts a token."""

    segments: list[Segment]  # in the order of the experts and of the rows
    token_R: torch.Tensor  # the token of each row
    pair_R: torch.Tensor  # the (token, slot) pair of each row, flat; T * K where the row only fills up
    row_TK: torch.Tensor  # the row of each pair; R where no expert here serves it

    def batches(self, rows: int) -> list[list[Segment]]:
        """Neighbouring segments together, as long as they have at most `rows` rows; a longer segment stands alone."""
        batches: list[list[Segment]] = []
        for segment in self.segments:
            if batches and segment.stop - batches[-1][0].start <= rows:
                batches[-1].append(segment)
            else:
                batches.append([segment])
        return batches


def find_segments(top_k_index: torch.Tensor, num_experts: int, *, fill_up: bool, may_skip: bool) -> Segments:
    """
    Sort the pairs of `top_k_index` (T, K) by expert, on the host.

    `fill_up` lengthens each segment to one of few lengths ([`padded_lengths`]); the rows that fill up repeat a row of
    the same expert, so that no value of one expert can reach another. `may_skip` allows an index of E and above, a
    pair that another expert-parallel rank serves; it gets no row.

    Raises:
        ValueError: an index below 0, or above E - 1 unless `may_skip`.
    """
    num_tokens, top_k = top_k_index.shape
    expert_P = require_experts(top_k_index, num_experts, may_skip=may_skip)
    # A stable sort of small integers is a radix sort, 20 times faster than torch's own.
    expert_P = np.minimum(expert_P, num_experts).astype(np.min_scalar_type(num_experts))
    counts_E = np.bincount(expert_P, minlength=num_experts)[:num_experts]
    order = np.argsort(expert_P, kind="stable")[: counts_E.sum()]
    experts = np.flatnonzero(counts_E)
    counts = counts_E[experts]
    lengths = padded_lengths(counts) if fill_up else counts
    stops = np.cumsum(lengths)
    starts, firsts = stops - lengths, np.cumsum(counts) - counts
    num_rows = int(lengths.sum())
    within_R = np.arange(num_rows) - np.repeat(starts, lengths)
    count_R = np.repeat(counts, lengths)
    pair_R = order[np.repeat(firsts, lengths) + np.minimum(within_R, count_R - 1)]
    token_R = pair_R // top_k
    pair_R[within_R >= count_R] = num_tokens * top_k
    row_P = np.full(num_tokens * top_k + 1, num_rows)
    row_P[pair_R] = np.arange(num_rows)
    return Segments(
        segments=[Segment(*row) for row in zip(experts.tolist(), starts.tolist(), stops.tolist(), strict=True)],
        token_R=torch.from_numpy(token_R),
        pair_R=torch.from_numpy(pair_R),
        row_TK=torch.from_numpy(row_P[:-1]).view(num_tokens, top_k),
    )


def require_experts(top_k_index: torch.Tensor, num_experts: int, *, may_skip: bool) -> np.ndarray:
    """`top_k_index`, flat, on the host, after refusing what [`find_segments`] refuses."""
    expert_P = top_k_index.detach().reshape(-1).numpy()
    if expert_P.size and (expert_P.min() < 0 or (expert_P.max() >= num_experts and not may_skip)):
        wrong = expert_P[(expert_P < 0) | (expert_P >= num_experts)][0]
        raise ValueError(
            f"`top_k_index` names expert {wrong}, but the experts are 0 to {num_experts - 1}. Check the router."
        )
    return expert_P


def padded_lengths(lengths: np.ndarray) -> np.ndarray:
    """The next of 8, 16, ..., 256, 272, ..., 512, 544, ...: few lengths, and little filling up."""
    exponents = np.frexp(lengths - 0.5)[1]  # lengths are in (2^(e-1), 2^e]
    steps = np.maximum(8, (1 << exponents) >> 5)
    return -(-lengths // steps) * steps
