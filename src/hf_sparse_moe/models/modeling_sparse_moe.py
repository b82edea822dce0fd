"""The classes of the three families. They differ in the Auto class inside, the arguments and the task loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Cache,
    GenerationMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from .configuration_sparse_moe import (
    SparseMoeConfig,
    SparseMoeDecoderConfig,
    SparseMoeEncoderConfig,
    SparseMoeEncoderDecoderConfig,
)
from .losses import (
    causal_lm_loss,
    language_model_loss,
    multiple_choice_loss,
    one_label_a_span,
    question_answering_loss,
    sequence_classification_loss,
    shifted_labels,
    span_labels,
)
from .outputs import (
    SparseMoeCausalLMOutput,
    SparseMoeDecoderModelOutput,
    SparseMoeEncoderDecoderModelOutput,
    SparseMoeEncoderModelOutput,
    SparseMoeMaskedLMOutput,
    SparseMoeMultipleChoiceOutput,
    SparseMoeQuestionAnsweringOutput,
    SparseMoeSeq2SeqLMOutput,
    SparseMoeSeq2SeqQuestionAnsweringOutput,
    SparseMoeSeq2SeqSequenceClassifierOutput,
    SparseMoeSequenceClassifierOutput,
    SparseMoeTokenClassifierOutput,
)
from .pretrained_model import SparseMoePreTrainedModel


def with_answer_span(forward: Callable) -> Callable:
    """The `forward` of a family with the ends of an answer span, `(B,)` each, in the place of `labels`."""

    @wraps(forward)
    def span_forward(self, *args, start_positions=None, end_positions=None, **kwargs):
        return forward(self, *args, labels=span_labels(start_positions, end_positions), **kwargs)

    # Trainer reads from the signature which columns a model takes, and which of them are labels.
    signature = inspect.signature(forward)
    ends = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=torch.LongTensor | None)
        for name in ("start_positions", "end_positions")
    ]
    *given, other = (parameter for name, parameter in signature.parameters.items() if name != "labels")
    given = [one if one.name == "self" else one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in given]
    span_forward.__doc__ = "As the family's other classes; `start_positions` and `end_positions` are the answer span."
    vars(span_forward)["__signature__"] = signature.replace(parameters=[*given, *ends, other])
    return span_forward


class SparseMoeEncoderPreTrainedModel(SparseMoePreTrainedModel):
    config_class = SparseMoeEncoderConfig
    family_side: ClassVar[str] = "encoder"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """
        The dense model's forward. In training `loss` is the task loss plus the balance losses; in evaluation it is the
        task loss alone.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 for pads, which never count as load.
            labels (`torch.Tensor`, *optional*): As the dense head takes them; -100 is ignored.
            output_router_logits (`bool`, *optional*): Return `router_logits` and `aux_loss`.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Labels of the whole optimizer step, all
                micro-batches and ranks; the losses of its micro-batches then sum to the loss of the whole.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        return self._run(inputs, labels, num_items_in_batch, output_router_logits, return_dict)


