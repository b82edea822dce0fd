"""Each metric against a value worked out by hand."""

import math

import pytest

from recipe.metrics import METRICS, load_metric


def test_perplexity_counts_each_token_once():
    # 3 tokens at 2 nats and 1 token at 6: the mean is 3, whatever the rows were.
    assert load_metric("perplexity").compute(predictions=[6.0, 6.0], references=[3, 1]) == {
        "perplexity": pytest.approx(math.exp(3))
    }
    assert load_metric("perplexity").compute(predictions=[1e6], references=[1])["perplexity"] == math.inf


def test_classification():
    scores = load_metric("classification").compute(predictions=[0, 0, 1, 2], references=[0, 1, 1, 2])
    assert scores == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}


def test_regression():
    scores = load_metric("regression").compute(predictions=[1.0, 2.0, 30.0], references=[1.0, 2.0, 3.0])
    assert scores["spearman"] == pytest.approx(1.0)
    assert 0.8 < scores["pearson"] < 0.9
    assert scores["mse"] == pytest.approx(27**2 / 3)
    assert load_metric("regression").compute(predictions=[1.0, 1.0], references=[1.0, 2.0])["pearson"] == 0.0


def test_entities_count_whole():
    scores = load_metric("entities").compute(
        predictions=[["B-PER", "I-PER", "O", "B-LOC"]], references=[["B-PER", "I-PER", "O", "O"]]
    )
    assert scores == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "accuracy": 0.75}


def test_sacrebleu():
    same = "the cat sat on the mat"
    assert load_metric("sacrebleu").compute(predictions=[same], references=[same])["bleu"] == pytest.approx(100)
    # 6 of 6, 5 of 5, 4 of 4, 3 of 3 n-grams, a brevity penalty of exp(1 - 7/6)
    scores = load_metric("sacrebleu").compute(predictions=[same], references=[same + " now"])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 6))


def test_rouge():
    scores = load_metric("rouge").compute(predictions=["a cat sat", "x"], references=["a cat slept", "y"])
    assert scores["rouge1"] == pytest.approx(1 / 3)
    assert scores["rouge2"] == pytest.approx(1 / 4)


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"accuracy.*classification"):
        load_metric("accuracy")
    assert METRICS == ["classification", "entities", "perplexity", "regression", "rouge", "sacrebleu"]
