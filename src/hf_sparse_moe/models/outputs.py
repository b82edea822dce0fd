"""The dense models' outputs with two fields more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import modeling_outputs


@dataclass
class RoutingFields:
    """
    Args:
        aux_loss (`torch.FloatTensor`, *optional*): The load-balancing loss, mean over the sparse layers, unscaled:
            1 when balanced. Present in training while a coefficient is above 0 and routers learn, and with
            `output_router_logits`.
        router_logits (`tuple[torch.FloatTensor]`, *optional*): One entry of shape `(T, E)` a sparse layer, pads
            included, encoder before decoder. Present with `output_router_logits`.
        task_loss (`torch.FloatTensor`, *optional*): `loss` without the balance losses. Present with labels, in
            training while a coefficient is above 0 and routers learn; else `loss` is the task loss.
        z_loss (`torch.FloatTensor`, *optional*): The router z-loss, mean over the sparse layers, unscaled. Present
            where `aux_loss` is, while its coefficient is above 0.
    """

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    task_loss: torch.FloatTensor | None = None
    z_loss: torch.FloatTensor | None = None


@dataclass
class SparseMoeEncoderModelOutput(RoutingFields, modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions):
    pass


@dataclass
class SparseMoeDecoderModelOutput(RoutingFields, modeling_outputs.BaseModelOutputWithPastAndCrossAttentions):
    pass


@dataclass
class SparseMoeEncoderDecoderModelOutput(RoutingFields, modeling_outputs.Seq2SeqModelOutput):
    pass


@dataclass
class SparseMoeMaskedLMOutput(RoutingFields, modeling_outputs.MaskedLMOutput):
    pass


@dataclass
class SparseMoeCausalLMOutput(RoutingFields, modeling_outputs.CausalLMOutputWithCrossAttentions):
    pass


@dataclass
class SparseMoeSeq2SeqLMOutput(RoutingFields, modeling_outputs.Seq2SeqLMOutput):
    pass


@dataclass
class SparseMoeSequenceClassifierOutput(RoutingFields, modeling_outputs.SequenceClassifierOutputWithPast):
    pass


@dataclass
class SparseMoeSeq2SeqSequenceClassifierOutput(RoutingFields, modeling_outputs.Seq2SeqSequenceClassifierOutput):
    pass


@dataclass
class SparseMoeTokenClassifierOutput(RoutingFields, modeling_outputs.TokenClassifierOutput):
    pass


@dataclass
class SparseMoeMultipleChoiceOutput(RoutingFields, modeling_outputs.MultipleChoiceModelOutput):
    pass


@dataclass
class SparseMoeQuestionAnsweringOutput(RoutingFields, modeling_outputs.QuestionAnsweringModelOutput):
    pass


@dataclass
class SparseMoeSeq2SeqQuestionAnsweringOutput(RoutingFields, modeling_outputs.Seq2SeqQuestionAnsweringModelOutput):
    pass
