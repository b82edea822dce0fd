"""A card is rendered again and again; what a person wrote in it stays."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .card_metadata import LISTS, words


START, END = "<!-- hf-sparse-moe: generated", "<!-- /hf-sparse-moe: generated -->"
# Cards that a library wrote and nobody edited: there is nothing of a person's in them.
_STOCK_CARDS = (
    "This model card has been generated automatically according to the information the Trainer had access to",
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub",
)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?\n|)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_GENERATED = re.compile(rf"{START} (\{{.*?\}}) -->.*?{END}", re.DOTALL)
_PEFT_VERSION = re.compile(r"### Framework versions|- PEFT [\w.]+")

# Cards of version 0.1 had sections of ours, and free ones between comments.
_OLD = "<!-- Rendered by hf-sparse-moe"
_OLD_HEADINGS = {
    *("Intended use", "What it changes", "How it was made", "Evaluation", "Router health", "Limits and risks"),
    *("How to load", "Fine-tune and adapt", "Merge and export", "Export", "Citation", "Versions", "Notes"),
}
_OLD_TAGS = {"moe", "sparse-moe", "encoder", "decoder", "encoder-decoder", "upcycled", "lora"}
_OLD_DEFAULTS = (
    "What it is meant for, and for whom: not recorded.",
    "Known failures, biases and misuse: not recorded.",
)
_OLD_FREE = re.compile(r"<!-- free: ([\w-]+) -->(.*?)<!-- /free: \1 -->", re.DOTALL)
_DERIVED = ("library_name", "base_model", "base_model_relation", "pipeline_tag")
_HEADING = re.compile(
    r"^ {0,3}(?:#{1,2}[ \t]+(.*?)(?:[ \t]+#+)?|(?![#>|<*+-])(\S.*)\r?\n {0,3}(?:=+|-{2,}))[ \t]*\r?$", re.MULTILINE
)
_CODE = re.compile(r"^ {0,3}(`{3,}|~{3,}).*?(?:^ {0,3}\1|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class WrittenWords:
    """
    What a person wrote in a card.

    Args:
        metadata (`dict`): At its head.
        above (`str`): Above the generated part, without the title that stands there by default.
        below (`str`): Below it.
        titled (`bool`): Whether that title stands there.
        repo_id (`str`, *optional*): The name that the card was rendered for.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    above: str = "\n"
    below: str = "\n"
    titled: bool = True
    repo_id: str | None = None

    def has_text(self) -> bool:
        """Whether there is any but metadata."""
        return bool(not self.titled or self.above.strip() or self.below.strip())


def read_words(card: str) -> WrittenWords:
    """
    What a person wrote in a card, whoever made it: this package, its version 0.1, another library, or that person.

    Raises:
        ValueError: metadata that are no YAML mapping, or a marker without its counterpart.
    """
    metadata, body = _split(card)
    found = _GENERATED.search(body)
    if body.count(START) != body.count(END) or body.count(START) > 1 or (START in body and not found):
        raise ValueError(
            f"README.md needs one `{START} ... -->` and one `{END}` around what is rendered again. Restore them, or "
            "delete both to keep all of its text as your own."
        )
    if found:
        above, below = body[: found.start()], body[found.end() :]
        try:
            state = dict(json.loads(found[1]))
            repo_id, derived = str(state["repo_id"]), dict(state["metadata"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"README.md has a changed `{START} ...` line. Delete both markers, or restore it."
            ) from error
        titled = above.lstrip().startswith(f"# {repo_id}\n")
        above = above.partition(f"# {repo_id}\n")[2] if titled else above
        return WrittenWords(_not_in(metadata, derived), above, below, titled, repo_id)
    if _OLD in body or _OLD_FREE.search(body):
        return _of_version_0_1(metadata, body)
    if not body.strip() or any(text in body for text in _STOCK_CARDS) or _lines(body) == _lines(_peft_card()):
        return WrittenWords({name: value for name, value in metadata.items() if name not in _DERIVED})
    if metadata.get("library_name") in ("transformers", "peft"):
        del metadata["library_name"]
    return WrittenWords(metadata, body.rstrip("\n") + "\n\n", titled=False)


def join(repo_id: str, generated: str, derived: Mapping[str, Any], cards: list[WrittenWords]) -> str:
    """
    The body of a card: what is rendered, between its two markers, and what a person wrote. Of several cards the first
    with words is taken, or a later one that has the same and more.
    """
    written = [words for words in cards if words.has_text()] or [WrittenWords()]
    kept = written[0]
    for later in written[1:]:
        if kept.above.strip() in later.above and kept.below.strip() in later.below:
            kept = later
    state = json.dumps({"repo_id": repo_id, "metadata": dict(derived)})
    state = state.replace("<", "\\u003c").replace(">", "\\u003e")
    title = f"# {repo_id}\n" if kept.titled else ""
    return f"{title}{kept.above}{START} {state} -->\n{generated}{END}{kept.below}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card.lstrip("\n")
    try:
        metadata = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The metadata at the head of README.md is not YAML ({reason}). Repair it.") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("The metadata at the head of README.md is no YAML mapping (`name: value`). Repair it.")
    # `eval_results` is an attribute of `ModelCardData`, and never a key of a card
    known = {str(name): value for name, value in (metadata or {}).items() if name != "eval_results"}
    return known, card[found.end() :].lstrip("\n")


def _not_in(metadata: Mapping[str, Any], derived: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that differ from those that this package derived when it rendered the card."""
    kept = {name: value for name, value in metadata.items() if value != derived.get(name)}
    for name in LISTS:
        if name in kept:
            kept[name] = [word for word in words(kept[name]) if word not in words(derived.get(name))]
    return kept


def _of_version_0_1(metadata: Mapping[str, Any], body: str) -> WrittenWords:
    free = {name: text for name, text in _OLD_FREE.findall(body) if text.strip() not in ("", *_OLD_DEFAULTS)}
    rest = _OLD_FREE.sub("", body)
    if stray := re.search(r"<!-- /?free: [\w-]+ -->", rest):
        raise ValueError(f"README.md has `{stray[0]}` without its counterpart. Put the missing one back.")
    above = free.pop("summary", "").strip()
    titles = {"intended-use": "## Intended use\n\n", "limits": "## Limits and risks\n\n", "notes": "## Notes\n\n"}
    texts = [titles.get(name, "") + text.strip() for name, text in free.items()]
    headings = list(_HEADING.finditer(_CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), rest)))
    ends = [*(heading.start() for heading in headings[1:]), len(rest)]
    for heading, end in zip(headings, ends, strict=True):
        section = rest[heading.start() : end]
        if (heading[1] or heading[2] or "").strip() not in _OLD_HEADINGS and _OLD not in section:
            texts.append(section.strip())
    title = re.match(r"\s*# (\S+)\n", body)
    own = {name: value for name, value in metadata.items() if name not in _DERIVED}
    own["tags"] = [tag for tag in words(own.get("tags")) if tag not in _OLD_TAGS]
    return WrittenWords(
        own,
        f"\n{above}\n\n" if above else "\n",
        "".join(f"\n\n{text}" for text in texts) + "\n",
        repo_id=title[1] if title else None,
    )


def _peft_card() -> str:
    """What PEFT writes beside each adapter that it saves: the template of `huggingface_hub`, unfilled."""
    return str(ModelCard.from_template(ModelCardData()).text)


def _lines(body: str) -> list[str]:
    """Without the line that names PEFT's version."""
    lines = (line.strip() for line in body.splitlines())
    return [line for line in lines if line and not _PEFT_VERSION.fullmatch(line)]
