"""BLEU and chrF of translations."""

import datasets
import evaluate
import sacrebleu


class SacreBleu(evaluate.Metric):
    """Corpus BLEU and chrF of sacrebleu, between 0 and 100, one reference a prediction."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions, references: texts; tokenize: sacrebleu's, such as 13a (default), zh",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], tokenize: str | None = None) -> dict[str, float]:
        return {
            "bleu": sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenize).score,
            "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
        }
