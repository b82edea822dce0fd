"""A card is rendered again and again; what a person wrote in it stays."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_sparse_moe.surgery.receipts import CARD_BEGIN, CARD_END

from .card_metadata import LISTS, words


START, END = CARD_BEGIN, CARD_END
# Cards that a library wrote and nobody edited: there is nothing of a person's in them.
_STOCK_CARDS = (
    "This model card has been generated automatically according to the information the Trainer had access to",
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub",
)
_DERIVED = ("library_name", "base_model", "base_model_relation", "pipeline_tag")  # by a library
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?\n|)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_GENERATED = re.compile(rf"{START} (\{{.*?\}}) -->.*?{END}", re.DOTALL)


@dataclass(frozen=True)
class WrittenWords:
    """
    What a person wrote in a card.

    Args:
        metadata (`dict`): At its head.
        above (`str`): Above the generated part, with the title.
        below (`str`): Below it.
        repo_id (`str`, *optional*): The name that the card was rendered for.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    above: str = ""
    below: str = "\n"
    repo_id: str | None = None


def read_words(card: str) -> WrittenWords:
    """
    What a person wrote in a card, whoever made it: this package, another library, or that person.

    Raises:
        ValueError: metadata that are no YAML mapping, or a marker without its counterpart.
    """
    metadata, body = _split(card)
    if START in body or END in body:
        try:
            if not body.count(START) == body.count(END) == 1:
                raise ValueError("not one of each")
            (found,) = _GENERATED.finditer(body)
            state = json.loads(found[1])
            own = _not_in(metadata, dict(state["metadata"]))
            return WrittenWords(own, body[: found.start()], body[found.end() :], str(state["repo_id"]))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"README.md needs one `{START} ... -->`, unchanged, and one `{END}` around what is rendered again. "
                "Restore them, or delete both to keep all of its text as your own."
            ) from error
    if any(text in body for text in _STOCK_CARDS) or _is_of_peft(body):
        return WrittenWords({name: value for name, value in metadata.items() if name not in _DERIVED})
    if metadata.get("library_name") in ("transformers", "peft"):
        del metadata["library_name"]
    return WrittenWords(metadata, body.rstrip("\n") + "\n\n")


def join(repo_id: str, generated: str, derived: Mapping[str, Any], cards: list[WrittenWords]) -> str:
    """
    The body of a card: what is rendered, between its two markers, and what a person wrote. Of several cards the first
    with words is taken, or a later one that has the same and more.
    """
    title = f"# {repo_id}\n"
    cards = [replace(words, above=words.above.replace(f"# {words.repo_id}\n", title, 1)) for words in cards]
    written = [words for words in cards if words.above.strip() not in ("", title.strip()) or words.below.strip()]
    kept = written[0] if written else WrittenWords(above=f"{title}\n")
    for later in written:
        if kept.above.strip() in later.above and kept.below.strip() in later.below:
            kept = later
    state = json.dumps({"repo_id": repo_id, "metadata": dict(derived)})
    state = state.replace("<", "\\u003c").replace(">", "\\u003e")
    return f"{kept.above}{START} {state} -->\n{generated}{END}{kept.below}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card.lstrip("\n")
    try:
        metadata = yaml.safe_load(found[1])
        # `eval_results` is an attribute of `ModelCardData`, and never a key of a card
        known = {str(name): value for name, value in (metadata or {}).items() if name != "eval_results"}
    except (yaml.YAMLError, RecursionError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"The head of README.md is not a YAML mapping, `name: value` ({reason}). Repair it."
        ) from error
    return known, card[found.end() :].lstrip("\n")


def _not_in(metadata: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that differ from those that this package derived when it rendered the card."""
    kept = {name: value for name, value in metadata.items() if value != derived.get(name)}
    for name in LISTS:
        if name in kept:
            kept[name] = [word for word in words(kept[name]) if word not in words(derived.get(name))]
    return kept


def _is_of_peft(body: str) -> bool:
    """Whether there is no line but those that PEFT writes beside an adapter: an unfilled template, and a version."""
    template = ModelCard.from_template(ModelCardData()).text
    own = {line.strip() for line in body.splitlines()} - {line.strip() for line in template.splitlines()}
    return all(re.fullmatch(r"(### Framework versions|- PEFT [\w.]+)?", line) for line in own)
