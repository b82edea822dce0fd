"""What an upcycling did, and the measured proof of what it kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedModel

from hf_sparse_moe.checkpoints.hashes import source_files
from hf_sparse_moe.checkpoints.source import Source
from hf_sparse_moe.experts.tuning import fixed_choice
from hf_sparse_moe.models.configuration_sparse_moe import SparseMoeConfig
from hf_sparse_moe.models.modeling_sparse_moe import SparseMoeEncoderForMultipleChoice
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from hf_sparse_moe.models.size import count_flops_per_token, count_parameters

from .recipe import Recipe


PROBE_LENGTH = 32
NOT_MEASURED = {"note": "not measured here: run `hf-sparse-moe verify`"}


def probe_inputs(config: transformers.PreTrainedConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """One fixed sequence of ordinary tokens, shape (1, 32), ending with the end token where there is one."""
    vocab_size, eos = config.get_text_config().vocab_size, getattr(config, "eos_token_id", None)
    generator = torch.Generator().manual_seed(0)
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    special += eos if isinstance(eos, list) else []
    ordinary = torch.tensor([token for token in range(vocab_size) if token not in special])
    input_ids = ordinary[torch.randint(len(ordinary), (1, PROBE_LENGTH), generator=generator)]
    if isinstance(eos, int) and 0 <= eos < vocab_size:
        input_ids[:, -1] = eos
    input_ids = input_ids.to(device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return inputs | ({"decoder_input_ids": input_ids} if config.is_encoder_decoder else {})


@torch.no_grad()
def output_difference(dense: PreTrainedModel, sparse: SparseMoePreTrainedModel) -> dict[str, Any]:
    """Max and mean absolute difference of the first output (logits, or last hidden states) on the probe, eval mode."""
    inputs = probe_inputs(dense.config, dense.device)
    if isinstance(sparse, SparseMoeEncoderForMultipleChoice):  # the one head whose inputs are (B, choices, S)
        inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
    outputs = []
    for model in (dense, sparse):
        training = model.training
        with fixed_choice():
            outputs.append(model.eval()(**inputs)[0].double())
        model.train(training)
    if outputs[0].shape != outputs[1].shape:
        raise ValueError(
            f"The outputs have the shapes {tuple(outputs[0].shape)} and {tuple(outputs[1].shape)}: the mixture was "
            "not made of this dense model."
        )
    difference = (outputs[0] - outputs[1]).abs()
    return {
        "probe_tokens": PROBE_LENGTH,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "max_abs_difference": difference.max().item(),
        "mean_abs_difference": difference.mean().item(),
        "max_abs_output": outputs[0].abs().max().item(),
    }


def allowed_difference(measured: dict[str, Any], dtype: torch.dtype) -> float:
    """
    How far the outputs of an exact method may be apart: float32 rounds some hundred times on its way through a model,
    and in fewer bits a factor on the weights, such as a granularity, may round.
    """
    return max(2e-5, torch.finfo(dtype).eps) * measured["max_abs_output"]


def check_equality(measured: dict[str, Any], is_exact: bool, dtype: torch.dtype) -> None:
    """
    Raise a `ValueError` for outputs that are no numbers, or that an exact method did not keep: a mixture with `dtype`
    weights, measured in a dtype whose rounding adds up over the layers.
    """
    difference, computed_in = measured["max_abs_difference"], getattr(torch, measured["dtype"])
    if not math.isfinite(difference):
        raise ValueError("The dense model, or the mixture made of it, computes NaN or infinite outputs.")
    coarse = max((dtype, computed_in), key=lambda each: torch.finfo(each).eps)
    allowed = allowed_difference(measured, coarse) * (1 if coarse in (torch.float32, torch.float64) else 16)
    if torch.get_float32_matmul_precision() != "highest":
        allowed = max(allowed, 1e-2 * measured["max_abs_output"])
    if is_exact and difference > allowed:
        raise ValueError(
            f"The mixture should compute what the dense model computes, but its outputs differ by {difference:.1e}, "
            f"where {allowed:.1e} is allowed: the dense model is not what its class and config say. Pass a plain one, "
            "without adapters, hooks or quantisation."
        )


def name_of(dense: PreTrainedModel, source: Source | None) -> str | None:
    """What to call a dense model: its Hub id, or its folder's own name."""
    return source.name if source else Path(dense.config.name_or_path or "").name or None


def describe_source(
    dense: PreTrainedModel, source: Source | None, sha256: dict[str, str] | None = None
) -> dict[str, Any]:
    """Where a dense model comes from; hashes, unless they are given, only where it was read from files."""
    if sha256 is None:
        sha256 = source_files(source.folder) if source else {}
    return {
        "name_or_path": name_of(dense, source),
        "revision": source.revision if source else None,
        "architecture": type(dense).__name__,
        "model_type": dense.config.model_type,
        "sha256": sha256,
    }


def versions() -> dict[str, str]:
    """Of what made a mixture."""
    from hf_sparse_moe import __version__

    torch_version = torch.__version__.split("+")[0]
    return {"hf_sparse_moe": __version__, "transformers": transformers.__version__, "torch": torch_version}


def make_receipt(
    dense: PreTrainedModel,
    sparse: SparseMoePreTrainedModel,
    source: Source | None,
    recipe: Recipe,
    fields: dict[str, Any],
    sha256: dict[str, str] | None = None,
) -> dict[str, Any]:
    """
    The receipt of `dense`, read from `source` or handed over as a model, becoming `sparse` with the config `fields`
    that were asked for. A dense model without storage is not compared with the mixture. `sha256` are the hashes of the
    source's files, where they are known already.
    """
    equality = NOT_MEASURED
    if dense.device.type != "meta":
        equality = output_difference(dense, sparse)
        check_equality(equality, recipe.initialization.is_exact(cast(SparseMoeConfig, sparse.config)), sparse.dtype)
    return {
        "source": describe_source(dense, source, sha256),
        "arguments": {"method": recipe.method, "seed": recipe.seed, **recipe.options, **fields},
        "exact": recipe.initialization.exact,
        "versions": versions(),
        "parameters": {
            "dense": dense.num_parameters(),
            "total": count_parameters(sparse),
            "active": count_parameters(sparse, only_active=True),
        },
        "flops_per_token": count_flops_per_token(sparse),
        "equality": equality,
    }
