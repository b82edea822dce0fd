"""The scores that the recipes report, computed by scikit-learn, SciPy, seqeval, sacrebleu, rouge_score and NLTK."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import numpy as np
import sacrebleu
from nltk.tokenize import NLTKWordTokenizer
from rouge_score import rouge_scorer
from scipy.stats import pearsonr, spearmanr
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn


ROUGE = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def perplexity(losses: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """
    exp of the mean negative log-likelihood of the labelled tokens, each token counted once, whatever the batches were.

    Args:
        losses (`Sequence[float]`): The summed negative log-likelihood of each example, in nats.
        counts (`Sequence[int]`): How many labelled tokens it has.

    Raises:
        ValueError: no token is labelled.
    """
    tokens = sum(counts)
    if tokens == 0:
        raise ValueError("The validation data have no labelled token, so there is no perplexity.")
    mean = math.fsum(losses) / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf}  # exp overflows at 709


def classification(predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
    """Accuracy, and F1 as the plain mean over the classes that occur (macro). Both between 0 and 1."""
    return {
        "accuracy": float(sklearn.accuracy_score(references, predictions)),
        "f1": float(sklearn.f1_score(references, predictions, average="macro", zero_division=0.0)),
    }


def regression(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman correlation (0 where one side is constant) and the mean squared error."""
    constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(predictions, references).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predictions, references).statistic),
        "mse": float(sklearn.mean_squared_error(references, predictions)),
    }


def entities(predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
    """
    Precision, recall and F1 of whole entities (micro average), and the accuracy of the tags. All between 0 and 1.

    Args:
        predictions (`list[list[str]]`): The tags of each sentence, such as B-PER, I-PER, O.
        references (`list[list[str]]`): The right ones.
    """
    return {
        "precision": float(seqeval.precision_score(references, predictions, zero_division=0)),
        "recall": float(seqeval.recall_score(references, predictions, zero_division=0)),
        "f1": float(seqeval.f1_score(references, predictions, zero_division=0)),
        "accuracy": float(seqeval.accuracy_score(references, predictions)),
    }


def bleu(predictions: list[str], references: list[str], tokenizer: str | None = None) -> dict[str, float]:
    """
    Corpus BLEU and chrF of sacrebleu, between 0 and 100, one reference a prediction.

    Args:
        tokenizer (`str`, *optional*): How sacrebleu cuts texts into words, such as "13a" (default), "zh" or "char".
    """
    return {
        "bleu": sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenizer).score,
        "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
    }


def rouge(predictions: list[str], references: list[str], tokenizer: str | None = None) -> dict[str, float]:
    """
    Mean F-measure of ROUGE-1, ROUGE-2, ROUGE-L and (over lines) ROUGE-Lsum, between 0 and 1.

    Args:
        tokenizer (`str`, *optional*): "zh" or "char" compare characters; otherwise words of Latin letters and digits,
            with English stemming. Of Chinese, those would be none.
    """
    characters = _Characters() if tokenizer in ("zh", "char") else None
    scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=characters is None, tokenizer=characters)
    scores = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in ROUGE}


class _Characters:
    """As `rouge_score` takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]


def question_answering(predictions: list[str], references: list[list[str]], language: str = "en") -> dict[str, float]:
    """
    Exact match and F1 of answers, between 0 and 100; of several right ones the nearest counts. Where some questions
    have no answer, also those of the questions with an answer and the accuracy of the others, as SQuAD 2 has them.

    Args:
        predictions (`list[str]`): The answers; empty for none.
        references (`list[list[str]]`): The right answers to each question; an empty list where there is none.
        language (`str`, defaults to `"en"`):
            "en" compares words without a, an, the, ASCII punctuation and case, as SQuAD's evaluation does, and "zh"
            characters, words of Latin letters and their longest common run, as CMRC 2018's does.
    """
    cut, overlap = (_english_words, _common_words) if language == "en" else (_chinese_segments, _longest_common_run)
    exact, f1, answerable = [], [], []
    for prediction, right in zip(predictions, references, strict=True):
        right = [answer for answer in right if answer]
        answerable.append(bool(right))
        guess = cut(prediction)
        scores = [_span_scores(guess, cut(answer), overlap) for answer in right or [""]]
        exact.append(100.0 * max(score[0] for score in scores))
        f1.append(100.0 * max(score[1] for score in scores))
    scores = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    has_answer = np.array(answerable)
    if has_answer.any() and not has_answer.all():
        scores["has_answer_exact_match"] = float(np.mean(np.array(exact)[has_answer]))
        scores["has_answer_f1"] = float(np.mean(np.array(f1)[has_answer]))
        scores["no_answer_accuracy"] = float(np.mean(np.array(exact)[~has_answer]))
    return scores


Cut = tuple[str, list[str]]  # an answer without what does not count, and its segments


def _span_scores(guess: Cut, right: Cut, overlap: Callable[[list[str], list[str]], int]) -> tuple[float, float]:
    exact = float(guess[0] == right[0])
    if not guess[1] or not right[1]:
        return exact, exact
    return exact, 2 * overlap(guess[1], right[1]) / (len(guess[1]) + len(right[1]))


def _english_words(text: str) -> Cut:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", bare).split()
    return " ".join(words), words


def _common_words(guess: list[str], right: list[str]) -> int:
    return (Counter(guess) & Counter(right)).total()


# What CMRC 2018's evaluation takes for punctuation.
_CHINESE_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》…·、「」（）－～『』")


def _chinese_segments(text: str) -> Cut:
    """Characters of Chinese, and words of what stands between them."""
    bare = "".join(character for character in text.lower().strip() if character not in _CHINESE_PUNCTUATION)
    tokenizer = NLTKWordTokenizer()
    parts = re.split("([\u4e00-\u9fa5])", bare)  # every second one is a character of Chinese
    words = [[part] if place % 2 else tokenizer.tokenize(part) for place, part in enumerate(parts)]
    return bare, [word for of_part in words for word in of_part]


def _longest_common_run(guess: list[str], right: list[str]) -> int:
    return SequenceMatcher(None, guess, right, autojunk=False).find_longest_match().size


def lower_is_better(name: str) -> bool:
    """Whether the better of two models has the lower score of this name: of losses, perplexities and errors."""
    name = name.removeprefix("eval_")
    return name == "mse" or name.endswith("loss") or name.startswith("perplexity")


LANGUAGES = ("en", "zh")
OF_TEXTS: dict[str, Callable[..., dict[str, float]]] = {"sacrebleu": bleu, "rouge": rouge}
TOKENIZERS = {"sacrebleu": ("13a", "intl", "zh", "char"), "rouge": ("zh", "char")}
