"""`merge` and `to-dense` from the shell, and what a bad command says."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.surgery import ExpertMeasurements, measure_experts
from hub_checkpoints import save_mixture
from routing.test_mixture_layers import build, inputs_of
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


def test_the_receipts_tell_the_losses(tmp_path):
    save_mixture(tmp_path / "mixture")
    (tmp_path / "law.txt").write_text("\n\n".join(["word7 word8 law word9 " * 5] * 4))
    data = ["--data", tmp_path / "law.txt"]
    finished = run_cli("measure", tmp_path / "mixture", *data, "-o", tmp_path / "measured")
    assert finished.code == 0, finished
    measured = ExpertMeasurements.load(tmp_path / "measured")
    for command, options, verb in (
        ("merge", ["--into", "3", "--measured", tmp_path / "measured", *data], "merged"),
        ("to-dense", data, "to_dense"),
    ):
        finished = run_cli(command, tmp_path / "mixture", tmp_path / command, *options)
        assert finished.code == 0, finished
        assert "loss on law, in nats" in finished.out
        loss = json.loads((tmp_path / command / "receipt.json").read_text())[verb]["loss"]["law"]
        assert loss["before"] == pytest.approx(measured.losses["law"]["loss"], rel=1e-5)
        assert loss["after"] != loss["before"]
        told = run_cli("info", tmp_path / command)
        if command == "merge":
            assert "merged by hc, experts 3 in 2 layers" in told.out
            assert "## Merging" in card_of(tmp_path / command)
        else:
            tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("mixture", command)]
            assert tokenizers[0] == tokenizers[1]
            assert_described(tmp_path / command, told.out, f"{loss['after']:.4f}", "to_dense by mean")
        assert run_cli("doctor", tmp_path / command).code == 0


@pytest.mark.parametrize("operation", ["prune", "merge", "to-dense"])
def test_a_stock_mixture_is_described(operation, tmp_path):
    model = build("mixtral").eval()
    model.save_pretrained(tmp_path / "stock")
    measure_experts(model, [inputs_of(model)]).save(tmp_path / "measured")
    amount = {"prune": ["--keep", "0:6", "--keep", "1:6"], "merge": ["--into", "0:6", "--into", "1:6"], "to-dense": []}
    options = ["--measured", tmp_path / "measured", *amount[operation]]
    finished = run_cli(operation, tmp_path / "stock", tmp_path / "out", *options)
    assert finished.code == 0, finished
    assert " MixtralForCausalLM" in finished.out or operation == "to-dense"
    told = run_cli("info", tmp_path / "out")
    assert told.code == 0, told
    assert_described(tmp_path / "out", told.out, {"to-dense": "to_dense by mean"}.get(operation, "6 in 2 layers"))
    assert json.loads(run_cli("info", tmp_path / "out", "--json").out)["receipt"]


def assert_described(folder, told, *words):
    """By `info`, `doctor` and the card, which `card` renders again around what a person wrote."""
    receipt = json.loads((folder / "receipt.json").read_text())
    (made,) = (receipt[name] for name in ("pruned", "merged", "to_dense") if name in receipt)
    words = [*words, f"{made['parameters']['after']:,}", f"{made['bytes']['after']:,}", made["source"]["architecture"]]
    written = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{written}\nUse it with care.\n")
    for text in (told, written, run_cli("doctor", folder, "--json").out, card_of(folder)):
        assert all(word in text for word in words), text
    card = (folder / "README.md").read_text()
    assert card.count("It inherits") == card.count("Use it with care") == 1


def card_of(folder):
    assert run_cli("card", folder).code == 0
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("command", [("prune", "--keep", "3"), ("merge", "--into", "3"), ("to-dense",)])
def test_an_output_that_exists(mixture, tmp_path, command):
    before = sorted(tmp_path.iterdir())
    name, *options = command
    finished = run_cli(name, mixture, tmp_path / "mixture", "--measured", tmp_path / "measured", *options)
    assert_one_sentence(finished, "is not empty")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [("prune", "--drop", "0:1"), ("merge", "--into", "2"), ("to-dense",)])
def test_a_broken_checkpoint(mixture, tmp_path, command):
    state = load_file(mixture / "model.safetensors")
    key = next(name for name in state if "experts.down_proj" in name)
    state[key][0, 0, 0] = float("nan")
    save_file(state, mixture / "model.safetensors", {"format": "pt"})
    name, *options = command
    if name == "merge":
        options += ["--measured", tmp_path / "measured"]
    before = sorted(tmp_path.iterdir())
    assert_one_sentence(run_cli(name, mixture, tmp_path / "out", *options), "NaN")
    assert sorted(tmp_path.iterdir()) == before


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
