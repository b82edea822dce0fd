"""
Which tokens of a forward pass count: the one answer for every family, ours and stock, told by the call's arguments.

B sequences of S tokens; T = B * S tokens, as a sparse layer sees them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch


IGNORED_LABEL = -100
PACKING = ("position_ids", "cu_seq_lens_q", "attention_mask")


class TokenContext(NamedTuple):
    """
    What is known of the T tokens of one call of a sparse layer besides their hidden states. Worked out when asked,
    because most routers never ask.

    Args:
        side (`SideTokens`): The tokens of the layer's side.
        num_tokens (`int`): T.
    """

    side: SideTokens
    num_tokens: int

    @property
    def mask(self) -> torch.Tensor | None:
        """`(T,)`, False for a pad; None where every token counts, or nobody knows."""
        mask = self.side.mask
        if mask is None or mask.numel() == 0:
            return None
        mask = mask.reshape(-1, mask.shape[-1])
        length = self.num_tokens // mask.shape[0]
        if self.side.num_sequences not in (None, mask.shape[0]):  # 3-D, but of pairs of tokens
            return None
        if length * mask.shape[0] != self.num_tokens or length > mask.shape[1]:
            return None
        if self.side.ids is not None and length != self.side.ids.shape[-1]:  # a layer that pools
            return None
        return mask[:, mask.shape[1] - length :].reshape(-1)  # the last columns: a cache holds the earlier tokens

    @property
    def ids(self) -> torch.Tensor | None:
        """`(T,)`, the token ids; None where nobody knows."""
        ids = self.side.ids
        return None if ids is None or ids.numel() != self.num_tokens else ids.reshape(-1)

    @property
    def num_sequences(self) -> int:
        """The sequences, of T / `num_sequences` tokens each."""
        sequences = self.side.num_sequences
        return sequences if sequences and self.num_tokens % sequences == 0 else 1

    @property
    def sequence_ids(self) -> torch.Tensor | None:
        """`(T,)`, the number of each token's sequence, where something tells that rows hold several."""
        starts = [found for found in map(self._fitting, _packed_starts(self.side.packing)) if found is not None]
        if not starts:
            return None
        starts_BS = torch.stack(starts).any(dim=0).reshape(self.num_sequences, -1)
        starts_BS = torch.cat([torch.ones_like(starts_BS[:, :1]), starts_BS[:, 1:]], dim=1)
        return starts_BS.flatten().cumsum(dim=0) - 1

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several sequences with tokens that count."""
        sequence_T, mask_T = self.sequence_ids, self.mask
        if sequence_T is None:
            return False
        counted_T = sequence_T if mask_T is None else sequence_T[mask_T.to(sequence_T.device)]
        return len(counted_T.unique()) > self.num_sequences

    def _fitting(self, starts: torch.Tensor) -> torch.Tensor | None:
        if starts.shape[0] == 1 != self.num_sequences:  # position ids for all rows
            starts = starts.expand(self.num_sequences, -1)
        return starts.reshape(-1) if starts.numel() == self.num_tokens else None


class SideTokens(NamedTuple):
    """
    The tokens of the encoder's or the decoder's side.

    Args:
        mask (`torch.BoolTensor` of shape `(B, S)`, *optional*): False for a pad.
        ids (`torch.LongTensor` of shape `(B, S)`, *optional*): The token ids.
        num_sequences (`int`, *optional*): B.
        packing (`dict`): The arguments that may tell that a row holds several sequences.
    """

    mask: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    num_sequences: int | None = None
    packing: Mapping[str, Any] = {}

    def context(self, num_tokens: int) -> TokenContext:
        """Of the `num_tokens` tokens that a layer sees; what does not fit that number is left out."""
        return TokenContext(self, num_tokens)


NO_CONTEXT = TokenContext(SideTokens(), 0)


def tokens_by_side(model: Any, inputs: Mapping[str, Any]) -> dict[str, SideTokens]:
    """
    The tokens of the encoder's and of the decoder's side; in a model of one side both are the same.

    In an encoder-decoder, the decoder's tokens that count are those of `decoder_attention_mask`; without one, those
    that have something to predict. Labels say so; without them the ids that the decoder reads, where that is no end of
    a sequence nor a token before a pad: the same tokens, if sequences end. Without any, those of the source, which
    heads of BART feed to the decoder. A mask is `(B, S)`, with several choices for each row `(B, C, S)`, or over pairs
    of tokens `(B, 1, S, S)`, where one that no token sees is a pad. Any other says nothing.

    Args:
        model (`PreTrainedModel`): Its config says how many sides there are, and which id is the pad.
        inputs (`Mapping[str, Any]`): The arguments of its forward, `labels` among them.
    """
    source = source_tokens(inputs)
    config = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return {"encoder": source, "decoder": source}
    mask, ids = _mask(inputs.get("decoder_attention_mask")), inputs.get("decoder_input_ids")
    embeds, labels, pad = inputs.get("decoder_inputs_embeds"), inputs.get("labels"), config.pad_token_id
    if labels is not None and (labels.dim() != 2 or not getattr(model, "labels_are_targets", True)):
        labels = None
    if mask is None and labels is not None:
        mask = labels.ne(IGNORED_LABEL)
    elif mask is None and ids is not None and pad is not None:
        ends, is_pad = getattr(config, "eos_token_id", None), ids.eq(pad)
        is_end = torch.isin(ids, ids.new_tensor([] if ends is None else ends))
        is_pad[:, 0] = is_end[:, 0] = False  # T5 starts with the pad, BART with the end
        mask = ~is_end & ~torch.cat([is_pad[:, 1:], is_pad[:, -1:]], dim=1)
    read = labels if ids is None else ids
    sequences = _num_sequences(read, embeds)
    if read is None and embeds is None:
        mask, sequences = source.mask if mask is None else mask, sequences or source.num_sequences
    return {"encoder": source, "decoder": SideTokens(mask, ids, sequences)}


def source_tokens(inputs: Mapping[str, Any]) -> SideTokens:
    """The tokens of `input_ids` or `inputs_embeds`."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    packing = {name: inputs[name] for name in PACKING if isinstance(inputs.get(name), torch.Tensor)}
    return SideTokens(_mask(inputs.get("attention_mask")), ids, _num_sequences(ids, embeds), packing)


