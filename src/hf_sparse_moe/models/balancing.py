"""Losses that keep the load of the experts even. T tokens, E experts, K experts a token."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import distributed
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging


logger = logging.get_logger(__name__)


def expert_counts(
    top_k_index_TK: torch.Tensor, num_experts: int, token_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """
    How many (token, expert) assignments went to each expert.

    Args:
        top_k_index_TK (`torch.LongTensor` of shape `(T, K)`): The experts chosen for each token.
        num_experts (`int`): E.
        token_mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for a token that counts, 0 for a pad.

    Returns:
        `torch.FloatTensor` of shape `(E,)`, without gradient.
    """
    with torch.no_grad():
        index = top_k_index_TK.reshape(-1)
        if token_mask_T is None:
            weight = torch.ones_like(index, dtype=torch.float32)
        else:
            weight = token_mask_T.float().repeat_interleave(top_k_index_TK.shape[-1])
        return torch.zeros(num_experts, dtype=torch.float32, device=index.device).scatter_add_(0, index, weight)


def sequence_counts(
    top_k_index_TK: torch.Tensor, num_experts: int, num_sequences: int, token_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """
    [`expert_counts`] of each sequence by itself; T = `num_sequences` * S.

    Returns:
        `torch.FloatTensor` of shape `(num_sequences, E)`, without gradient.
    """
    sequence_T = torch.arange(num_sequences, device=top_k_index_TK.device)
    sequence_T = sequence_T.repeat_interleave(len(top_k_index_TK) // max(num_sequences, 1))
    index_TK = top_k_index_TK + sequence_T[:, None] * num_experts
    return expert_counts(index_TK, num_sequences * num_experts, token_mask_T).reshape(num_sequences, num_experts)


def masked_mean(values: torch.Tensor, token_mask_T: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens (dimension 0) that count; zero where none does."""
    if token_mask_T is None:
        return values.sum(dim=0) / max(len(values), 1)
    mask = token_mask_T.to(values.dtype)
    weighted = values * mask.reshape(-1, *[1] * (values.dim() - 1))
    return weighted.sum(dim=0) / mask.sum().clamp(min=1)


def balance(counts_E: torch.Tensor, mean_probs_E: torch.Tensor) -> torch.Tensor:
    """
    E * sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, equation 4): f_e is expert e's share of `counts_E`, P_e
    its mean probability. An even load gives 1, all tokens on one expert E. Leading dimensions are kept.
    """
    share_E = counts_E / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)
    return counts_E.shape[-1] * (share_E * mean_probs_E).sum(dim=-1)


