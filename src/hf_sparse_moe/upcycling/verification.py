"""`verify`: is a checkpoint still what its receipt says, measured against the one that it was made of?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_sparse_moe.checkpoints.config import read_config
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.hashes import source_files
from hf_sparse_moe.checkpoints.loading import load_dense, load_sparse, load_whole
from hf_sparse_moe.checkpoints.source import Source, find_source, named_architecture
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME

from .initialization import INITIALIZATION_METHODS
from .measuring import as_batches, labelled, task_losses
from .receipt import allowed_difference, output_difference
from .surgery_checks import VERDICTS, check_surgery, last_surgery


@dataclass(frozen=True)
class Verification:
    """
    What [`verify`] measured.

    Args:
        passed (`bool`): Whether the mixture is what its receipt says, which may be less than the dense model's equal.
        promised (`bool`): Whether that says that it computes what the dense model computes.
        findings (`tuple[str, ...]`): A sentence for each check.
        promise (`str`): When the method keeps the function, in its own words.
        measured (`dict`): The difference to the dense model in `"float32"` and `"as_stored"`.
        recorded (`dict`, *optional*): The receipt's measurement, where it holds one.
        loss (`dict`, *optional*): The task loss of both models, where there was `evaluation`.
        operation (`str`, *optional*): `"pruned"`, `"merged"`, `"expanded"`, `"more_layers"` or `"to_dense"` where that
            was held against its source.
    """

    passed: bool
    promised: bool
    findings: tuple[str, ...]
    promise: str
    measured: dict[str, dict[str, Any]]
    recorded: dict[str, Any] | None
    loss: dict[str, float] | None
    operation: str | None = None

    @property
    def verdict(self) -> str:
        """What was verified, in words."""
        if not self.passed:
            return f"not verified: the {'model' if self.operation else 'mixture'} is not what its receipt says"
        if self.operation:
            return VERDICTS[self.operation]
        if self.promised:
            return "verified: the mixture computes what its dense model computes, as the receipt promises"
        return (
            "verified against its receipt, whose method does not promise what the dense model computes: train the "
            "mixture before use"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "findings": list(self.findings), "verdict": self.verdict}


def verify(
    source: str | Path,
    dense: str | Path,
    *,
    evaluation: Iterable[Any] | None = None,
    revision: str | None = None,
    dense_revision: str | None = None,
    token: bool | str | None = None,
) -> Verification:
    """
    Measure the largest and mean difference between a mixture and its dense model on the receipt's probe, and compare
    with the receipt: its numbers, its promise of equality, its hashes of the source.

    Both models are loaded, and measured in the mixture's own dtype, as the receipt was, and in float32. What
    [`prune_experts`], [`merge_experts`], [`expand`] and [`to_dense`] wrote, or [`upcycle`] of a mixture, is held
    against the mixture that it was made of: the receipt's experts and hashes, all tensors that should be the same, and
    the outputs where the receipt promises them.

    Args:
        source (`str` or `Path`): Folder or Hub id of a mixture with a receipt, or of a dense model made of one.
        dense (`str` or `Path`): Folder or Hub id of the checkpoint that it was made of, dense but after a surgery.
        evaluation (`Iterable`, *optional*): Batches of text to measure the task loss of both models on, as for
            [`upcycle`].
        revision, dense_revision (`str`, *optional*): Branch, tag or commit of Hub ids.
        token (`bool` or `str`, *optional*): For the Hub; defaults to that of `hf auth login`.

    Returns:
        [`Verification`]: `report.verdict` says in words what was verified, `report.findings` how. A method that does
        not promise equality passes with any loss.

    Raises:
        ValueError: not a mixture, no receipt, or a checkpoint of another architecture.

    Example:
        ```python
        report = verify("qwen3-8x", "Qwen/Qwen3-0.6B")
        assert report.passed, report.findings
        ```
    """
    found = find_source(source, revision, token=token)
    dense_source = find_source(dense, dense_revision, token=token)
    told = read_json(found.folder / RECEIPT_NAME, optional=True)
    if operation := last_surgery(told):
        made_of = told.get("source")
        original = made_of.get("architecture") if isinstance(made_of, dict) else None
        if named_architecture(read_config(dense_source)) != original:
            return _verify_surgery(operation, told[operation], found, dense_source, evaluation)
    sparse = load_sparse(found)
    receipt = sparse.receipt
    method = INITIALIZATION_METHODS.get(((receipt or {}).get("arguments") or {}).get("method", ""))
    if receipt is None or method is None:
        raise ValueError(f"`{source}` has no receipt of an upcycling, so there is nothing to verify it by.")
    stored_dtype = sparse.dtype  # what the dense weights were rounded to
    dense_model = load_dense(dense_source, stored_dtype)
    if type(dense_model).__name__ != receipt["source"]["architecture"]:
        raise ValueError(
            f"`{dense}` is a {type(dense_model).__name__}, but `{source}` was made of a "
            f"{receipt['source']['architecture']}. Pass the dense checkpoint that the receipt names."
        )
    texts = None
    if evaluation is not None:

        def find_tokenizer() -> Any:
            return AutoTokenizer.from_pretrained(dense_source.folder, trust_remote_code=False)

        texts = labelled(type(sparse).__name__, as_batches("evaluation", evaluation, find_tokenizer))
    # First as stored: `float` leaves a model's float32 buffers as they are, the way back would not.
    as_stored = output_difference(dense_model, sparse)
    is_packed = getattr(sparse, "is_quantized", False)
    sparse = sparse.dequantize() if is_packed else sparse
    exactly = output_difference(dense_model.float(), sparse.float())
    recorded = receipt["equality"] if "max_abs_difference" in receipt["equality"] else None
    if recorded is not None:
        numbers = [recorded.get(name) for name in ("max_abs_difference", "mean_abs_difference", "max_abs_output")]
        dtype = getattr(torch, str(recorded.get("dtype")), None)
        if not all(isinstance(number, int | float) for number in numbers) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"The `equality` in the receipt of `{source}` is no measurement. Fetch it again.")
    promised = method.is_exact(sparse.config) and not is_packed
    promise = f"{method.exact}, but the experts are packed" if is_packed else method.exact
    findings = [
        _equality(exactly, promised, promise, stored_dtype),
        _reproduction(as_stored, recorded),
        _hashes(receipt["source"]["sha256"], source_files(dense_source.folder)),
    ]
    loss = None
    if texts is not None:
        loss = task_losses({"dense": dense_model, "mixture": sparse}, texts)
        findings.append(_same_loss(loss, promised, stored_dtype))
    return Verification(
        passed=all(kept for kept, _ in findings),
        promised=promised,
        findings=tuple(sentence for _, sentence in findings),
        promise=promise,
        measured={"float32": exactly, "as_stored": as_stored},
        recorded=recorded,
        loss=loss,
    )


def _verify_surgery(
    operation: str, made: Any, result: Source, source: Source, evaluation: Iterable[Any] | None
) -> Verification:
    made_of = made.get("source") if isinstance(made, dict) else None
    if not isinstance(made_of, dict) or not isinstance(made_of.get("sha256"), dict):
        raise ValueError(f"The receipt of `{result.name}` does not say what its source is. Fetch it again.")
    before, after = load_whole(source.folder), load_whole(result.folder)
    if type(before).__name__ != made_of.get("architecture"):
        raise ValueError(
            f"`{source.name}` is a {type(before).__name__}, but `{result.name}` was made of a "
            f"{made_of.get('architecture')}. Pass the checkpoint that the receipt names."
        )
    loss = None
    if evaluation is not None:

        def find_tokenizer() -> Any:
            return AutoTokenizer.from_pretrained(result.folder, trust_remote_code=False)

        texts = labelled(type(after).__name__, as_batches("evaluation", evaluation, find_tokenizer))
        loss = task_losses({"before": before, "after": after}, texts)
    findings, measured = check_surgery(operation, made, after, before, result.folder)
    findings.append(_hashes(made_of["sha256"], source_files(source.folder), "source"))
    if loss:
        counted = f"Task loss on the text given, mean of {loss['labels']} labels"
        findings.append((True, f"{counted}: before {loss['before']:.4f}, after {loss['after']:.4f}."))
    return Verification(
        passed=all(kept for kept, _ in findings),
        promised=made.get("exact", operation == "pruned"),
        findings=tuple(sentence for _, sentence in findings),
        promise=VERDICTS[operation],
        measured=measured,
        recorded=made.get("loss"),
        loss=loss,
        operation=operation,
    )


def _equality(measured: dict[str, Any], promised: bool, promise: str, dtype: torch.dtype) -> tuple[bool, str]:
    difference, allowed = measured["max_abs_difference"], allowed_difference(measured, dtype)
    told = f"the outputs differ by at most {difference:.1e} (on average {measured['mean_abs_difference']:.1e})"
    if not promised:
        reach = f"where they reach {measured['max_abs_output']:.1f}"
        return True, f"The method does not promise equality ({promise}); {told}, {reach}."
    kept = difference <= allowed
    verdict = "as promised" if kept else f"but should differ by at most {allowed:.1e}"
    return kept, f"The method promises equality ({promise}): {told}, {verdict}."


def _reproduction(measured: dict[str, Any], recorded: dict[str, Any] | None) -> tuple[bool, str]:
    if recorded is None:
        return True, "The receipt holds no measurement to compare with."
    slack = allowed_difference(recorded, getattr(torch, recorded["dtype"]))
    names = ("max_abs_difference", "mean_abs_difference")
    kept = all(abs(measured[name] - recorded[name]) <= slack + 1e-3 * recorded[name] for name in names)
    then, now = recorded["max_abs_difference"], measured["max_abs_difference"]
    verdict = "" if kept else ", which is not the same"
    return kept, f"The receipt says {then:.1e} in {recorded['dtype']}; here it is {now:.1e}{verdict}."


def _same_loss(loss: dict[str, float], promised: bool, dtype: torch.dtype) -> tuple[bool, str]:
    more = loss["mixture"] - loss["dense"]
    kept = abs(more) <= 10 * allowed_difference({"max_abs_output": loss["dense"]}, dtype)
    told = (
        f"Task loss on the text given, mean of {loss['labels']} labels: dense {loss['dense']:.4f}, mixture "
        f"{loss['mixture']:.4f}"
    )
    if kept:
        return True, f"{told}."
    why = "the method promises the same" if promised else "the method does not promise the same"
    return not promised, f"{told}, which is {abs(more):.4f} {'higher' if more > 0 else 'lower'}; {why}."


def _hashes(recorded: dict[str, str], now: dict[str, str], what: str = "dense checkpoint") -> tuple[bool, str]:
    if not recorded:
        return True, f"The receipt holds no hashes: the {what} was not read from files."
    different = sorted(name for name in recorded | now if recorded.get(name) != now.get(name))
    if different:
        return False, f"The {what} is not the one of the receipt: `{different[0]}` differs."
    return True, f"The {what}'s {len(now)} files have the hashes of the receipt."
