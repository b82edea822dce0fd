"""Labels: which a model can learn, and how much each counts."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("weights", [None, "balanced"])
@pytest.mark.parametrize(("task", "dense"), [("texts", None), ("texts", True), ("tokens", None)])
def test_balanced_classes_count_the_same(task, dense, weights, checkpoints, call_recipe, tmp_path):
    """Where one text has label a in 9 of 12 rows, a model learns that share, or with weights a half."""
    words = ["one", "more", "word"]
    text = " ".join(words) if task == "texts" else words
    rows = [{"text": text, "label": label if task == "texts" else [label] * 3} for label in "a" * 9 + "b" * 3]
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["encoder"],
        train_file=write(tmp_path / "rows.jsonl", rows),
        validation_percentage=0,
        task=task,
        dense=dense,
        class_weights=weights,
        learning_rate=1e-2,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        max_steps=40,
        save_strategy="no",
        output_dir=tmp_path / "out",
    )
    auto_class = AutoModelForSequenceClassification if task == "texts" else AutoModelForTokenClassification
    model = auto_class.from_pretrained(tmp_path / "out").train(False)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(" ".join(words), return_tensors="pt")
    with torch.no_grad():
        share = model(**inputs).logits.softmax(dim=-1).reshape(-1, 2)[0, 0].item()
    assert share == pytest.approx(0.5 if weights else 0.75, abs=0.08)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "has ['new'] in the validation data and never in the training data"),
        ({"class_weights": "sqrt"}, "`--class_weights=sqrt` must be balanced"),
        ({"label_column": "number", "class_weights": "balanced"}, "`--class_weights` counts the classes"),
    ],
)
def test_one_sentence(arguments, sentence, checkpoints, call_recipe, tmp_path, capsys):
    rows = [{"text": "one more word", "label": label, "number": 0.5} for label in ("a", "b", "a", "b")]
    train = write(tmp_path / "train.jsonl", rows)
    validation = write(tmp_path / "validation.jsonl", [*rows, {**rows[0], "label": "new"}])
    base = {"model_name_or_path": checkpoints["encoder"], "train_file": train, "validation_file": validation}
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_classification.py", **base, **arguments, output_dir=tmp_path / "out")
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]


TOKENS = {"task": "tokens", "text_column": "words", "label_column": "tags"}


@pytest.mark.parametrize(
    ("arguments", "row", "sentence"),
    [
        ({}, {"text": None}, "`--text_column=text` must hold a text"),
        ({}, {"label": None}, "`--label_column=label` must hold a label"),
        ({"second_text_column": "number"}, {}, "`--second_text_column=number` must hold a text"),
        ({"label_column": "number"}, {"number": None}, "`--label_column=number` must hold a label"),
        ({"task": "tokens"}, {}, "`--text_column=text` must hold a list of words"),
        ({"task": "tokens", "text_column": "words"}, {}, "`--text_column=words` and `--label_column=label` must hold"),
        (TOKENS, {"tags": None}, "`--label_column=tags` must hold a list with as many labels as words"),
        (TOKENS, {"tags": ["a"]}, "as many labels as words"),
        (TOKENS, {"tags": ["a", None]}, "as many labels as words"),
    ],
)
def test_rows_without_a_text_or_a_label(arguments, row, sentence, checkpoints, call_recipe, tmp_path, capsys):
    whole = {"text": "one two", "label": "a", "number": 0.5, "words": ["one", "two"], "tags": ["a", "b"]}
    train = write(tmp_path / "train.jsonl", [whole, {**whole, **row}, {**whole, "label": "b"}])
    line = {"model_name_or_path": checkpoints["encoder"], "validation_file": train, "output_dir": tmp_path / "out"}
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_classification.py", **line, **arguments)
    assert stop.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence in error
    assert f"not so in {1 if row else 3} of 3 rows of the validation data, such as {{'text'" in error
