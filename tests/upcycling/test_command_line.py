"""`upcycle` with branches and texts, and `expand`, on the command line."""

import json

import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe import SparseMoePreTrainedModel
from hf_sparse_moe.upcycling import verify
from tiny_models import enlarge_weights, tiny_dense


WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(92))]


@pytest.fixture
def folders(tmp_path):
    """A base and two branches with their tokenizer, and a text of each branch."""
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    for seed, name in enumerate(("base", "first", "second")):
        enlarge_weights(tiny_dense("llama"), seed=seed).save_pretrained(tmp_path / name)
        fast.save_pretrained(tmp_path / name)
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{30 * seed + number % 30}" for number in range(600)))
    return tmp_path


def run_json(*arguments):
    finished = run_cli(*arguments, "--json")
    assert finished.code == 0, finished
    return json.loads(finished.out)


def test_branches_with_prompts_and_evaluation(folders):
    options = [part for name in ("first", "second") for part in ("--sources", folders / name)]
    options += [part for name in ("first", "second") for part in ("--prompts", folders / f"{name}.txt")]
    options += ["--evaluation", folders / "base.txt", "--set", "trunk=base"]
    report = run_json("upcycle", folders / "base", folders / "out", "--method", "branches", *options)
    assert report["receipt"]["arguments"]["num_experts"] == 2
    assert [each["name_or_path"] for each in report["receipt"]["branches"]] == ["first", "second"]
    assert report["receipt"]["loss"]["labels"] > 100
    assert (folders / "out" / "tokenizer.json").read_text() == (folders / "base" / "tokenizer.json").read_text()


def test_data_of_a_method_that_measures(folders):
    options = ["--method", "partition", "--set", "partition=activation", "--num-experts", 4]
    assert_one_sentence(run_cli("upcycle", folders / "base", folders / "out", *options), "needs `data`")
    run_json("upcycle", folders / "base", folders / "out", *options, "--data", folders / "base.txt")


def test_expand(folders):
    run_json("upcycle", folders / "base", folders / "mixture", "--num-experts", 4)
    report = run_json("expand", folders / "mixture", folders / "larger", "--factor", 2, "--router-noise", 0)
    assert report["receipt"]["expanded"]["factor"] == 2
    larger = hf.AutoModelForCausalLM.from_pretrained(folders / "larger")
    assert isinstance(larger, SparseMoePreTrainedModel)
    assert (larger.config.num_experts, larger.config.num_experts_per_tok) == (8, 4)
    assert (folders / "larger" / "tokenizer.json").exists()
    assert_one_sentence(run_cli("expand", folders / "base", folders / "no"), "no sparse layer was found")
    assert_one_sentence(run_cli("expand", folders / "mixture", folders / "no", "--factor", 1), "`factor=1`")
    assert not (folders / "no").exists()


def test_verify_takes_texts(folders):
    run_json("upcycle", folders / "base", folders / "mixture", "--num-experts", 4)
    loss = verify(folders / "mixture", folders / "base", evaluation=["w1 w2 w3 w4"]).loss
    assert loss["labels"] == 4
    assert loss["mixture"] == pytest.approx(loss["dense"], rel=1e-4)
