"""Correlations and squared error."""

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error


class Regression(evaluate.Metric):
    """Pearson and Spearman correlation (0 where one side is constant) and the mean squared error."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions, references: numbers",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
        return {
            "pearson": 0.0 if constant else float(pearsonr(predictions, references).statistic),
            "spearman": 0.0 if constant else float(spearmanr(predictions, references).statistic),
            "mse": float(mean_squared_error(references, predictions)),
        }
