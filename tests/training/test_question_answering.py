"""Question answering: windows that lose no answer, the best span of all windows, and the recipe end to end."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from recipe import question_answering as qa
from training_runs import history, results


COLUMNS = ("context", "question", "answers")


def squad(text: str, *answers: str) -> dict:
    """As a data set of SQuAD has it."""
    return {"text": list(answers), "answer_start": [text.find(answer) for answer in answers]}


@pytest.fixture(scope="module")
def rows(texts) -> list[dict]:
    """What is the longest word? Real texts, and the answer from the text itself."""
    rows = []
    for number, text in enumerate(texts[:60]):
        longest = max(text.split(), key=len)
        rows.append({"id": str(number), "context": text, "question": "longest word?", "answers": squad(text, longest)})
    return rows


@pytest.fixture(scope="module")
def squad_file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("stride", [0, 8])
def test_windows_cover_the_context_and_hold_the_answer(stride, tokenizer, rows):
    batch = {name: [row[name] for row in rows] for name in COLUMNS}
    found = qa.windows(batch, list(range(100, 100 + len(rows))), tokenizer, COLUMNS, length=32, stride=stride)
    assert {len(ids) for ids in found["input_ids"]} <= set(range(33))
    covered = [set() for _ in rows]
    held = set()
    for row, places, empty, first, last in zip(
        *(found[name] for name in ("row", "places", "empty", "start_positions", "end_positions")), strict=True
    ):
        here = rows[row - 100]
        for start, end in places:
            covered[row - 100] |= set(range(start, end)) if start >= 0 else set()
        if first != empty:
            text = here["context"][places[first][0] : places[last][1]]
            assert here["answers"]["text"][0] in text
            assert len(text.split()) == 1
            held.add(row)
    assert all(seen == set(range(len(row["context"]))) for seen, row in zip(covered, rows, strict=True))
    for row, here in enumerate(rows, start=100):
        start, word = here["answers"]["answer_start"][0], here["answers"]["text"][0]
        places = tokenizer(here["context"], return_offsets_mapping=True)["offset_mapping"]
        if sum(start < last and first < start + len(word) for first, last in places) <= stride:
            assert row in held  # no longer than what two windows share


def test_a_question_longer_than_the_window_is_cut(tokenizer):
    batch = {"context": ["one two three"], "question": ["why " * 200], "answers": [squad("one two three", "two")]}
    found = qa.windows(batch, [0], tokenizer, COLUMNS, length=32, stride=4)
    assert all(len(ids) <= 32 for ids in found["input_ids"])
    assert any(first != empty for first, empty in zip(found["start_positions"], found["empty"], strict=True))


def test_where_an_answer_stands():
    text = "one two one"
    assert qa.find_answer(text, {"text": ["one"], "answer_start": [8]}) == (8, 11)
    assert qa.find_answer(text, [{"text": "one", "answer_start": 3}]) == (0, 3)  # not there: its first occurrence
    assert qa.find_answer(text, {"text": ["three", "two"]}) == (4, 7)
    assert qa.find_answer(text, {"text": ["three"], "answer_start": [0]}) is None
    assert qa.find_answer(text, []) is None
    assert qa.is_unanswerable({"text": [], "answer_start": []})
    assert qa.is_unanswerable({"text": None, "answer_start": None})
    assert not qa.is_unanswerable([{"text": "three"}])


def test_the_best_span_is_the_best_of_all_pairs():
    """Against each pair of tokens tried one by one."""
    generator = np.random.default_rng(0)
    context = "abcdefghij"
    places = [(-1, -1), (-1, -1), *((index, index + 1) for index in range(10))]
    for longest in (1, 3, 50):
        scored = [(*generator.normal(size=(2, 14)), places, 0) for _ in range(3)]  # 2 pads
        pairs = {
            (starts[first] + ends[last], places[first][0], places[last][1])
            for starts, ends, _, _ in scored
            for first in range(2, 12)
            for last in range(first, min(first + longest, 12))
        }
        _, start, end = max(pairs)
        assert qa.best_answer(context, scored, longest, None) == context[start:end]
        empty = min(starts[0] + ends[0] for starts, ends, _, _ in scored)
        margin = empty - max(pairs)[0]
        assert qa.best_answer(context, scored, longest, margin - 0.1) == ""
        assert qa.best_answer(context, scored, longest, margin + 0.1) == context[start:end]


def test_files_as_squad_has_them():
    nested = {
        "version": "v2.0",
        "data": [
            {
                "title": "a",
                "paragraphs": [
                    {
                        "context": "one two",
                        "qas": [
                            {"id": "1", "question": "?", "answers": [{"text": "two", "answer_start": 4}]},
                            {"id": "2", "question": "!", "answers": []},
                        ],
                    }
                ],
            }
        ],
    }
    flat = qa.question_rows(Dataset.from_list(nested["data"]))
    assert flat["question"] == ["?", "!"]
    assert [qa.find_answer(row["context"], row["answers"]) for row in flat] == [(4, 7), None]
    assert qa.question_rows(Dataset.from_list([{"version": "v2.0", "data": each} for each in nested["data"]]))[
        "question"
    ] == ["?", "!"]
    assert qa.question_rows(Dataset.from_list([nested]))["question"] == ["?", "!"]
    assert qa.question_rows(flat) is flat


def test_a_model_learns_to_answer(checkpoints, call_recipe, tmp_path):
    """One text and two questions of which each asks for another word of it, and a third that it does not answer."""
    text = "the red box holds a green ball"
    asked = {"first colour": ["red"], "second colour": ["green"], "last name": []}
    file = tmp_path / "rows.jsonl"
    lines = [{"context": text, "question": each, "answers": squad(text, *right)} for each, right in asked.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines * 8))
    call_recipe(
        "run_qa.py",
        model_name_or_path=checkpoints["decoder"],
        train_file=file,
        validation_file=file,
        max_length=64,
        max_steps=150,
        learning_rate=3e-3,
        save_strategy="no",
        output_dir=tmp_path / "out",
    )
    scores = results(tmp_path / "out")
    assert scores["eval_exact_match"] == scores["eval_f1"] == 100
    assert scores["eval_has_answer_f1"] == scores["eval_no_answer_accuracy"] == 100
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out").train(False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("second colour", text, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    span = slice(output.start_logits.argmax(), output.end_logits.argmax() + 1)
    assert tokenizer.decode(inputs["input_ids"][0, span]).strip() == "green"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "exact match and F1 (0 to 100) by SQuAD's rules" in card


@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_long_contexts_and_resume(family, checkpoints, squad_file, call_recipe, tmp_path):
    arguments = {
        "model_name_or_path": checkpoints[family],
        "train_file": squad_file,
        "validation_percentage": 20,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "output_dir": tmp_path / "out",
    }
    call_recipe("run_qa.py", **arguments, max_steps=2)
    call_recipe("run_qa.py", **arguments, max_steps=4)
    losses = [log["loss"] for log in history(tmp_path / "out") if "loss" in log]
    assert len(losses) == 4
    assert 0 <= results(tmp_path / "out")["eval_exact_match"] <= results(tmp_path / "out")["eval_f1"] <= 100


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"language": "fr"}, "`--language=fr` must be one of ('en', 'zh')"),
        ({"stride": 20}, "`--stride=20` must be from 0 to 13 where `--max_length` is 32"),
        ({"max_answer_length": 0}, "`--max_answer_length=0` must be at least 1"),
        ({"answers_column": "answer"}, "`--answers_column=answer` is no column"),
    ],
)
def test_one_sentence(arguments, sentence, checkpoints, squad_file, call_recipe, tmp_path, capsys):
    model = checkpoints["encoder"]
    with pytest.raises(SystemExit) as stop:
        call_recipe(
            "run_qa.py", model_name_or_path=model, train_file=squad_file, **arguments, output_dir=tmp_path / "out"
        )
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("answers", "two"),
        ("answers", ["two"]),
        ("answers", {"text": "two", "answer_start": 4}),
        ("answers", {"text": ["two"], "answer_start": [4, 8]}),
        ("answers", {"span": ["two"]}),
        ("context", None),
        ("question", 5),
    ],
)
def test_rows_of_another_form(column, value, checkpoints, call_recipe, tmp_path, capsys):
    row = {"context": "one two", "question": "?", "answers": squad("one two", "two"), column: value}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as stop:
        call_recipe(
            "run_qa.py", model_name_or_path=checkpoints["encoder"], validation_file=file, output_dir=tmp_path / "out"
        )
    assert stop.value.code == 2
    sentence = (
        rf"error: `--{column}_column={column}` must hold .* in every row: not so in 1 of 1 rows of the validation"
    )
    assert re.search(sentence, capsys.readouterr().err)


def test_answers_that_are_not_in_the_text(checkpoints, call_recipe, tmp_path, capsys, caplog):
    rows = [{"context": "one two three", "question": "?", "answers": {"text": [word]}} for word in ("two", "four")]
    file = tmp_path / "rows.jsonl"
    line = {"model_name_or_path": checkpoints["encoder"], "train_file": file, "max_steps": 1, "save_strategy": "no"}
    line["log_level"] = "warning"  # whatever another test left
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call_recipe("run_qa.py", **line, validation_file=file, output_dir=tmp_path / "some")
    for split in ("train", "validation"):
        assert caplog.text.count(f"1 of 2 rows of the {split} data are left out: their answer is not in the text") == 1
    assert json.loads((tmp_path / "some" / "training_record.json").read_text())["evaluation"]["data"][""]["rows"] == 1
    file.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_qa.py", **line, validation_percentage=0, output_dir=tmp_path / "none")
    assert stop.value.code == 2
    assert "No answer in `--answers_column=answers` of the train data is in its text" in capsys.readouterr().err
