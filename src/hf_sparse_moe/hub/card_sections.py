"""A card is rendered again and again; what a person wrote in it stays, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("template.md")
GENERATED = "<!-- Rendered by hf-sparse-moe"
# Cards that a library wrote and nobody edited: there is nothing of a person's in them.
STOCK_CARDS = (
    "This model card has been generated automatically according to the information the Trainer had access to",
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub",
)

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?\n|)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FREE = re.compile(r"<!-- free: ([\w-]+) -->(.*?)<!-- /free: \1 -->", re.DOTALL)
_MARKER = re.compile(r"<!-- (/?)free: ([\w-]+) -->")
_HEADING = re.compile(r" {0,3}#{1,2}(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*\r?\n?\Z")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+)[ \t]*\r?\n?\Z")
# A line that a row of = or - below does not make a heading of.
_NO_PARAGRAPH = re.compile(r"\s*(?:\Z|[#>|<]|[-*+]\s|\d+[.)]\s|=+\s*\Z|-+\s*\Z|`{3}|~{3})")
_PEFT_VERSION = re.compile(r"### Framework versions|- PEFT [\w.]+")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass
class Section:
    """
    A heading of the first or second level and what stands below it.

    Args:
        heading (`str`): Its text; empty for what stands above the first heading.
        text (`str`): Heading line and content, as they are.
    """

    heading: str
    text: str


def split_front_matter(card: str) -> tuple[dict, str]:
    """
    Metadata and body of a card.

    Raises:
        ValueError: the metadata is no YAML mapping.
    """
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The metadata at the head of README.md is no YAML ({reason}). Repair it.") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("The metadata at the head of README.md is no YAML mapping (`name: value`). Repair it.")
    return metadata or {}, card[found.end() :]


def keep_free_sections(new: str, old: str) -> str:
    """
    The body `new` with what a person wrote in the body `old`: the text of each free section that nobody wrote in
    `new`, and each section whose heading `new` does not have. A body that this package did not render is kept whole,
    in the free section `notes`.

    Args:
        new (`str`): Rendered from the template, with its markers.
        old (`str`): The body of a present card.

    Raises:
        ValueError: a free section in `old` lacks one of its markers, or a code block its end.
    """
    if not old.strip() or any(text in old for text in STOCK_CARDS) or _lines(old) == _lines(_peft_card()):
        return new
    if GENERATED not in old and not _MARKER.search(old):
        notes = dict(_FREE.findall(new))["notes"]
        return _fill(new, {"notes": f"{notes}{old}" if old.endswith("\n") else f"{notes}{old}\n"})
    _check_markers(old)
    sections = split_sections(new)
    places = {section.heading: place for place, section in enumerate(sections)}
    title = next(place for place, section in enumerate(sections) if GENERATED in section.text)
    foreign: dict[int, list[str]] = {}
    place = 0
    for section in split_sections(old):
        if GENERATED in section.text:
            place = title
        elif section.heading in places:
            place = places[section.heading]
        else:
            foreign.setdefault(place, []).append(section.text)
    blocks, defaults = dict(_FREE.findall(old)), _defaults()
    written = {name: text for name, text in _FREE.findall(new) if text != defaults.get(name)}
    parts = []
    for place, section in enumerate(split_sections(_fill(new, blocks | written))):
        parts += [section.text, *foreign.get(place, [])]
    present = {name for name, _ in _FREE.findall("".join(parts))}
    parts += [_block(name, text) + "\n" for name, text in blocks.items() if name not in present]
    return "".join(_separated(parts))


@cache
def _peft_card() -> str:
    """What PEFT writes beside each adapter that it saves: the template of `huggingface_hub`, unfilled."""
    return str(ModelCard.from_template(ModelCardData()).text)


def _lines(body: str) -> list[str]:
    """Without the line that names PEFT's version."""
    lines = (line.strip() for line in body.splitlines())
    return [line for line in lines if line and not _PEFT_VERSION.fullmatch(line)]


@cache
def _defaults() -> dict[str, str]:
    """What stands in the free sections before a person writes there."""
    return dict(_FREE.findall(TEMPLATE.read_text(encoding="utf-8")))


def split_sections(body: str) -> list[Section]:
    """
    The body's sections, first what stands above all headings; headings in code and in free sections do not count.

    Raises:
        ValueError: a code block that is never closed.
    """
    sections = [Section("", "")]
    free = [found.span() for found in _FREE.finditer(body)]
    position, previous, fence = 0, "", ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", body):
        if not any(start <= position < end for start, end in free):
            if fenced := _FENCE.match(line):
                if not fence:
                    fence = fenced[1]
                elif fenced[1].startswith(fence) and not line.strip().strip(fence[0]):
                    fence = ""
            elif not fence and (heading := _HEADING.match(line)):
                sections.append(Section((heading[1] or "").strip(), ""))
            elif not fence and _UNDERLINE.match(line) and not _NO_PARAGRAPH.match(previous):
                sections[-1].text = sections[-1].text.removesuffix(previous)
                sections.append(Section(previous.strip(), previous))
        sections[-1].text += line
        position, previous = position + len(line), line
    if fence:
        raise ValueError(f"README.md has a code block that is never closed. Put `{fence}` on the line below its end.")
    return sections


def _fill(body: str, blocks: dict[str, str]) -> str:
    return _FREE.sub(lambda found: _block(found[1], blocks.get(found[1], found[2])), body)


def _block(name: str, text: str) -> str:
    return f"<!-- free: {name} -->{text}<!-- /free: {name} -->"


def _check_markers(body: str) -> None:
    names = [name for name, _ in _FREE.findall(body)]
    stray = _MARKER.search(_FREE.sub("", body))
    nested = next((found for _, text in _FREE.findall(body) if (found := _MARKER.search(text))), None)
    twice = next((name for name in names if names.count(name) > 1), None)
    if broken := stray or nested:
        raise ValueError(
            f"README.md has `{broken[0]}` without its counterpart. A free section stands between "
            f"`<!-- free: {broken[2]} -->` and `<!-- /free: {broken[2]} -->`: put the missing one back."
        )
    if twice is not None:
        raise ValueError(f"README.md has two free sections named `{twice}`. Give one of them another name.")


def _separated(parts: list[str]) -> Iterator[str]:
    """A heading needs a line of its own, and is better read below an empty one; what stands there is not changed."""
    before = ""
    for part in parts:
        if before and part and not before.endswith("\n"):
            yield "\n"
        yield part
        before = part or before
