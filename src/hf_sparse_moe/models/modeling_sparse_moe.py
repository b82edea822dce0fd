"""The classes of the three families. They differ in the Auto class inside, the arguments and the task loss."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
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


class AnswerSpan:
    """`forward` with the ends of an answer span in the place of `labels`."""

    dense_auto_class = AutoModelForQuestionAnswering
    compute_task_loss = question_answering_loss
    counted_labels = staticmethod(one_label_a_span)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ModelOutput | tuple:
        """As the family's other classes; `start_positions` and `end_positions`, `(B,)` each, are the answer span."""
        return super().forward(
            input_ids,
            attention_mask,
            *args,
            labels=span_labels(start_positions, end_positions),
            output_router_logits=output_router_logits,
            num_items_in_batch=num_items_in_batch,
            return_dict=return_dict,
            **kwargs,
        )


class SparseMoeEncoderPreTrainedModel(SparseMoePreTrainedModel):
    config_class = SparseMoeEncoderConfig
    family_side: ClassVar[str] = "encoder"


class SparseMoeEncoderModel(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder without a head."""

    output_class = SparseMoeEncoderModelOutput


class SparseMoeEncoderForMaskedLM(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with the dense model's masked-language-model head."""

    dense_auto_class = AutoModelForMaskedLM
    output_class = SparseMoeMaskedLMOutput
    compute_task_loss = language_model_loss


class SparseMoeEncoderForSequenceClassification(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with a sequence-classification (or regression) head."""

    dense_auto_class = AutoModelForSequenceClassification
    output_class = SparseMoeSequenceClassifierOutput
    compute_task_loss = sequence_classification_loss


class SparseMoeEncoderForTokenClassification(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with a token-classification head."""

    dense_auto_class = AutoModelForTokenClassification
    output_class = SparseMoeTokenClassifierOutput
    compute_task_loss = language_model_loss


class SparseMoeEncoderForMultipleChoice(SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with a multiple-choice head; inputs are `(B, choices, S)`."""

    dense_auto_class = AutoModelForMultipleChoice
    output_class = SparseMoeMultipleChoiceOutput
    compute_task_loss = multiple_choice_loss


class SparseMoeEncoderForQuestionAnswering(AnswerSpan, SparseMoeEncoderPreTrainedModel):
    """A sparse encoder with an extractive question-answering head."""

    output_class = SparseMoeQuestionAnsweringOutput


class SparseMoeDecoderPreTrainedModel(SparseMoePreTrainedModel):
    config_class = SparseMoeDecoderConfig
    family_side: ClassVar[str] = "decoder"


class SparseMoeDecoderModel(SparseMoeDecoderPreTrainedModel):
    """A sparse decoder without a head."""

    output_class = SparseMoeDecoderModelOutput


class SparseMoeDecoderForCausalLM(SparseMoeDecoderPreTrainedModel, GenerationMixin):
    """A sparse decoder with the dense model's language-model head."""

    dense_auto_class = AutoModelForCausalLM
    output_class = SparseMoeCausalLMOutput
    compute_task_loss = language_model_loss
    counted_labels = staticmethod(shifted_labels)

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        return self.dense.prepare_inputs_for_generation(*args, **kwargs)


class SparseMoeDecoderForSequenceClassification(SparseMoeDecoderPreTrainedModel):
    """A sparse decoder with a sequence-classification (or regression) head on the last token."""

    dense_auto_class = AutoModelForSequenceClassification
    output_class = SparseMoeSequenceClassifierOutput
    compute_task_loss = sequence_classification_loss


class SparseMoeDecoderForTokenClassification(SparseMoeDecoderPreTrainedModel):
    """A sparse decoder with a token-classification head."""

    dense_auto_class = AutoModelForTokenClassification
    output_class = SparseMoeTokenClassifierOutput
    compute_task_loss = language_model_loss


class SparseMoeDecoderForQuestionAnswering(AnswerSpan, SparseMoeDecoderPreTrainedModel):
    """A sparse decoder with an extractive question-answering head."""

    output_class = SparseMoeQuestionAnsweringOutput


class SparseMoeEncoderDecoderPreTrainedModel(SparseMoePreTrainedModel):
    config_class = SparseMoeEncoderDecoderConfig
    family_side: ClassVar[str] = "decoder"  # told by the module tree instead, see `feed_forward_side`

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

    output_class = SparseMoeEncoderDecoderModelOutput


class SparseMoeEncoderDecoderForConditionalGeneration(SparseMoeEncoderDecoderPreTrainedModel, GenerationMixin):
    """A sparse encoder-decoder with the dense model's language-model head: translation, summarization, ..."""

    dense_auto_class = AutoModelForSeq2SeqLM
    output_class = SparseMoeSeq2SeqLMOutput
    labels_are_targets = True
    compute_task_loss = language_model_loss

    def __init__(self, config: SparseMoeEncoderDecoderConfig, **dense_arguments):
        super().__init__(config, **dense_arguments)
        # By its name transformers takes the class for one that shifts its labels, and Trainer would miscount them.
        self.loss_type = "ForMaskedLM"

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        return self.dense.prepare_inputs_for_generation(*args, **kwargs)


class SparseMoeEncoderDecoderForSequenceClassification(SparseMoeEncoderDecoderPreTrainedModel):
    """A sparse encoder-decoder with a sequence-classification (or regression) head."""

    dense_auto_class = AutoModelForSequenceClassification
    output_class = SparseMoeSeq2SeqSequenceClassifierOutput
    compute_task_loss = sequence_classification_loss


class SparseMoeEncoderDecoderForQuestionAnswering(AnswerSpan, SparseMoeEncoderDecoderPreTrainedModel):
    """A sparse encoder-decoder with an extractive question-answering head."""

    output_class = SparseMoeSeq2SeqQuestionAnsweringOutput


AUTO_CLASSES: dict[type[SparseMoeConfig], dict[type, type[SparseMoePreTrainedModel]]] = {
    family.config_class: {member.dense_auto_class: member for member in family.family_classes()}
    for family in (
        SparseMoeEncoderPreTrainedModel,
        SparseMoeDecoderPreTrainedModel,
        SparseMoeEncoderDecoderPreTrainedModel,
    )
}

# `save_pretrained` copies the code of a class that is registered so, and writes it into the config's `auto_map`.
for _config_class, _classes in AUTO_CLASSES.items():
    _config_class.register_for_auto_class("AutoConfig")
    for _auto_class, _model_class in _classes.items():
        _model_class.register_for_auto_class(_auto_class.__name__)

# By this list of names Trainer's label smoothing knows a class whose labels it must shift. What it adds here is not
# looked up otherwise: the Auto classes ask their own register first.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SparseMoeDecoderConfig.model_type] = SparseMoeDecoderForCausalLM.__name__
