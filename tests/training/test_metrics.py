"""Each metric against a value worked out by hand, and with the rows that it belongs to."""

import json
import math

import pytest

from recipe import metrics
from training_runs import results


def test_perplexity_counts_each_token_once():
    # 3 tokens at 2 nats and 1 token at 6: the mean is 3, whatever the rows were.
    assert metrics.perplexity([6.0, 6.0], [3, 1]) == {"perplexity": pytest.approx(math.exp(3))}
    assert metrics.perplexity([1e6], [1])["perplexity"] == math.inf
    with pytest.raises(ValueError, match="no labelled token"):
        metrics.perplexity([0.0], [0])


def test_classification():
    scores = metrics.classification([0, 0, 1, 2], [0, 1, 1, 2])
    assert scores == {"accuracy": 0.75, "f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3)}


def test_regression():
    scores = metrics.regression([1.0, 2.0, 30.0], [1.0, 2.0, 3.0])
    assert scores["spearman"] == pytest.approx(1.0)
    assert 0.8 < scores["pearson"] < 0.9
    assert scores["mse"] == pytest.approx(27**2 / 3)
    assert metrics.regression([1.0, 1.0], [1.0, 2.0])["pearson"] == 0.0


def test_entities_count_whole():
    scores = metrics.entities([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "O"]])
    assert scores == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "accuracy": 0.75}


def test_bleu():
    same = "the cat sat on the mat"
    assert metrics.bleu([same], [same])["bleu"] == pytest.approx(100)
    # 6 of 6, 5 of 5, 4 of 4, 3 of 3 n-grams, a brevity penalty of exp(1 - 7/6)
    assert metrics.bleu([same], [same + " now"])["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 6))


def test_rouge():
    scores = metrics.rouge(["a cat sat", "x"], ["a cat slept", "y"])
    assert scores["rouge1"] == pytest.approx(1 / 3)
    assert scores["rouge2"] == pytest.approx(1 / 4)


def test_chinese_is_compared_by_characters():
    right, guess = "我爱北京天安门", "我爱北京的天安门"
    assert metrics.rouge([guess], [right])["rouge1"] == 0  # no word of Latin letters
    # All 7 characters are among the 8 guessed; of the pairs 5 of 7 guessed and 5 of 6 right ones agree.
    scores = metrics.rouge([guess], [right], "zh")
    assert scores["rouge1"] == pytest.approx(2 * 7 / (8 + 7))
    assert scores["rouge2"] == pytest.approx(2 * 5 / (7 + 6))
    assert metrics.bleu([right], [right], "zh")["bleu"] == pytest.approx(100)
    assert metrics.bleu([guess], [right], "zh")["bleu"] > metrics.bleu([guess], [right])["bleu"]


def test_english_answers():
    scores = metrics.question_answering(["The Black Sea.", "in 1347"], [["black sea", "a sea"], ["1347", "year 1347"]])
    assert scores == {"exact_match": 50.0, "f1": pytest.approx((100 + 100 * 2 / 3) / 2)}
    # A word counts as often as it is there.
    assert metrics.question_answering(["sea sea"], [["sea"]])["f1"] == pytest.approx(100 * 2 / 3)


def test_questions_without_an_answer():
    scores = metrics.question_answering(["", "sea", "sea"], [[], [], ["the sea"]])
    assert scores["exact_match"] == scores["f1"] == pytest.approx(200 / 3)
    assert scores["has_answer_f1"] == scores["has_answer_exact_match"] == 100
    assert scores["no_answer_accuracy"] == 50


def test_chinese_answers():
    """The longest run that both have: 4 of 5 and of 4 characters; the punctuation of CMRC 2018 is left out."""
    scores = metrics.question_answering(["在天安门广", "《光荣》和ω-Force"], [["天安门广"], ["光荣和ω-force"]], "zh")
    assert scores == {"exact_match": 50.0, "f1": pytest.approx((100 * 8 / 9 + 100) / 2)}
    # Not one run: of 3 characters 2 agree, but not side by side; a word of Latin letters is one segment.
    assert metrics.question_answering(["天大门"], [["天安门"]], "zh")["f1"] == pytest.approx(100 / 3)
    assert metrics.question_answering(["Nokia 3310 手机"], [["Nokia 手机"]], "zh")["f1"] == pytest.approx(100 * 4 / 7)


def test_generated_texts_are_scored_against_the_whole_target(checkpoints, files, call_recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(metrics.OF_TEXTS, "rouge", lambda *texts: seen.append(texts) or {"rouge1": 0.0})
    call_recipe(
        "run_seq2seq.py",
        model_name_or_path=checkpoints["encoder_decoder"],
        validation_file=files["multi30k.jsonl"],
        source_column="translation.en",
        target_column="translation.de",
        max_target_length=2,
        metric="rouge",
        max_eval_samples=6,
        output_dir=tmp_path,
    )
    rows = [json.loads(line) for line in files["multi30k.jsonl"].read_text().splitlines()]
    generated, references, _ = seen[-1]  # the first tells the names of the scores
    assert references == [row["translation"]["de"].strip() for row in rows[:6]]
    assert len(generated) == 6


def test_the_order_of_training_does_not_reach_the_metrics(checkpoints, files, call_recipe, tmp_path):
    """Trainer shuffles the validation data too where training rows are grouped by length."""
    line = {"model_name_or_path": checkpoints["decoder"], "train_file": files["docs.jsonl"], "group_by": "label"}
    line |= {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no"}
    for strategy in ("random", "group_by_length"):
        call_recipe("run_clm.py", **line, train_sampling_strategy=strategy, output_dir=tmp_path / strategy)
    scores = [results(tmp_path / strategy)["eval_perplexity_short"] for strategy in ("random", "group_by_length")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
