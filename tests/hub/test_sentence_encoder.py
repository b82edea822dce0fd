"""A sentence encoder on the Hub: what others load of it embeds as the dense model, with the package and without."""

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from hf_sparse_moe import to_dense, upcycle
from hf_sparse_moe.hub import write_model_card
from sentence_encoders import TEXTS, save_dense_encoder


def push_folder(folder: str, repo_id: str) -> None:
    from hf_sparse_moe import push

    push(folder, repo_id)


def embed(source: str, texts: list, trust_remote_code: bool) -> list:
    from sentence_transformers import SentenceTransformer

    if not trust_remote_code:
        import hf_sparse_moe  # noqa: F401
    encoder = SentenceTransformer(source, device="cpu", trust_remote_code=trust_remote_code)
    assert type(encoder[0].model).__name__ == "SparseMoeEncoderModel"
    return encoder.encode(texts).tolist()


def pull_folder(repo_id: str, output: str) -> None:
    from hf_sparse_moe import pull

    pull(repo_id, output)


def train_and_push(folder: str, output: str, repo_id: str) -> dict:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    from hf_sparse_moe.hub import ModelCardCallback, add_model_card

    encoder = SentenceTransformer(folder, device="cpu")
    pairs = {"one": ["word1", "word2", "word3"], "two": ["word1", "word5", "word4"], "score": [1.0, 0.2, 0.1]}
    rows = Dataset.from_dict(pairs)
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "hub_model_id": repo_id}
    trainer = SentenceTransformerTrainer(
        encoder,
        SentenceTransformerTrainingArguments(output, max_steps=1, **quiet),
        rows,
        rows,
        loss=CoSENTLoss(encoder),
        evaluator=EmbeddingSimilarityEvaluator(*pairs.values(), write_csv=False),
    )
    add_model_card(trainer, ModelCardCallback(eval_data="hf://datasets/mteb/stsbenchmark-sts"))
    trainer.train()
    scores = trainer.evaluate()
    trainer.push_to_hub()
    return {"spearman": scores["eval_spearman_cosine"], "embeddings": encoder.encode(["word3 word5"]).tolist()}


def test_its_training_pushes_it_whole_with_its_scores(client, hub_server, repo_id, tmp_path):
    upcycle(save_dense_encoder(tmp_path), 4, output=tmp_path / "mixture")
    places = {"folder": str(tmp_path / "mixture"), "output": str(tmp_path / "out")}
    trained = client(train_and_push, repo_id=repo_id, **places)
    files = hub_server.hub.files(repo_id)
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "training_record.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    card = hub_server.hub.read(repo_id, "README.md").decode()
    assert "SparseMoeEncoderModel" in card
    assert "library_name: sentence-transformers" in card
    assert "SentenceTransformer based on" not in card  # as its own card begins
    [result] = [
        entry for entry in yaml.safe_load(hub_server.hub.read(repo_id, ".eval_results/hf-sparse-moe.yaml"))
        if "spearman_cosine" in str(entry)
    ]  # fmt: skip
    assert result["value"] == pytest.approx(trained["spearman"], abs=1e-5)
    found = client(embed, source=repo_id, texts=["word3 word5"], trust_remote_code=False)
    assert found == pytest.approx(np.array(trained["embeddings"]), abs=1e-6)


def test_made_dense_again_its_card_says_what_reads_it(tmp_path):
    upcycle(save_dense_encoder(tmp_path), 4, output=tmp_path / "mixture")
    to_dense(tmp_path / "mixture", output=tmp_path / "dense_again")
    for card in (tmp_path / "dense_again" / "README.md", write_model_card(tmp_path / "dense_again")):
        metadata = ModelCard.load(card).data
        assert (metadata.library_name, metadata.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
        assert "sentence-transformers" in metadata.tags
    assert SentenceTransformer(str(tmp_path / "dense_again"), device="cpu").encode(TEXTS).shape[0] == len(TEXTS)


def test_it_embeds_as_its_dense_model(client, stranger, hub_server, repo_id, tmp_path):
    dense = save_dense_encoder(tmp_path)
    upcycle(dense, 4, output=tmp_path / "mixture")
    client(push_folder, folder=str(tmp_path / "mixture"), repo_id=repo_id)
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= hub_server.hub.files(repo_id)
    expected = pytest.approx(SentenceTransformer(str(dense), device="cpu").encode(TEXTS), abs=1e-5)
    assert client(embed, source=repo_id, texts=TEXTS, trust_remote_code=False) == expected
    assert stranger(embed, source=repo_id, texts=TEXTS, trust_remote_code=True) == expected
    client(pull_folder, repo_id=repo_id, output=str(tmp_path / "pulled"))
    assert client(embed, source=str(tmp_path / "pulled"), texts=TEXTS, trust_remote_code=False) == expected