def _mask(value: Any) -> torch.Tensor | None:
    """Masks may hold the number of a packed sample instead of 1: what is not 0 counts."""
    if not isinstance(value, torch.Tensor) or not 2 <= value.dim() <= 4:
        return None
    return value.ne(0) if value.dim() < 4 else _visible(value).flatten(1, 2).any(dim=1)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """Of a mask over pairs of tokens: floats are added to attention scores."""
    return mask >= 0 if mask.is_floating_point() else mask.ne(0)


def _num_sequences(ids: torch.Tensor | None, embeds: torch.Tensor | None) -> int | None:
    if ids is not None:
        return math.prod(ids.shape[:-1])
    return None if embeds is None else math.prod(embeds.shape[:-2])


def _packed_starts(packing: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Of each argument that may tell, where it has a sequence start, besides the row's first token, `(B, S)`."""
    positions, mask = packing.get("position_ids"), packing.get("attention_mask")
    if positions is not None and positions.dim() == 2:
        yield _changes(positions[:, 1:] <= positions[:, :-1])  # they start again
    if (ends := packing.get("cu_seq_lens_q")) is not None and positions is not None:
        yield torch.isin(torch.arange(positions.numel(), device=ends.device), ends).reshape(positions.shape)
    if mask is not None and mask.dim() == 2 and not mask.is_floating_point() and mask.dtype != torch.bool:
        yield _changes((mask[:, 1:] != mask[:, :-1]) & (mask[:, 1:] > 1))  # the number of the sequence
    if mask is not None and mask.dim() == 4 and mask.shape[-1] == mask.shape[-2]:
        yield _changes(~_visible(mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)))


def _changes(differs: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(differs[:, :1]), differs], dim=1)
