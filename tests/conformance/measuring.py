"""One (model type, head) of the installed transformers, upcycled: exact, not applicable, or unsupported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as hf
from transformers.models.auto import modeling_auto

from conformance.overrides import LENGTHS, NOT_BUILT, NOTES, REFUSED
from conformance.tiny_configs import VOCAB_SIZE, tiny_config
from hf_sparse_moe import SparseMoePreTrainedModel, upcycle
from hf_sparse_moe.checkpoints.families import sparse_config_class
from hf_sparse_moe.models.feed_forward import explain_layouts
from hf_sparse_moe.models.moe_block import SparseMoeBlock
from tiny_models import FIRST_ORDINARY_TOKEN, enlarge_weights


TOLERANCE = 2e-5  # of the largest logit, float32
EXACT, NOT_APPLICABLE, UNSUPPORTED = "exact", "not applicable", "unsupported"

HEADS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, hf.AutoModelForCausalLM),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, hf.AutoModelForMaskedLM),
    "seq2seq": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, hf.AutoModelForSeq2SeqLM),
}
PAIRS = [
    (model_type, head)
    for head, (names, _) in HEADS.items()
    for model_type in names
    if not model_type.startswith("sparse_moe_")  # ours, which stands there for Trainer's label smoothing
]


@dataclass(frozen=True)
class Result:
    """
    Args:
        status (`str`): `EXACT`, `NOT_APPLICABLE` or `UNSUPPORTED`.
        detail (`str`): The layouts, or the reason.
        difference (`float`, *optional*): The largest difference of the logits, relative to the largest logit.
    """

    model_type: str
    head: str
    status: str
    detail: str
    difference: float | None = None


def measure(model_type: str, head: str) -> Result:
    """
    Build the type tiny, upcycle it by copy, compare the logits, and train it one step.

    Raises:
        AssertionError: upcycled, but not exact, or not trainable.
    """
    if model_type in NOT_BUILT:
        return Result(model_type, head, NOT_APPLICABLE, NOT_BUILT[model_type])
    auto_class = HEADS[head][1]
    config = tiny_config(model_type, head)
    with torch.device("meta"):
        shape = auto_class.from_config(config)
    report = explain_layouts(shape)
    if report.obstacle is not None and "already" in report.obstacle:
        return Result(model_type, head, NOT_APPLICABLE, "a mixture of experts already")
    try:
        sparse_config_class(shape.config, type(shape).__name__)
    except ValueError as refusal:
        reason = "multimodal" if "multimodal" in str(refusal) else "no text model"
        return Result(model_type, head, NOT_APPLICABLE, f"{reason}; refused by name")
    if not report.supported:
        status, reason = REFUSED[model_type]
        return Result(model_type, head, status, reason)
    assert model_type not in REFUSED, f"{model_type} is supported now: take it out of REFUSED"

    hidden_experts = any("experts" in name for name in type(shape.config).__dataclass_fields__)
    assert model_type in NOTES or not hidden_experts, f"{model_type} can be a mixture: shrink it to one, or add a note"
    layouts = ", ".join(f"{len(paths)} {layout}" for layout, paths in report.matches.items())
    return Result(model_type, head, EXACT, layouts, _check(model_type, head))


def _check(model_type: str, head: str) -> float:
    dense = enlarge_weights(HEADS[head][1].from_config(tiny_config(model_type, head))).eval()
    sparse = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    # The order of additions differs between backends, and hrm_text, which runs its layers again and again, magnifies
    # rounding: one backend for evaluation and training.
    sparse.set_experts_implementation("sparse_moe")
    difference = _compare(dense, sparse, model_type)
    _train_one_step(sparse, model_type)
    return difference


def _inputs(config: hf.PreTrainedConfig, model_type: str) -> dict[str, torch.Tensor]:
    shape = (2, LENGTHS.get(model_type, 16))
    input_ids = torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE - 1, shape, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = input_ids.flip(0)
    return inputs


@torch.no_grad()
def _compare(dense: hf.PreTrainedModel, sparse: SparseMoePreTrainedModel, model_type: str) -> float:
    """The largest difference relative to the largest logit; the experts must matter, and every copy serve."""
    inputs = _inputs(dense.config, model_type)
    seen: list[tuple[SparseMoeBlock, torch.Size]] = []
    hooks = [
        block.register_forward_pre_hook(lambda block, args: seen.append((block, args[0].shape)))
        for block in sparse.sparse_blocks
    ]
    expected, computed = dense(**inputs).logits, sparse(**inputs).logits
    for hook in hooks:
        hook.remove()
    rows = len(inputs["input_ids"])
    for block, shape in seen:
        batch_first = len(shape) < 3 or shape[0] == rows
        assert batch_first or block.sequence_first, f"add {model_type} to SEQUENCE_FIRST: its layers see {shape}"
    largest = expected.abs().max()
    difference = ((computed - expected).abs().max() / largest).item()
    assert largest > 0.1, "outputs this small would hide a difference"
    assert difference <= TOLERANCE, f"differs by {difference:.1e} of the largest logit, {largest:.1f}"
    down_projections = [block.experts.down_proj for block in sparse.sparse_blocks]
    kept = [weight.clone() for weight in down_projections]
    for weight in down_projections:
        weight.zero_()
    without_experts = sparse(**inputs).logits
    assert (without_experts - expected).abs().max() > 100 * TOLERANCE * largest, "the experts do not matter"
    for weight, value in zip(down_projections, kept, strict=True):
        weight.copy_(value)
    return difference


def _train_one_step(sparse: SparseMoePreTrainedModel, model_type: str) -> None:
    """The loss is finite, and each parameter of each expert that got a token gets a gradient."""
    inputs = _inputs(sparse.config, model_type)
    inputs.pop("decoder_input_ids", None)
    served: dict[torch.nn.Module, set[int]] = {}

    def note(experts: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        _, top_k_index, top_k_weights = arguments  # a weight may be so small that it is 0
        served.setdefault(experts, set()).update(top_k_index[top_k_weights > 0].unique().tolist())

    hooks = [block.experts.register_forward_pre_hook(note) for block in sparse.sparse_blocks]
    loss = sparse.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert loss.isfinite(), f"loss {loss}"
    assert len(served) == len(hooks), "a sparse layer got no token"
    for experts, numbers in served.items():
        for name, parameter in experts.named_parameters(recurse=False):
            assert parameter.grad is not None, f"{name}: no gradient"
            assert parameter.grad.isfinite().all(), f"{name}: gradient not finite"
            idle = [number for number in numbers if not parameter.grad[number].any()]
            assert not idle, f"{name}: experts {idle} got tokens but no gradient"
