"""`measure` and `prune` from the shell: what they write, what they say, and how they refuse."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import WhitespaceSplit

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.surgery import ExpertMeasurements
from hub_checkpoints import save_mixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("surgery")
    save_mixture(root / "mixture")
    for name in ("law", "code"):
        (root / f"{name}.txt").write_text("\n\n".join([f"word7 word8 {name} word9 " * 5] * 4))
    return root


def test_measured_and_pruned(folder, tmp_path):
    texts = ["--data", folder / "law.txt", "--data", folder / "code.txt"]
    finished = run_cli("measure", folder / "mixture", *texts, "-o", tmp_path / "measured", "--json")
    assert finished.code == 0, finished
    told = json.loads(finished.out)
    measured = ExpertMeasurements.load(tmp_path / "measured")
    assert told == json.loads(json.dumps(measured.to_dict()))
    assert set(measured.groups) == {"law", "code"}
    chosen = ["--measured", tmp_path / "measured", "--keep", "3"]
    finished = run_cli("prune", folder / "mixture", tmp_path / "pruned", *chosen, *texts, "--json")
    assert finished.code == 0, finished
    pruned = json.loads(finished.out)["receipt"]["pruned"]
    for layer, kept in zip(measured.layers, pruned["kept"].values(), strict=True):
        assert kept == sorted(layer.reap.topk(3).indices.tolist())
    assert pruned["num_experts_per_tok"] == 2
    assert pruned["loss"]["law"]["before"] == pytest.approx(measured.losses["law"]["loss"], rel=1e-5)
    assert pruned["loss"]["all"]["after"] != pruned["loss"]["all"]["before"]
    model = load_whole(tmp_path / "pruned")
    assert {layer.experts.num_experts for layer in model.sparse_blocks} == {3}
    assert (tmp_path / "pruned" / "tokenizer.json").read_bytes() == (
        folder / "mixture" / "tokenizer.json"
    ).read_bytes()
    finished = run_cli("prune", folder / "mixture", tmp_path / "dropped", "--drop", "0:3", "--drop", "1:0")
    assert finished.code == 0, finished
    assert "3 in 2 layers" in finished.out


@pytest.mark.parametrize("command", ["info", "card", "doctor"])
def test_other_commands_take_what_was_pruned(command, folder, tmp_path):
    run_cli("prune", folder / "mixture", tmp_path / "pruned", "--keep", "3", "--method", "random")
    finished = run_cli(command, tmp_path / "pruned")
    assert finished.code == 0, finished
    told = (tmp_path / "pruned" / "README.md").read_text() if command == "card" else finished.out
    assert "3" in told
    assert {"info": "pruned by random", "card": "## Pruning"}.get(command, "") in told


def test_texts_are_cut_where_the_model_ends(folder, tmp_path):
    """A tiny BERT has fewer positions than `--max-length` allows."""
    mixture = shutil.copytree(folder / "mixture", tmp_path / "mixture")
    tokenizer = Tokenizer.from_file(str(mixture / "tokenizer.json"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(mixture / "tokenizer.json"))
    (tmp_path / "long.txt").write_text("word7 word8 word9 " * 200)
    options = ["--data", tmp_path / "long.txt", "--max-length", "512", "-o", tmp_path / "measured"]
    finished = run_cli("measure", mixture, *options)
    assert finished.code == 0, finished
    labels = ExpertMeasurements.load(tmp_path / "measured").losses["all"]["labels"]
    assert labels == load_whole(folder / "mixture").config.dense_config.max_position_embeddings


BAD = {
    "no choice": ([], "either `keep`"),
    "no number": (["--keep", "most"], "`--keep most` is not allowed"),
    "no layer": (["--drop", "3"], "LAYER:NUMBER"),
    "a missing file": (["--keep", "3", "--measured", "nowhere"], "nowhere"),
    "too few": (["--keep", "1", "--method", "random"], "2 serve each token"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, tmp_path):
    options, message = BAD[case]
    assert_one_sentence(run_cli("prune", folder / "mixture", tmp_path / "out", *options), message)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists(folder, tmp_path):
    (tmp_path / "measured").touch()
    finished = run_cli("measure", folder / "mixture", "--data", folder / "law.txt", "-o", tmp_path / "measured")
    assert_one_sentence(finished, "exists already")
