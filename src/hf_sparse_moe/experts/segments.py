"""Which rows each expert computes: the (token, expert) pairs in the order of their experts, a segment an expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """
    Neighbouring rows that are computed at once: B rows, F neighbouring experts. Where `grouped`, a product takes all
    segments in one call, for which the last four are. On a device, the host does not know `hit` and `lengths`.
    """

    rows: slice
    token_B: torch.Tensor  # the token of each row
    grouped: bool
    hit: list[int]  # the experts that have rows
    lengths: list[int]  # how many rows each of them has
    experts: slice
    ends_F: Any = None  # int32: where the rows of each expert end
    expert_B: Any = None  # the expert of each row
    served_B1: torch.Tensor | None = None  # False where no expert here serves the row; None where all are served


class Segments(NamedTuple):
    """R rows in the order of their experts. T tokens, K experts a token."""

    batches: list[Batch]
    num_rows: int
    token_R: torch.Tensor  # the token of each row
    pair_R: torch.Tensor  # the (token, slot) pair of each row, flat; T * K where the row only fills up
    row_TK: torch.Tensor  # the row of each pair; R where no expert here serves it
    at_once: bool  # whether there is one batch, and each pair has a row in it

    def to(self, device: torch.device) -> Segments:
        """On the device of the rows, for loops there."""
        if device.type == "cpu":
            return self
        batches = [batch._replace(token_B=batch.token_B.to(device)) for batch in self.batches]
        token_R, pair_R, row_TK = (tensor.to(device) for tensor in (self.token_R, self.pair_R, self.row_TK))
        return self._replace(batches=batches, token_R=token_R, pair_R=pair_R, row_TK=row_TK)


def find_segments(
    top_k_index: torch.Tensor,
    num_experts: int,
    *,
    fill_up: bool,
    may_skip: bool,
    grouped: bool = False,
    batch_rows: int = 2**62,
) -> Segments:
    """
    Sort the pairs of `top_k_index` (T, K) by expert, on the host.

    `fill_up` lengthens each segment to one of few lengths ([`padded_lengths`]); the rows that fill up repeat a row of
    the same expert, so that no value of one expert can reach another. `may_skip` allows an index of E and above, a
    pair that another expert-parallel rank serves; it gets no row. A batch has one segment, or up to `batch_rows` rows.

    Raises:
        ValueError: an index below 0, or above E - 1 unless `may_skip`.
    """
    num_tokens, top_k = top_k_index.shape
    expert_P = require_experts(top_k_index, num_experts, may_skip)
    # A stable sort of small integers is a radix sort, 20 times faster than torch's own.
    expert_P = np.minimum(expert_P, num_experts).astype(np.min_scalar_type(num_experts))
    counts_E = np.bincount(expert_P, minlength=num_experts)[:num_experts]
    order = np.argsort(expert_P, kind="stable")[: counts_E.sum()]
    experts = np.flatnonzero(counts_E)
    counts = counts_E[experts]
    lengths = padded_lengths(counts) if fill_up else counts
    stops = np.cumsum(lengths)
    num_rows = int(lengths.sum())
    if num_rows == len(order):
        pair_R = order
        token_R = pair_R // top_k
    else:
        starts, firsts = stops - lengths, np.cumsum(counts) - counts
        within_R = np.arange(num_rows) - np.repeat(starts, lengths)
        count_R = np.repeat(counts, lengths)
        pair_R = order[np.repeat(firsts, lengths) + np.minimum(within_R, count_R - 1)]
        token_R = pair_R // top_k
        pair_R[within_R >= count_R] = num_tokens * top_k
    row_P = np.full(num_tokens * top_k + 1, num_rows)
    row_P[pair_R] = np.arange(num_rows)
    tokens = torch.from_numpy(token_R)
    batches = list(_batches(experts, stops, tokens, grouped, batch_rows))
    return Segments(
        batches=batches,
        num_rows=num_rows,
        token_R=tokens,
        pair_R=torch.from_numpy(pair_R),
        row_TK=torch.from_numpy(row_P[:-1]).view(num_tokens, top_k),
        at_once=len(batches) == 1 and len(order) == num_tokens * top_k,
    )


def _batches(experts: np.ndarray, stops: np.ndarray, token_R: torch.Tensor, grouped: bool, batch_rows: int):
    """Neighbouring segments together, as long as they have at most `batch_rows` rows; a longer one stands alone."""
    first = start = 0
    while first < len(experts):
        last = max(first + 1, int(np.searchsorted(stops, start + batch_rows, side="right")))
        ends = stops[first:last] - start
        hit, lengths, stop = experts[first:last], np.diff(ends, prepend=0), int(stops[last - 1])
        batch = Batch(slice(start, stop), token_R[start:stop], grouped, hit.tolist(), lengths.tolist(), slice(0))
        if grouped:
            neighbours = slice(int(hit[0]), int(hit[-1]) + 1)
            ends_F = np.cumsum(np.bincount(hit - hit[0], weights=lengths)).astype(np.int32)
            expert_B = torch.from_numpy(np.repeat(hit, lengths))
            batch = batch._replace(experts=neighbours, ends_F=torch.from_numpy(ends_F), expert_B=expert_B)
        yield batch
        first, start = last, stop


def find_segments_on_device(top_k_index: torch.Tensor, num_experts: int) -> Segments:
    """
    Sort the pairs of `top_k_index` (T, K) by expert where they are, for which the host need not wait: one batch, with
    a row for each pair. An index of E and above is a pair that no expert here serves.
    """
    expert_R, pair_R = top_k_index.flatten().sort(stable=True)
    token_R, served_R = pair_R // top_k_index.shape[1], expert_R < num_experts
    experts = torch.arange(1, num_experts + 1, device=expert_R.device)
    batch = Batch(
        rows=slice(None),  # with a length in it, each would be compiled anew
        token_B=token_R,
        grouped=True,
        hit=[],
        lengths=[],
        experts=slice(0, num_experts),
        ends_F=torch.searchsorted(expert_R, experts).int(),
        expert_B=expert_R.clamp(max=num_experts - 1),
        served_B1=served_R[:, None],
    )
    row_TK = torch.empty_like(pair_R).scatter(0, pair_R, torch.arange(pair_R.shape[0], device=pair_R.device))
    return Segments([batch], pair_R.shape[0], token_R, pair_R, row_TK.view_as(top_k_index), True)


def require_experts(top_k_index: torch.Tensor, num_experts: int, may_skip: bool = False) -> np.ndarray:
    """`top_k_index`, flat, on the host; ValueError where an index is below 0, or above E - 1 unless `may_skip`."""
    expert_P = top_k_index.detach().reshape(-1).cpu().numpy()
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
