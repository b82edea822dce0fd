"""`merge` and `to-dense` from the shell, and what a bad command says."""

import json

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.surgery import measure_experts
from tiny_models import tiny_inputs, tiny_sparse


@pytest.fixture
def mixture(tmp_path):
    model = tiny_sparse("llama")
    model.save_pretrained(tmp_path / "mixture")
    measure_experts(model, [tiny_inputs(model, batch=8, length=16)]).save(tmp_path / "measured")
    return tmp_path / "mixture"


def test_both_commands(mixture, tmp_path):
    measured = ["--measured", tmp_path / "measured"]
    finished = run_cli("merge", mixture, tmp_path / "merged", *measured, "--into", "0.5", "--json")
    assert finished.code == 0, finished
    receipt = json.loads(finished.out)["receipt"]["merged"]
    assert [len(groups) for groups in receipt["groups"].values()] == [2, 2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_experts == 2
    finished = run_cli("to-dense", mixture, tmp_path / "dense", *measured, "--method", "best")
    assert finished.code == 0, finished
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), LlamaForCausalLM)
    again = run_cli("to-dense", tmp_path / "merged", tmp_path / "from_merged")
    assert again.code == 0, again


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("merge", "--into", "many", "--measured", "measured"), "--into many"),
        (("merge", "--into", "9", "--measured", "measured"), "`into=9`"),
        (("merge", "--into", "1", "--measured", "measured"), "2 serve each token"),
        (("merge", "--into", "2", "--measured", "mixture/config.json"), "measure_experts"),
        (("merge", "--into", "2", "--measured", "measured", "--method", "mean"), "`method='mean'`"),
        (("to-dense", "--method", "best"), "needs `measured`"),
        (("to-dense", "--method", "sum"), "`method='sum'`"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(mixture, tmp_path, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    name, *options = command
    before = sorted(tmp_path.iterdir())
    assert_one_sentence(run_cli(name, "mixture", "out", *options), said)
    assert sorted(tmp_path.iterdir()) == before
