"""MTEB and sentence-transformers score a mixture as its dense source right after upcycling."""

import mteb
import pytest
from datasets import Dataset, DatasetDict
from mteb.abstasks.sts import AbsTaskSTS
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

import hf_sparse_moe
from hf_sparse_moe.hub import record_results
from sentence_encoders import save_dense_encoder


FIRST = [f"word{i} word{2 * i + 1} word{i + 30}" for i in range(1, 13)]
SECOND = [f"word{i} word{3 * i + 2} word{i + 31}" for i in range(1, 13)]
SCORES = [float(i % 6) for i in range(12)]


class LocalSTS(AbsTaskSTS):
    metadata = mteb.TaskMetadata(
        name="LocalSTS",
        description="Made-up pairs.",
        reference="https://example.com",
        dataset={"path": "none", "revision": "1"},
        type="STS",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
        date=("2020-01-01", "2020-01-02"),
        domains=["Written"],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
    )

    def load_data(self, **kwargs):
        rows = {"sentence1": FIRST, "sentence2": SECOND, "score": SCORES}
        self.dataset = DatasetDict({"test": Dataset.from_dict(rows)})
        self.data_loaded = True


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    dense = save_dense_encoder(root)
    hf_sparse_moe.upcycle(dense, num_experts=4, output=root / "sparse")
    return dense, root / "sparse"


def test_mteb(folders):
    scores = []
    for folder in folders:
        encoder = SentenceTransformer(str(folder), device="cpu")
        result = mteb.evaluate(encoder, LocalSTS(), cache=None, show_progress_bar=False)
        scores.append(result.task_results[0].scores["test"][0])
    dense, sparse = scores
    for name in ("cosine_spearman", "cosine_pearson", "euclidean_pearson"):
        assert sparse[name] == pytest.approx(dense[name], abs=1e-5)
    assert abs(sparse["cosine_pearson"]) > 1e-3

    record_results(folders[1], {"LocalSTS": {"cosine_spearman": sparse["cosine_spearman"]}})
    assert "LocalSTS" in hf_sparse_moe.write_model_card(folders[1], "me/encoder").read_text()


def test_an_evaluator_of_sentence_transformers(folders):
    evaluator = EmbeddingSimilarityEvaluator(FIRST, SECOND, [score / 5 for score in SCORES])
    dense, sparse = (evaluator(SentenceTransformer(str(folder), device="cpu")) for folder in folders)
    assert sparse == pytest.approx(dense, abs=1e-5)
