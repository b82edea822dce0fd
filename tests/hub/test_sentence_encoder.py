"""A sentence encoder on the Hub: what others load of it embeds as the dense model, with the package and without."""

import pytest
from sentence_transformers import SentenceTransformer

from hf_sparse_moe import upcycle
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
