"""The part of a receipt that tells an operation on experts: what a person reads of it, and the card of its result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_sparse_moe.checkpoints.files import MODULES_NAME
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME
from hf_sparse_moe.upcycling.surgery_checks import last_surgery, weights_sha256


# What is rendered again stands between these; what a person writes outside stays.
CARD_BEGIN, CARD_END = "<!-- hf-sparse-moe: generated", "<!-- /hf-sparse-moe: generated -->"
_DONE = {
    "pruned": "without some of the experts of",
    "merged": "with the experts merged of",
    "to_dense": "dense, made of the experts of",
}


def describe_operation(receipt: Mapping[str, Any]) -> dict[str, str]:
    """
    What the last operation of a receipt says, by name: its source, method, experts, sizes and losses. What is not as
    this package writes it is left out; empty where there was no operation.
    """
    operation = last_surgery(receipt)
    made = _mapping(receipt.get(operation or ""))
    source, losses, chosen = (_mapping(made.get(name)) for name in ("source", "loss", "groups"))
    chosen = _mapping(made.get("kept")) or chosen
    experts = [len(each) for each in chosen.values() if isinstance(each, list)]
    facts = {
        "made of": f"{source.get('name_or_path') or 'a model'} ({source.get('architecture')})" if source else None,
        "operation": f"{operation} by {made.get('method') or made.get('factor') or 'copies'}" if made else None,
        "experts": f"{' or '.join(map(str, sorted(set(experts))))} in {len(experts)} layers" if experts else None,
        "experts a token": made.get("num_experts_per_tok") if operation == "expanded" else None,
        "parameters": _change(made.get("parameters"), "{:,}"),
        "bytes": _change(made.get("bytes"), "{:,}"),
        **{f"loss on {group}, in nats": _change(each, "{:.4f}") for group, each in losses.items()},
    }
    return {_plain(name): _plain(value) for name, value in facts.items() if value}


def surgery_card(receipt: Mapping[str, Any], architecture: str, measured: Mapping[str, Any] | None = None) -> str:
    """Markdown of a class of transformers: what it is, what it came from, at which price; and what was measured."""
    facts = describe_operation(receipt)
    price = "" if any(name.startswith("loss") for name in facts) else "What it lost was not measured. "
    facts |= {_plain(name): _plain(value) for name, value in (measured or {}).items()}
    done = _DONE[str(last_surgery(receipt))]
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return f"""A `{_plain(architecture)}` of transformers {done} a mixture, by hf-sparse-moe.
It inherits the biases of its source. {price}`receipt.json` says how it was made.

| | |
| --- | --- |
{rows}"""


def card_metadata(embeds: bool) -> dict[str, Any]:
    """Of the card of what is no mixture of this package; `embeds` where it is a model of sentence-transformers."""
    tags = ["hf-sparse-moe", "expert-surgery"]
    if not embeds:
        return {"library_name": "transformers", "tags": tags}
    library = "sentence-transformers"
    return {"library_name": library, "pipeline_tag": "sentence-similarity", "tags": [*tags, library]}


def write_receipt(receipt: dict[str, Any], folder: Path) -> None:
    """Of a folder that holds all else. What no other checkpoint holds (means, noise) is there with its hash."""
    operation = last_surgery(receipt)
    if operation in ("merged", "to_dense", "expanded"):
        receipt[operation]["weights_sha256"] = weights_sha256(folder)
    (folder / RECEIPT_NAME).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def write_card(receipt: Mapping[str, Any], folder: Path, name: str, architecture: str) -> None:
    """The README.md of what is no mixture of this package."""
    metadata = card_metadata((folder / MODULES_NAME).is_file())
    state = json.dumps({"repo_id": name, "metadata": metadata})
    generated = f"{CARD_BEGIN} {state} -->\n{surgery_card(receipt, architecture)}{CARD_END}\n"
    head = ModelCardData(**metadata).to_yaml()
    (folder / "README.md").write_text(f"---\n{head}\n---\n\n# {name}\n\n{generated}", encoding="utf-8")


def _plain(text: object) -> str:
    """Without what a terminal or Markdown would obey: a receipt may come from anybody."""
    return re.sub(r"[^\w ./:@,()>-]", "", str(text))[:200]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _change(value: object, form: str) -> str | None:
    numbers = [_mapping(value).get(when) for when in ("before", "after")]
    return " -> ".join(map(form.format, numbers)) if all(isinstance(each, int | float) for each in numbers) else None
