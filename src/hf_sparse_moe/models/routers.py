"""Routers: which experts serve a token, and with what weight. T tokens, H hidden, E experts, K experts a token."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .masks import NO_CONTEXT, TokenContext
from .routing import Routing


ROUTER_INIT_STD = 0.02  # small rows: every expert starts about equally likely
COSINE_INIT_TEMPERATURE, COSINE_MIN_TEMPERATURE = 0.07, 0.01
COSINE_MAX_DIM = 256
Choice = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # top_k_index, kept, token_index of a `Routing`
ROUNDING = 1e-3  # so that a capacity of 3 in exact numbers is not 4 in floating-point ones


def router_scores(router_logits_TE: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """The scores that experts are chosen by and weighted with: sigmoid or softmax of the logits, in float32."""
    if scoring_func == "sigmoid":
        return router_logits_TE.float().sigmoid()
    return router_logits_TE.float().softmax(dim=-1)


def router_probabilities(router_logits_TE: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """The scores as probabilities over the experts (rows sum to 1), as the load-balancing loss needs them."""
    scores_TE = router_scores(router_logits_TE, scoring_func)
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True) if scoring_func == "sigmoid" else scores_TE


def mask_lower_groups(scores_TE: torch.Tensor, n_group: int, topk_group: int, best: int) -> torch.Tensor:
    """
    The scores with -inf for every expert outside a token's `topk_group` best groups. A group is worth the sum of its
    `best` highest scores (DeepSeek-V2, arXiv 2405.04434: 1; DeepSeek-V3, arXiv 2412.19437: 2).
    """
    grouped = scores_TE.unflatten(-1, (n_group, -1))
    worth = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(topk_group, dim=-1).indices, True)
    return grouped.masked_fill(~chosen[..., None], -math.inf).flatten(-2)


def within_capacity(
    scores_TK: torch.Tensor,
    index_TK: torch.Tensor,
    num_experts: int,
    capacity_factor: float,
    token_mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Which assignments an expert has room for: its C = ceil(capacity_factor T K / E) highest scores (Switch
    Transformer, arXiv 2101.03961). T counts no pads, and pads get no room.

    Returns:
        `torch.BoolTensor` of shape `(T, K)`.
    """
    scores, expert = scores_TK.detach().flatten(), index_TK.flatten()
    valid = torch.ones_like(index_TK, dtype=torch.bool)
    if token_mask_T is not None:
        valid = valid & token_mask_T.bool()[:, None]
    valid = valid.flatten()
    capacity = torch.ceil(valid.sum() * (capacity_factor / num_experts) - ROUNDING).clamp(min=1)
    order = scores.masked_fill(~valid, -math.inf).argsort(descending=True, stable=True)
    order = order[expert[order].argsort(stable=True)]  # by expert, the best first
    counts = torch.zeros(num_experts, dtype=torch.long, device=expert.device)
    counts = counts.scatter_add(0, expert, torch.ones_like(expert))
    first = counts.cumsum(0) - counts
    place = torch.arange(expert.shape[0], device=expert.device) - first[expert[order]]
    rank = torch.empty_like(place).scatter(0, order, place)
    return (valid & (rank < capacity)).reshape(index_TK.shape)


def without_dropped(weights_TK: torch.Tensor, kept_TK: torch.Tensor | None) -> torch.Tensor:
    """The weights, 0 where an assignment was dropped."""
    return weights_TK if kept_TK is None else weights_TK.masked_fill(~kept_TK, 0.0)


