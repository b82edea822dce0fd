"""The scores that the recipes report, computed by scikit-learn, SciPy, seqeval, sacrebleu and rouge_score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import sacrebleu
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


OF_TEXTS: dict[str, Callable[..., dict[str, float]]] = {"sacrebleu": bleu, "rouge": rouge}
TOKENIZERS = ("13a", "intl", "zh", "char")
