"""The `evaluate` library scores a mixture as its dense source right after upcycling."""

import datasets
import evaluate
import transformers as hf

import hf_sparse_moe
from tiny_models import tiny_dense


class Accuracy(evaluate.Metric):
    """A metric without a script of the Hub."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(map(int.__eq__, predictions, references)) / len(references)}


def test_a_metric_in_trainer(tmp_path):
    dense = tiny_dense("bert", hf.AutoModelForSequenceClassification)
    rows = [{"input_ids": [7 * i % 90 + 5, 11 * i % 90 + 5], "labels": i % 2} for i in range(12)]
    metric = Accuracy()
    scores = [
        hf.Trainer(
            model,
            hf.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True),
            eval_dataset=rows,
            compute_metrics=lambda found: metric.compute(
                predictions=found.predictions.argmax(-1), references=found.label_ids
            ),
        ).evaluate()["eval_accuracy"]
        for model in (dense, hf_sparse_moe.upcycle(dense, num_experts=4))
    ]
    assert scores[0] == scores[1]
    assert 0 < scores[0] < 1