class SparseMoeRouter(nn.Module):
    """
    What all routers share: logits, the experts that they choose, and the weights of those. Everything is computed in
    float32, whatever the dtype of the model or of autocast.

    Args:
        config (`SparseMoeConfig`): The mixture's config.
        hidden_size (`int`): H.
        side (`str`): `"encoder"` or `"decoder"`.
        num_experts (`int`, *optional*): E of this layer, where layers differ in it.
    """

    def __init__(
        self, config: PreTrainedConfig, hidden_size: int, side: str = "decoder", num_experts: int | None = None
    ):
        super().__init__()
        self.side = side
        self.top_k = config.num_experts_per_tok
        self.num_experts = num_experts or config.num_experts
        self.scoring_func = config.scoring_func
        self.routed_scaling_factor = config.routed_scaling_factor
        self.disabled_experts: torch.Tensor | None = None  # (E,) bool; see `hf_sparse_moe.routing.switches`

    def forward(self, hidden_states_TH: torch.Tensor, context: TokenContext = NO_CONTEXT) -> Routing:
        """
        Args:
            hidden_states_TH (`torch.Tensor` of shape `(T, H)`): The tokens, pads included.
            context (`TokenContext`, *optional*): What else is known of them.
        """
        router_logits, raw_logits = self.compute_logits(hidden_states_TH)
        scores = self.scores(router_logits)
        index, kept, token_index = self.choose(scores, context)
        choice = Routing(router_logits, scores, index, kept, token_index, raw_logits)
        return choice._replace(top_k_weights=self.weigh(scores, choice))

    def follow(self, choice: Routing, router_logits_TE: torch.Tensor) -> Routing:
        """The experts of `choice` with the weights that these logits give them."""
        weights = self.weigh(self.scores(router_logits_TE), choice)
        return choice._replace(router_logits=router_logits_TE, top_k_weights=weights)

    def scores(self, router_logits_TE: torch.Tensor) -> torch.Tensor:
        """[`router_scores`], those of disabled experts 0."""
        if self.disabled_experts is not None:
            router_logits_TE = router_logits_TE.masked_fill(self.disabled_experts, -math.inf)
        return router_scores(router_logits_TE, self.scoring_func)

    def reset_parameters(self) -> None:
        """Initialise what no checkpoint has filled."""

    def compute_logits(self, hidden_states_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits (T, E), with 0 for what is not finite, so that the choice stays defined; and the raw ones."""
        raise NotImplementedError

    def choose(self, scores_TE: torch.Tensor, context: TokenContext) -> Choice:
        """The experts of the tokens, or the tokens of the experts."""
        raise NotImplementedError

    def weigh(self, scores_TE: torch.Tensor, choice: Routing) -> torch.Tensor:
        """The weights of the experts that were chosen."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, top_k={self.top_k}, scoring_func={self.scoring_func!r}"


class SparseMoeTopKRouter(SparseMoeRouter):
    """
    Each token takes its `num_experts_per_tok` best experts.

    Scores are the softmax (Switch, Mixtral) or the sigmoid (DeepSeek-V3, arXiv 2412.19437) of `weight @ x`; the
    chosen scores are the weights, divided by their sum where `norm_topk_prob`, times `routed_scaling_factor`. With
    sigmoid scores, `e_score_correction_bias` is added for the choice alone. `n_group` and `topk_group` limit the
    choice to each token's best groups of experts. With a `capacity_factor` an expert takes no more than its share in
    training and drops the rest; in evaluation nothing is dropped, so that a cached step routes as the full forward.
    """

    def __init__(
        self, config: PreTrainedConfig, hidden_size: int, side: str = "decoder", num_experts: int | None = None
    ):
        super().__init__(config, hidden_size, side, num_experts)
        self.norm_topk_prob = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.capacity_factor = config.capacity_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.row_size(hidden_size)))
        self.e_score_correction_bias: torch.Tensor | None
        bias = torch.zeros(self.num_experts, dtype=torch.float32) if self.scoring_func == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)

    @property
    def is_short(self) -> bool:
        """
        Whether the weights are a softmax over the K highest logits: what the softmax over all experts, divided by the
        sum of its K highest, is, in two operations.
        """
        return (
            self.norm_topk_prob
            and self.scoring_func != "sigmoid"
            and self.routed_scaling_factor == 1
            and self.topk_group >= self.n_group
            and self.disabled_experts is None
        )

    def forward(self, hidden_states_TH: torch.Tensor, context: TokenContext = NO_CONTEXT) -> Routing:
        if not self.is_short:
            return super().forward(hidden_states_TH, context)
        router_logits, raw_logits = self.compute_logits(hidden_states_TH)
        values, index = router_logits.topk(self.top_k, dim=-1)
        kept = self.has_room(self.scores(router_logits), index, context) if self.drops_tokens else None
        weights = without_dropped(values.softmax(dim=-1), kept)
        return Routing(router_logits, weights, index, kept, None, raw_logits)

    def follow(self, choice: Routing, router_logits_TE: torch.Tensor) -> Routing:
        if not self.is_short:
            return super().follow(choice, router_logits_TE)
        weights = router_logits_TE.gather(-1, choice.top_k_index).softmax(dim=-1)
        weights = without_dropped(weights, choice.kept)
        return choice._replace(router_logits=router_logits_TE, top_k_weights=weights)

    @staticmethod
    def row_size(hidden_size: int) -> int:
        """Columns of `weight`."""
        return hidden_size

    def reset_parameters(self) -> None:
        """Small random rows; never zeros, or ties would send every token to expert 0."""
        init.normal_(self.weight, mean=0.0, std=ROUTER_INIT_STD)
        if self.e_score_correction_bias is not None:
            init.zeros_(self.e_score_correction_bias)

    def logits(self, router_input_TH: torch.Tensor) -> torch.Tensor:
        """`(T, E)` of `(T, H)`, both float32."""
        return nn.functional.linear(router_input_TH, self.weight.float())

    def compute_logits(self, hidden_states_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        device = hidden_states_TH.device.type
        # Each step of `generate` asks every router: what it need not do costs as much as its product.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            router_input = hidden_states_TH.float()
            if self.training and self.jitter_noise > 0:
                noise = torch.empty_like(router_input).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
                router_input = router_input * noise
            logits = self.logits(router_input)
        return logits.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), logits

    def choose(self, scores_TE: torch.Tensor, context: TokenContext) -> Choice:
        values = scores_TE
        if self.e_score_correction_bias is not None:
            values = values + self.e_score_correction_bias.float()
        if self.disabled_experts is not None:
            values = values.masked_fill(self.disabled_experts, -math.inf)
        if self.topk_group < self.n_group:
            best = 2 if self.scoring_func == "sigmoid" else 1
            values = mask_lower_groups(values, self.n_group, self.topk_group, best)
        index_TK = torch.topk(values, self.top_k, dim=-1).indices
        return index_TK, self.has_room(scores_TE, index_TK, context) if self.drops_tokens else None, None

    @property
    def drops_tokens(self) -> bool:
        """Whether an expert takes no more tokens than its capacity."""
        return self.training and self.capacity_factor is not None

    def has_room(self, scores_TE: torch.Tensor, index_TK: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Which of these assignments are within their expert's capacity: [`within_capacity`]."""
        scores_TK = scores_TE.gather(-1, index_TK)
        return within_capacity(scores_TK, index_TK, self.num_experts, self.capacity_factor, context.mask)

    def weigh(self, scores_TE: torch.Tensor, choice: Routing) -> torch.Tensor:
        if choice.token_index is None:
            weights = scores_TE.gather(-1, choice.top_k_index)
        else:
            weights = scores_TE[choice.token_index, choice.top_k_index[:, 0]][:, None]
        if self.norm_topk_prob and choice.token_index is None:
            # Sigmoids can all be 0; the smallest float32 keeps such a token's weights 0 rather than NaN.
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        if self.routed_scaling_factor != 1:
            weights = weights * self.routed_scaling_factor
        return without_dropped(weights, choice.kept)


class SparseMoeCosineRouter(SparseMoeTopKRouter):
    """
    Top-k by attention over expert keys (X-MoE, arXiv 2204.09179): the logits are the cosines of the projected token
    `projection @ x` and the keys `weight`, divided by a learned temperature of at least 0.01.
    """

    def __init__(
        self, config: PreTrainedConfig, hidden_size: int, side: str = "decoder", num_experts: int | None = None
    ):
        super().__init__(config, hidden_size, side, num_experts)
        self.projection = nn.Parameter(torch.empty(self.row_size(hidden_size), hidden_size))
        self.temperature = nn.Parameter(torch.empty(1))

    @staticmethod
    def row_size(hidden_size: int) -> int:
        return min(hidden_size, COSINE_MAX_DIM)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.projection, mean=0.0, std=self.projection.shape[1] ** -0.5)
        init.constant_(self.temperature, COSINE_INIT_TEMPERATURE)

    def logits(self, router_input_TH: torch.Tensor) -> torch.Tensor:
        normalize = nn.functional.normalize
        projected = normalize(nn.functional.linear(router_input_TH, self.projection.float()), dim=-1)
        keys = normalize(self.weight.float(), dim=-1)
        return nn.functional.linear(projected, keys) / self.temperature.float().clamp(min=COSINE_MIN_TEMPERATURE)


