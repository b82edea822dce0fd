"""Which class of which family a dense model becomes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from hf_sparse_moe.models.configuration_sparse_moe import (
    SparseMoeConfig,
    SparseMoeDecoderConfig,
    SparseMoeEncoderConfig,
    SparseMoeEncoderDecoderConfig,
)
from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel


# Dense class names by Auto class. BERT's language model for generation is in two of them: the first that fits counts.
_NAMES: dict[str, Any] = {
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
}

# First words of the names of sub-configs that belong to a part which reads or writes no text.
_OTHER_SENSES = ("vision", "audio", "image", "video", "speech", "acoustic")


def check_not_quantised(config: PreTrainedConfig, name: str) -> None:
    """Raise a `ValueError` for the config of a model whose weights are packed."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    method = getattr(method, "quant_method", method)
    raise ValueError(
        f"`{name}` is quantised ({getattr(method, 'value', method)}). Pass the checkpoint that it was quantised "
        "from, or, where transformers can undo it, what the loaded model's `dequantize()` returns."
    )


def sparse_config_class(config: PreTrainedConfig, architecture: str | None = None) -> type[SparseMoeConfig]:
    """
    The family of a dense config; the dense class, `architecture`, decides where a model type can be of two. Raises a
    `ValueError` for what is not a dense text model.
    """
    if isinstance(config, SparseMoeConfig):
        raise ValueError(f"`{config.model_type}` is a mixture already. Pass a dense checkpoint.")
    check_not_quantised(config, config.name_or_path or config.model_type)
    model_type = config.model_type
    other_sense = _other_sense(config)
    if other_sense is not None:
        raise ValueError(
            f"`model_type={model_type!r}` is multimodal: its config has `{other_sense}`. Pass a text model, such as "
            "the language model inside it."
        )
    if config.is_encoder_decoder:
        return SparseMoeEncoderDecoderConfig
    masked, causal = (_NAMES[f"AutoModelFor{head}"] for head in ("MaskedLM", "CausalLM"))
    writes = architecture in _values(causal) and architecture not in _values(masked)
    if model_type in masked and not getattr(config, "is_decoder", False) and not writes:
        return SparseMoeEncoderConfig
    if model_type in causal:
        return SparseMoeDecoderConfig
    raise ValueError(
        f"`model_type={model_type!r}` is no text model that transformers can train as a masked, causal or "
        "sequence-to-sequence language model. Pass one that is."
    )


def sparse_class(config: PreTrainedConfig, architecture: str | None) -> type[SparseMoePreTrainedModel]:
    """The class that a dense checkpoint becomes: the same head where the family has it, else its language model."""
    classes = AUTO_CLASSES[sparse_config_class(config, architecture)]
    by_name = {auto_class.__name__: model_class for auto_class, model_class in classes.items()}
    for auto_name, names in _NAMES.items():
        if auto_name in by_name and architecture in _values(names):
            return by_name[auto_name]
    return next(by_name[name] for name in _NAMES if name in by_name)


def _other_sense(config: PreTrainedConfig) -> str | None:
    """The name of a sub-config, at any depth, of a part that reads or writes no text."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    for name, part in parts.items():
        if part is not None and name.partition("_")[0] in _OTHER_SENSES:
            return name
        if isinstance(part, PreTrainedConfig) and (inside := _other_sense(part)) is not None:
            return inside
    return None


def _values(names: dict) -> set[str]:
    return {each for value in names.values() for each in ([value] if isinstance(value, str) else value)}
