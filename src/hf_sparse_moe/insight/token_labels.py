"""How tokens are written for a reader: visible spaces, and bytes that are no letter by themselves."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .measurement import Measurement, Tokens


BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


def token_labels(tokenizer: Any, measured: Measurement) -> dict[int, str]:
    """Each id that occurs, as input or as prediction."""
    ids = {
        int(v)
        for tokens in measured.tokens.values()
        for part in (tokens.ids, tokens.predicted)
        for v in np.unique(part)
    }
    return {v: _label(tokenizer, v) for v in ids if v >= 0}


def _label(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" in text and piece and all(letter in BYTE_OF for letter in piece):
        return " ".join(f"{BYTE_OF[letter]:02X}" for letter in piece)
    if not text or "\ufffd" in text:
        return str(piece)
    if not text.startswith(" ") and str(piece).startswith("▁"):
        text = f" {text}"
    shown = re.sub(" {2,}", lambda spaces: f"␣{len(spaces[0])}", text.translate(VISIBLE))
    return "␣" + shown[1:] if shown.startswith(" ") else shown


def shown_text(tokens: Tokens, texts: list[str], labels: dict[int, str], rows: range) -> list[str]:
    """
    What stands on the page for each token of one text: its characters with the space before them, so that the text
    reads as it was, or its label. Of several tokens that make one character, the first shows it, the others a dot.
    """
    shown, end = [], None
    text = texts[int(tokens.text[rows.start])] if rows else ""
    for row in rows:
        start, stop = tokens.span[row].tolist()
        if start < 0:
            shown.append(labels[int(tokens.ids[row])])
        elif end is not None and stop <= end:
            shown.append("·")
        else:
            shown.append(text[start if end is None else end : stop])
            end = stop
    return shown