class SparseMoeExpertChoiceRouter(SparseMoeTopKRouter):
    """
    Each expert takes its C = ceil(capacity_factor S / E) best tokens of each sequence of S tokens (arXiv 2202.09368);
    the weight is the softmax over the experts. The capacity factor is how many experts serve a token on average, and
    defaults to `num_experts_per_tok`. A sequence never depends on the others of its batch, and pads are never chosen.
    """

    is_short = False

    def choose(self, scores_TE: torch.Tensor, context: TokenContext) -> Choice:
        if not torch.compiler.is_compiling() and context.is_packed:
            raise ValueError(
                '`router_type="expert_choice"` takes the best tokens of each row, but a row of this batch holds '
                "several sequences, as its positions or its mask say. Give each sequence a row of its own."
            )
        sequences, length = context.num_sequences, scores_TE.shape[0] // context.num_sequences
        scores_BSE = scores_TE.unflatten(0, (sequences, length))
        mask_BS = torch.ones_like(scores_BSE[..., 0], dtype=torch.bool)
        if (mask := context.mask) is not None:
            mask_BS = mask.reshape(sequences, length)
        factor = (self.top_k if self.capacity_factor is None else self.capacity_factor) / self.num_experts
        slots = min(length, max(1, math.ceil(factor * length - ROUNDING)))
        best = scores_BSE.masked_fill(~mask_BS[..., None], -1.0).topk(slots, dim=1)  # (B, C, E)
        capacity_B = torch.ceil(mask_BS.sum(dim=1) * factor - ROUNDING).clamp(min=1)
        kept = torch.arange(slots, device=best.values.device)[:, None] < capacity_B[:, None, None]
        kept = kept & (best.values >= 0)  # pads have -1
        if self.disabled_experts is not None:
            kept = kept & ~self.disabled_experts
        first_token = torch.arange(sequences, device=best.indices.device)[:, None, None] * length
        expert = torch.arange(self.num_experts, device=best.indices.device).expand_as(best.indices)
        return expert.reshape(-1, 1), kept.reshape(-1, 1), (best.indices + first_token).reshape(-1)


