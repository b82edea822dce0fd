"""Perplexity of a language model."""

import math

import datasets
import evaluate


class Perplexity(evaluate.Metric):
    """
    exp of the mean negative log-likelihood of the labelled tokens, each token counted once, whatever the batches were.

    Predictions are the summed negative log-likelihoods of the examples (natural logarithm), references the numbers of
    their labelled tokens.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: nats of each example; references: labelled tokens of each example",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        tokens = sum(references)
        if tokens == 0:
            raise ValueError("`references` count no labelled token, so there is no perplexity.")
        mean = math.fsum(predictions) / tokens
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}  # exp overflows at 709