class SparseMoeEncoderModel(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder without a head."""

    dense_auto_class = AutoModel
    output_class = SparseMoeEncoderModelOutput


class SparseMoeEncoderForMaskedLM(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with the dense model's masked-language-model head."""

    dense_auto_class = AutoModelForMaskedLM
    output_class = SparseMoeMaskedLMOutput
    compute_task_loss = staticmethod(language_model_loss)


class SparseMoeEncoderForSequenceClassification(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with a sequence-classification (or regression) head."""

    dense_auto_class = AutoModelForSequenceClassification
    output_class = SparseMoeSequenceClassifierOutput
    compute_task_loss = staticmethod(sequence_classification_loss)


class SparseMoeEncoderForTokenClassification(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with a token-classification head."""

    dense_auto_class = AutoModelForTokenClassification
    output_class = SparseMoeTokenClassifierOutput
    compute_task_loss = staticmethod(language_model_loss)


class SparseMoeEncoderForMultipleChoice(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with a multiple-choice head; inputs are `(B, choices, S)`."""

    dense_auto_class = AutoModelForMultipleChoice
    output_class = SparseMoeMultipleChoiceOutput
    compute_task_loss = staticmethod(multiple_choice_loss)


class SparseMoeEncoderForQuestionAnswering(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with an extractive question-answering head."""

    dense_auto_class = AutoModelForQuestionAnswering
    output_class = SparseMoeQuestionAnsweringOutput
    compute_task_loss = staticmethod(question_answering_loss)
    counted_labels = staticmethod(one_label_a_span)
    forward = with_answer_span(SparseMoeEncoderPreTrainedModel.forward)


class SparseMoeDecoderPreTrainedModel(SparseMoePreTrainedModel):
    config_class = SparseMoeDecoderConfig
    family_side: ClassVar[str] = "decoder"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """
        The dense model's forward. In training `loss` is the task loss plus the balance losses; in evaluation it is the
        task loss alone.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 for pads, which never count as load.
            labels (`torch.Tensor`, *optional*): As the dense head takes them, for a causal LM not yet shifted; -100 is
                ignored.
            output_router_logits (`bool`, *optional*): Return `router_logits` and `aux_loss`.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Labels of the whole optimizer step, all
                micro-batches and ranks; the losses of its micro-batches then sum to the loss of the whole.
            **kwargs: Further inputs of the dense model, and `shift_labels`, which replaces `labels` where a collator
                has put each at the token that predicts it (packed and distributed sequences).
        """
        # Not an argument of its own: Trainer would take every argument with "label" in its name for required.
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        shifted = shift_labels is not None
        labels = shift_labels if shifted else labels
        return self._run(inputs, labels, num_items_in_batch, output_router_logits, return_dict, shifted)


class SparseMoeDecoderModel(SparseMoeDecoderPreTrainedModel):
    """A sparse decoder without a head."""

    dense_auto_class = AutoModel
    output_class = SparseMoeDecoderModelOutput


class SparseMoeDecoderForCausalLM(SparseMoeDecoderPreTrainedModel, GenerationMixin):
    """A sparse decoder with the dense model's language-model head."""

    dense_auto_class = AutoModelForCausalLM
    output_class = SparseMoeCausalLMOutput
    compute_task_loss = staticmethod(causal_lm_loss)
    counted_labels = staticmethod(shifted_labels)

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        return self.dense.prepare_inputs_for_generation(*args, **kwargs)


class SparseMoeDecoderForSequenceClassification(SparseMoeDecoderPreTrainedModel):
    """A sparse decoder with a sequence-classification (or regression) head on the last token."""

    dense_auto_class = AutoModelForSequenceClassification
    output_class = SparseMoeSequenceClassifierOutput
    compute_task_loss = staticmethod(sequence_classification_loss)


class SparseMoeDecoderForTokenClassification(SparseMoeDecoderPreTrainedModel):
    """A sparse decoder with a token-classification head."""

    dense_auto_class = AutoModelForTokenClassification
    output_class = SparseMoeTokenClassifierOutput
    compute_task_loss = staticmethod(language_model_loss)


class SparseMoeDecoderForQuestionAnswering(SparseMoeDecoderPreTrainedModel):
    """A sparse decoder with an extractive question-answering head."""

    dense_auto_class = AutoModelForQuestionAnswering
    output_class = SparseMoeQuestionAnsweringOutput
    compute_task_loss = staticmethod(question_answering_loss)
    counted_labels = staticmethod(one_label_a_span)
    forward = with_answer_span(SparseMoeDecoderPreTrainedModel.forward)


class SparseMoeEncoderDecoderPreTrainedModel(SparseMoePreTrainedModel):
    config_class = SparseMoeEncoderDecoderConfig
    family_side: ClassVar[str] = "decoder"  # told by the module tree instead, see `feed_forward_side`
    labels_are_targets: ClassVar[bool] = False  # whether the labels are what the decoder writes

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: tuple | ModelOutput | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """
        The dense model's forward. In training `loss` is the task loss plus the balance losses; in evaluation it is the
        task loss alone.

        Args:
            attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 for pads, which never count as load.
            decoder_input_ids (`torch.LongTensor`, *optional*): Made from `labels` where those are the targets.
            decoder_attention_mask (`torch.Tensor`, *optional*): As `attention_mask`, for the decoder. Without it, the
                positions with a label count as load, or those that are no pads.
            labels (`torch.Tensor`, *optional*): As the dense head takes them; -100 is ignored.
            output_router_logits (`bool`, *optional*): Return `router_logits` and `aux_loss`.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Labels of the whole optimizer step, all
                micro-batches and ranks; the losses of its micro-batches then sum to the loss of the whole.
        """
        if (
            self.labels_are_targets
            and labels is not None
            and decoder_input_ids is None
            and decoder_inputs_embeds is None
        ):
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "encoder_outputs": encoder_outputs,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        return self._run(inputs, labels, num_items_in_batch, output_router_logits, return_dict)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels one place to the right behind the start token, -100 as pads. `labels` (B, S)."""
        if hasattr(self.dense, "prepare_decoder_input_ids_from_labels"):
            return self.dense.prepare_decoder_input_ids_from_labels(labels)
        # M2M-100 and Blenderbot shift inside their forward only, which is never given labels here.
        start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
        shifted = labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)
        return torch.cat([start, shifted], dim=1)


class SparseMoeEncoderDecoderModel(SparseMoeEncoderDecoderPreTrainedModel):
    """A sparse encoder-decoder without a head."""

    dense_auto_class = AutoModel
    output_class = SparseMoeEncoderDecoderModelOutput


class SparseMoeEncoderDecoderForConditionalGeneration(SparseMoeEncoderDecoderPreTrainedModel, GenerationMixin):
    """A sparse encoder-decoder with the dense model's language-model head: translation, summarization, ..."""

    dense_auto_class = AutoModelForSeq2SeqLM
    output_class = SparseMoeSeq2SeqLMOutput
    labels_are_targets = True
    compute_task_loss = staticmethod(language_model_loss)

    def __init__(self, config: SparseMoeEncoderDecoderConfig):
        super().__init__(config)
        # By its name transformers takes the class for one that shifts its labels, and Trainer would miscount them.
        self.loss_type = "ForMaskedLM"

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        return self.dense.prepare_inputs_for_generation(*args, **kwargs)


class SparseMoeEncoderDecoderForSequenceClassification(SparseMoeEncoderDecoderPreTrainedModel):
    """A sparse encoder-decoder with a sequence-classification (or regression) head."""

    dense_auto_class = AutoModelForSequenceClassification
    output_class = SparseMoeSeq2SeqSequenceClassifierOutput
    compute_task_loss = staticmethod(sequence_classification_loss)


class SparseMoeEncoderDecoderForQuestionAnswering(SparseMoeEncoderDecoderPreTrainedModel):
    """A sparse encoder-decoder with an extractive question-answering head."""

    dense_auto_class = AutoModelForQuestionAnswering
    output_class = SparseMoeSeq2SeqQuestionAnsweringOutput
    compute_task_loss = staticmethod(question_answering_loss)
    counted_labels = staticmethod(one_label_a_span)
    forward = with_answer_span(SparseMoeEncoderDecoderPreTrainedModel.forward)


AUTO_CLASSES: dict[type[SparseMoeConfig], dict[type, type[SparseMoePreTrainedModel]]] = {
    SparseMoeEncoderConfig: {
        AutoModel: SparseMoeEncoderModel,
        AutoModelForMaskedLM: SparseMoeEncoderForMaskedLM,
        AutoModelForSequenceClassification: SparseMoeEncoderForSequenceClassification,
        AutoModelForTokenClassification: SparseMoeEncoderForTokenClassification,
        AutoModelForQuestionAnswering: SparseMoeEncoderForQuestionAnswering,
        AutoModelForMultipleChoice: SparseMoeEncoderForMultipleChoice,
    },
    SparseMoeDecoderConfig: {
        AutoModel: SparseMoeDecoderModel,
        AutoModelForCausalLM: SparseMoeDecoderForCausalLM,
        AutoModelForSequenceClassification: SparseMoeDecoderForSequenceClassification,
        AutoModelForTokenClassification: SparseMoeDecoderForTokenClassification,
        AutoModelForQuestionAnswering: SparseMoeDecoderForQuestionAnswering,
    },
    SparseMoeEncoderDecoderConfig: {
        AutoModel: SparseMoeEncoderDecoderModel,
        AutoModelForSeq2SeqLM: SparseMoeEncoderDecoderForConditionalGeneration,
        AutoModelForSequenceClassification: SparseMoeEncoderDecoderForSequenceClassification,
        AutoModelForQuestionAnswering: SparseMoeEncoderDecoderForQuestionAnswering,
    },
}

# `save_pretrained` copies the code of a class that is registered so, and writes it into the config's `auto_map`.
for _config_class, _classes in AUTO_CLASSES.items():
    _config_class.register_for_auto_class("AutoConfig")
    for _auto_class, _model_class in _classes.items():
        _model_class.register_for_auto_class(_auto_class.__name__)

# By this list of names Trainer's label smoothing knows a class whose labels it must shift. What it adds here is not
# looked up otherwise: the Auto classes ask their own register first.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SparseMoeDecoderConfig.model_type] = SparseMoeDecoderForCausalLM.__name__