class SparseMoeHashRouter(SparseMoeRouter):
    """
    The experts of a token follow from its id alone, with equal weights (Hash Layers, arXiv 2106.04426): expert
    `hash(id) mod E` and the next `num_experts_per_tok - 1` ones. Nothing is learned, so its logits are zeros.
    """

    def compute_logits(self, hidden_states_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.zeros(hidden_states_TH.shape[0], self.num_experts, device=hidden_states_TH.device), None

    def choose(self, scores_TE: torch.Tensor, context: TokenContext) -> Choice:
        if (ids := context.ids) is None:
            given, tokens = context.side.ids, len(scores_TE)
            told = f"this call has none for its {tokens} tokens. Pass `input_ids` (`decoder_input_ids`), not "
            told += "`inputs_embeds`."
            if given is not None:
                told = f"a layer that sees {tokens} tokens cannot tell which of this call's {given.numel()} ids are "
                told += "theirs. Take another router, for this architecture adds, pools or leaves out tokens."
            raise ValueError(f'`router_type="hash"` routes by the token ids of the {self.side}, and {told}')
        mixed = (ids.long() * 2654435761) % 2**32 // 2**8  # Knuth's multiplicative hash; its low bits are poor
        top_k_index = (mixed[:, None] + torch.arange(self.top_k, device=ids.device)) % self.num_experts
        return top_k_index.to(scores_TE.device), None, None

    def weigh(self, scores_TE: torch.Tensor, choice: Routing) -> torch.Tensor:
        top_k = choice.top_k_index.shape[-1]
        return torch.full(choice.top_k_index.shape, self.routed_scaling_factor / top_k, device=scores_TE.device)


def make_router(
    config: PreTrainedConfig, hidden_size: int, side: str, num_experts: int | None = None
) -> SparseMoeRouter:
    """The router that the config asks for. In an encoder-decoder, expert choice is the encoder's alone."""
    kind: type[SparseMoeRouter] = SparseMoeTopKRouter
    if config.router_type == "hash":
        kind = SparseMoeHashRouter
    elif config.router_type == "expert_choice" and side == "encoder":
        kind = SparseMoeExpertChoiceRouter
    elif config.scoring_func == "cosine":
        kind = SparseMoeCosineRouter
    return kind(config, hidden_size, side, num_experts)