def load_balancing_loss(
    router_probs_TE: torch.Tensor, top_k_index_TK: torch.Tensor, token_mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """
    [`balance`] of one layer, over all tokens given.

    transformers' `load_balancing_loss_func` sums f over the K slots and so reads K where this reads 1; it also pools
    all layers first, so that layers which collapse onto different experts look even.

    Args:
        router_probs_TE (`torch.FloatTensor` of shape `(T, E)`): Probabilities, each row summing to 1.
        top_k_index_TK (`torch.LongTensor` of shape `(T, K)`): The experts chosen for each token.
        token_mask_T (`torch.Tensor` of shape `(T,)`, *optional*): 1 for a token that counts, 0 for a pad.

    Returns:
        `torch.FloatTensor`: a scalar; 0 when no token counts.
    """
    counts_E = expert_counts(top_k_index_TK, router_probs_TE.shape[-1], token_mask_T)
    return balance(counts_E, masked_mean(router_probs_TE, token_mask_T))


def sequence_balancing_loss(
    router_probs_TE: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    num_sequences: int,
    token_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    [`balance`] of each sequence by itself, then the mean over the sequences that have a token (DeepSeek-V3, arXiv
    2412.19437, equations 17 to 20). Takes what [`load_balancing_loss`] takes; T = `num_sequences` * S.

    Returns:
        `torch.FloatTensor`: a scalar; 0 when no token counts.
    """
    num_experts = router_probs_TE.shape[-1]
    counts_BE = sequence_counts(top_k_index_TK, num_experts, num_sequences, token_mask_T)
    probs_BSE = router_probs_TE.reshape(num_sequences, -1, num_experts)
    mask_BS = torch.ones_like(probs_BSE[..., 0])
    if token_mask_T is not None:
        mask_BS = token_mask_T.to(mask_BS).reshape(num_sequences, -1)
    tokens_B = mask_BS.sum(dim=1)
    mean_BE = (probs_BSE * mask_BS[..., None]).sum(dim=1) / tokens_B.clamp(min=1)[:, None]
    return balance(counts_BE, mean_BE).sum() / (tokens_B > 0).sum().clamp(min=1)


def packed_balancing_loss(
    router_probs_TE: torch.Tensor,
    top_k_index_TK: torch.Tensor,
    sequence_T: torch.Tensor,
    token_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`sequence_balancing_loss`] where rows hold several sequences; `sequence_T` is each token's, below T."""
    tokens, num_experts = router_probs_TE.shape
    mask_T = torch.ones_like(router_probs_TE[:, 0]) if token_mask_T is None else token_mask_T.to(router_probs_TE)
    index_TK = top_k_index_TK + sequence_T[:, None] * num_experts
    counts_SE = expert_counts(index_TK, tokens * num_experts, token_mask_T).reshape(tokens, num_experts)
    tokens_S = torch.zeros_like(mask_T).index_add(0, sequence_T, mask_T)
    sums_SE = torch.zeros_like(router_probs_TE).index_add(0, sequence_T, router_probs_TE * mask_T[:, None])
    losses_S = balance(counts_SE, sums_SE / tokens_S.clamp(min=1)[:, None])
    return losses_S.sum() / (tokens_S > 0).sum().clamp(min=1)


class BalanceSettings(Protocol):
    """A mixture's config, or what `fix_balance` returned."""

    router_aux_loss_coef: float
    router_z_loss_coef: float
    balance_scope: str


class _ForwardPass:
    """Its sequences and, from the first backward pass on, those of all passes of its loss."""

    def __init__(self, num_sequences: int):
        self.num_sequences, self.of_loss = num_sequences, 0


_Passes = list[Callable[[], "_ForwardPass | None"]]


class OptimizerStep:
    """
    What a mixture is told of the optimizer step under way. Trainer tells it by a callback ([`listen_to_trainers`]), a
    loop of one's own by [`start`]; until then each micro-batch counts as a step.

    It knows the weight of the balance loss where the loss is computed elsewhere, and the load that
    `balance_scope="global_batch"` evens (arXiv 2501.11873): assignments of all ranks, and of the step's micro-batches
    so far. Probabilities stay those of the rank's micro-batch, weighted by its share of the tokens, so that the mean
    of the ranks' losses is the one of their joint batch.

    Args:
        settings (`BalanceSettings`): Coefficients and scope.
    """

    def __init__(self, settings: BalanceSettings):
        self.settings = settings
        self.reset()

    def reset(self) -> None:
        """Nothing is known of optimizer steps."""
        self.weight: float | None = None  # of a micro-batch
        self.earlier_LE: torch.Tensor | None = None  # of this step's micro-batches, all ranks
        # Where to find each forward pass: that waits for a backward pass; that ran without gradients; and that a loss
        # which embeds in parts runs again, within the backward pass of this number.
        self._waiting: _Passes = []
        self._without_grad: _Passes = []
        self._repeated: tuple[int, _Passes] = (-1, [])
        self._was_used = False

    def __reduce__(self) -> tuple:
        return OptimizerStep, (self.settings,)  # a copy of the model waits for no backward pass

    def start(self, micro_batches: int = 1, loss_scale: float = 1.0) -> None:
        """The next micro-batch is the first of `micro_batches`, whose loss is multiplied by `loss_scale`."""
        self.weight, self.earlier_LE = loss_scale / micro_batches, None
        self._waiting, self._without_grad = [], []

    def join(self, num_sequences: int) -> Callable[[], float]:
        """
        Called in a forward pass, it returns what tells its backward pass the weight, a share of that of the loss. A
        contrastive loss has several passes; one that embeds in parts (GradCache) runs them without gradients first,
        and again in backward. A pass whose graph is gone by then was of no loss.
        """
        this, backward = _ForwardPass(num_sequences), torch._C._current_graph_task_id()
        if not torch.is_grad_enabled():
            self._without_grad.append(lambda: this)
            return partial(self._share, this, self._without_grad)
        if backward == -1:
            self._waiting.append(weakref.ref(this))
            return partial(self._share, this, self._waiting)
        if backward != self._repeated[0]:
            self._repeated, self._without_grad = (backward, self._without_grad), []
        return partial(self._share, this, self._repeated[1])

    def _share(self, this: _ForwardPass, together: _Passes) -> float:
        if together is self._waiting:  # those to come are of another loss
            self._waiting, self._without_grad = [], []
        if not this.of_loss:
            living = [one for find in together if (one := find()) is not None]
            total = sum(one.num_sequences for one in living) or this.num_sequences
            for one in (this, *living):
                one.of_loss = total
        return (1.0 if self.weight is None else self.weight) * this.num_sequences / this.of_loss

    def global_losses(
        self,
        counts: list[torch.Tensor],
        mean_probs: list[torch.Tensor],
        tokens: list[torch.Tensor | int],
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """
        [`balance`] of each layer for one micro-batch of this rank, and the weight of these losses in the step's. One
        all-reduce sums the micro-batch over the ranks.

        Args:
            counts (`list[torch.Tensor]` of shape `(E,)`): Of each layer, its assignments; E may differ.
            mean_probs (`list[torch.Tensor]` of shape `(E,)`): Of each layer, the mean over its tokens.
            tokens (`list[torch.Tensor]` or `list[int]`): Of each layer, how many those are, pads excluded.
            labels (`torch.Tensor`, *optional*): Those that count.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): The labels of the whole step.

        Returns:
            `tuple`: `torch.Tensor` of shape `(L,)`, and a weight that sums to 1 over the micro-batches and ranks.
        """
        device = counts[-1].device
        tokens_L = torch.stack([torch.as_tensor(count, dtype=torch.float32).to(device) for count in tokens])
        counts_LE = pad_sequence([counts_E.to(device) for counts_E in counts], batch_first=True)
        counted = torch.zeros((), device=device) if labels is None else labels.ne(-100).sum()
        sums = torch.cat([counts_LE.flatten(), tokens_L, counted.reshape(1).to(tokens_L)])
        is_distributed = distributed.is_available() and distributed.is_initialized()
        if is_distributed:
            distributed.all_reduce(sums)
        counts_LE, all_tokens_L = sums[: counts_LE.numel()].view_as(counts_LE), sums[-len(tokens_L) - 1 : -1]
        all_labels = sums[-1]
        if self.weight is not None:
            if self.earlier_LE is not None and self.earlier_LE.shape == counts_LE.shape:
                counts_LE = counts_LE + self.earlier_LE
            self.earlier_LE = counts_LE
        elif not torch.compiler.is_compiling():
            if self._was_used:
                logger.warning_once(
                    '`balance_scope="global_batch"` balances each micro-batch by itself, because nothing says where '
                    "an optimizer step begins. In a training loop of your own, call `model.start_optimizer_step()` "
                    "(`start_optimizer_step()` of what `fix_balance` returned) before the first micro-batch of each."
                )
            self._was_used = True
        ranks = distributed.get_world_size() if is_distributed else 1
        shares_L = ranks * tokens_L / all_tokens_L.clamp(min=1)
        losses = [
            balance(counts_E[: len(mean_E)], mean_E.to(device) * share)
            for counts_E, mean_E, share in zip(counts_LE, mean_probs, shares_L, strict=True)
        ]
        if labels is None or num_items_in_batch is None:  # a mean loss, whose gradient is averaged over the ranks
            return torch.stack(losses), 1.0
        items = torch.as_tensor(num_items_in_batch, device=device).clamp(min=1)
        return torch.stack(losses), all_labels / (ranks * items)


def listen_to_trainers() -> None:
    """Have each Trainer that is made from now on tell its mixtures of optimizer steps, once there are Trainers."""
    if "transformers.trainer" in sys.modules:
        from .optimizer_steps import add_to_trainers

        add_to_trainers()


def router_z_loss(router_logits_TE: torch.Tensor, token_mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over the tokens of logsumexp(logits)^2, which keeps router logits small (ST-MoE, arXiv 2202.08906)."""
    return masked_mean(torch.logsumexp(router_logits_TE, dim=-1).square(), token_mask_T)
