"""What `run_qa.py` is made of: questions as rows, contexts as windows, and the answer that the windows give."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


Answer = tuple[int, int]  # from and to (not included), in characters of the context
NO_TOKEN = (-1, -1)  # the place in the context of what is no token of it


def question_rows(data: Dataset) -> Dataset:
    """One row a question: what SQuAD's own files nest (articles, paragraphs, questions) is laid out flat."""
    if "data" in data.column_names and "question" not in data.column_names:  # a whole file, in one row or in many
        files = [row if isinstance(row, list) else [row] for row in data["data"]]
        data = Dataset.from_list(list(chain(*files)))
    if "paragraphs" not in data.column_names:
        return data
    rows = [
        {"context": paragraph.get("context"), "question": question.get("question"), "answers": question.get("answers")}
        for article in data
        for paragraph in article["paragraphs"] or ()
        for question in paragraph.get("qas") or ()
    ]
    return Dataset.from_list(rows)


Answers = dict[str, list] | list[dict] | None  # a mapping of lists, as SQuAD's data sets have it, or its files' list


def answer_pairs(answers: Answers) -> list[tuple[str | None, int | None]]:
    """The texts of a row's answers, and where they are said to stand."""
    if isinstance(answers, dict):
        texts = answers["text"] or []
        return list(zip(texts, answers.get("answer_start") or [None] * len(texts), strict=True))
    return [(answer["text"], answer.get("answer_start")) for answer in answers or ()]


def are_answers(value: Any) -> bool:
    """Whether a row's answers have one of the two forms."""
    try:
        pairs = answer_pairs(value)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    in_lists = not (isinstance(value, dict) and isinstance(value["text"], str))
    return in_lists and all(isinstance(text, str | None) and isinstance(start, int | None) for text, start in pairs)


def answer_texts(answers: Answers) -> list[str]:
    """The texts of a row's answers."""
    return [text for text, _ in answer_pairs(answers) if text]


def find_answer(context: str, answers: Answers) -> Answer | None:
    """
    Where the first answer that the context has stands in it: at its `answer_start`, or else its first occurrence. None
    where the context has none of them.
    """
    pairs = answer_pairs(answers)
    for text, start in pairs:
        if text and start is not None and start >= 0 and context.startswith(text, start):
            return start, start + len(text)
    places = [(context.find(text), text) for text, _ in pairs if text]
    return next(((start, start + len(text)) for start, text in places if start >= 0), None)


def is_unanswerable(answers: Answers) -> bool:
    """Whether a question has no answer in its context, as some of SQuAD 2's."""
    return not answer_texts(answers)


def windows(
    rows: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str, str],
    length: int,
    stride: int,
) -> dict[str, list]:
    """
    Question and context as tokens; a long context as several windows.

    Args:
        rows (`dict[str, list]`): Their columns by name.
        indices (`list[int]`): Their places in the data set.
        tokenizer (`PreTrainedTokenizerBase`): A fast one.
        columns (`tuple[str, str, str]`): The names of context, question and answers.
        length (`int`): Tokens of a window at most, the question among them: at most its half, the rest is cut off.
        stride (`int`): Tokens of the context that a window shares with the one before.

    Returns:
        `dict[str, list]`: columns with an entry a window. `row` is its row's index, `places` where each
        token stands in the context, `start_positions` and `end_positions` the first and the last token of the answer;
        both are `empty`, that of the class token, where the window does not hold all of it.
    """
    contexts, questions, answers = (rows[name] for name in columns)
    questions = [(question or "").lstrip() for question in questions]
    offsets = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    most = length // 2
    questions = [
        question[: places[most - 1][1]] if len(places) > most else question
        for question, places in zip(questions, offsets, strict=True)
    ]
    batch = tokenizer(
        questions,
        contexts,
        max_length=length,
        truncation="only_second",
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    row_of, offsets = batch.pop("overflow_to_sample_mapping"), batch.pop("offset_mapping")
    found: dict[str, list] = {**batch, "row": [indices[row] for row in row_of], "places": [], "empty": []}
    found |= {"start_positions": [], "end_positions": []}
    for window, row in enumerate(row_of):
        parts, ids = batch.sequence_ids(window), batch["input_ids"][window]
        places = [tuple(place) if part == 1 else NO_TOKEN for part, place in zip(parts, offsets[window], strict=True)]
        empty = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        answer = find_answer(contexts[row], answers[row])
        first, last = token_span(places, answer) or (empty, empty)
        for name, value in (("places", places), ("empty", empty), ("start_positions", first), ("end_positions", last)):
            found[name].append(value)
    return found


def token_span(places: list[Answer], answer: Answer | None) -> tuple[int, int] | None:
    """The first and the last token of an answer, where a window has all of it."""
    if answer is None:
        return None
    inside = [index for index, (start, end) in enumerate(places) if answer[0] < end and start < answer[1]]
    whole = inside and places[inside[0]][0] <= answer[0] and answer[1] <= places[inside[-1]][1]
    return (inside[0], inside[-1]) if whole else None


def best_answer(
    context: str,
    scored: Iterable[tuple[np.ndarray, np.ndarray, list[Answer], int]],
    max_answer_length: int,
    null_threshold: float | None,
) -> str:
    """
    The part of a context whose first and last token have the highest scores in all.

    Args:
        scored (`Iterable`): Of each window the scores of its tokens as the first and as the last of the answer, their
            places in the context and the place of the class token, as [`windows`] has them.
        max_answer_length (`int`): Tokens of an answer at most.
        null_threshold (`float`, *optional*): The answer is empty where the class token's score exceeds it by more than
            this in every window. None where every question has an answer.
    """
    best, answer, empty_score = -np.inf, NO_TOKEN, np.inf
    for starts, ends, places, empty in scored:
        empty_score = min(empty_score, starts[empty] + ends[empty])
        of_context, count = np.array(places)[:, 0] >= 0, len(places)
        if not of_context.any():
            continue
        pairs = np.add.outer(starts[:count], ends[:count])
        allowed = np.tri(count, k=max_answer_length - 1, dtype=bool) & np.tri(count, dtype=bool).T
        pairs[~(allowed & of_context[:, None] & of_context)] = -np.inf
        first, last = np.unravel_index(pairs.argmax(), pairs.shape)
        if pairs[first, last] > best:
            best, answer = pairs[first, last], (places[first][0], places[last][1])
    if answer == NO_TOKEN or (null_threshold is not None and empty_score - best > null_threshold):
        return ""
    return context[slice(*answer)]


def with_answers(data: Dataset, columns: tuple[str, str, str]) -> Dataset:
    """The rows that a model can get right: their context has an answer, or they say that it has none."""
    context, _, answers = columns

    def has_it(row: dict[str, Any]) -> bool:
        return is_unanswerable(row[answers]) or find_answer(row[context], row[answers]) is not None

    return data.filter(has_it, desc="Looking for the answers")
