"""The command line on real, tiny checkpoints."""

import json
import subprocess
import sys

import pytest
import torch
import typer.main
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse_moe
from adapted_models import stock_mixture
from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.cli import app
from tiny_models import tiny_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "llama"
    tiny_dense("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"bytes": "as they are"}\n')
    (folder / "LICENSE.txt").write_text("Do what you like.\n")
    (folder / "thoughts.md").write_text("not part of a checkpoint\n")
    return folder


@pytest.fixture(scope="module")
def mixture(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "made"
    finished = run_cli("upcycle", dense, folder, "--num-experts", 4, "--seed", 7, "--json")
    assert finished.code == 0, finished.err
    return folder, json.loads(finished.out)


def test_upcycle_makes_what_the_library_makes(dense, mixture):
    folder, answer = mixture
    expected = hf_sparse_moe.upcycle(str(dense), num_experts=4, seed=7)
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert type(made) is type(expected)
    for (name, tensor), (_, other) in zip(made.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(tensor, other), name
    expected.receipt["equality"] = {"note": "not measured here: run `hf-sparse-moe verify`"}
    assert answer == {"path": str(folder), "class": type(expected).__name__, "receipt": expected.receipt}
    assert json.loads((folder / "receipt.json").read_text()) == expected.receipt


def test_tokenizer_and_licence_come_along(mixture):
    folder, _ = mixture
    assert (folder / "tokenizer.json").read_text() == '{"bytes": "as they are"}\n'
    assert (folder / "LICENSE.txt").read_text() == "Do what you like.\n"
    assert (folder / "generation_config.json").exists()
    assert not (folder / "thoughts.md").exists()


def test_upcycle_says_what_it_did(dense, tmp_path):
    finished = run_cli("upcycle", dense, tmp_path / "made", "--dtype", "bfloat16")
    assert finished.code == 0
    assert "SparseMoeDecoderForCausalLM" in finished.out
    assert "not measured here" in finished.out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "made").dtype == torch.bfloat16


def test_info_as_json(mixture):
    folder, _ = mixture
    answer = json.loads(run_cli("info", folder, "--json").out)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert answer["family"] == "decoder"
    assert answer["dense_architecture"] == "LlamaForCausalLM"
    assert (answer["num_experts"], answer["num_experts_per_tok"], answer["sparse_layers"]) == (4, 2, 2)
    assert answer["flops_per_token"] == model.config.flops_per_token()
    assert answer["parameters"]["total"]["total"] == model.num_parameters()
    assert answer["receipt"] == model.receipt


def test_info_as_a_table(mixture):
    folder, answer = mixture
    shown = run_cli("info", folder).out
    for part in ("LlamaForCausalLM", "attention", "router", f"{answer['receipt']['parameters']['total']:,}", "seed 7"):
        assert part in shown


def test_info_of_what_is_no_mixture(dense, tmp_path):
    assert_one_sentence(run_cli("info", dense), "is not a mixture of this package", "hf-sparse-moe upcycle")
    stock_mixture("mixtral").save_pretrained(tmp_path / "stock")
    shown = run_cli("info", tmp_path / "stock")
    assert_one_sentence(shown, f"hf-sparse-moe import-stock {tmp_path / 'stock'} <new folder>")
    assert "upcycle" not in shown.err
    assert_one_sentence(run_cli("info", tmp_path), "no config.json")
    assert_one_sentence(run_cli("info", tmp_path / "nowhere"), "a folder")


def test_every_command_has_an_example_and_spells_its_arguments_alike():
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        if command.hidden:
            continue
        assert f"hf-sparse-moe {name}" in command.epilog
        arguments = [parameter.name for parameter in command.params if parameter.param_type_name == "argument"]
        assert set(arguments) <= {"source", "output", "repo_id"}, name


def test_usage_errors_exit_with_2():
    finished = run_cli("upcycle", "one-argument")
    assert finished.code == 2
    assert "Traceback" not in finished.err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("`x=1` is not\nallowed."), 2, "Error: `x=1` is not allowed.\n"),
        (FileNotFoundError("no folder"), 2, "Error: no folder\n"),
        (ConnectionError("The Hub is away."), 3, "Error: The Hub is away.\n"),
        (ImportError("Install the extra."), 2, "Error: Install the extra.\n"),
        (MemoryError(), 2, "Error: Out of memory.\n"),
        (RuntimeError("can't allocate memory: 9 bytes"), 2, "Error: Out of memory. can't allocate memory: 9 bytes\n"),
        (KeyError("a bug"), 70, None),
        (ModuleNotFoundError("no torch", name="torch"), 70, None),
    ],
)
def test_errors_become_sentences_and_exit_codes(monkeypatch, tmp_path, error, code, told):
    """A bug shows its traceback and is no 1, which says that a check did not pass; `--debug` shows all of them."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_sparse_moe.stock.export", fail)
    finished = run_cli("export", "here", tmp_path / "there")
    assert finished.code == code
    assert told in (None, finished.err)
    assert ("Traceback" in finished.err) == (told is None)
    for arguments in (["--debug", "export"], ["export", "--debug"]):
        shown = run_cli(*arguments, "here", tmp_path / "there")
        assert shown.code == code
        assert "Traceback" in shown.err
        assert shown.err.endswith(told or "")
    monkeypatch.setenv("HF_SPARSE_MOE_DEBUG", "1")
    assert "Traceback" in run_cli("export", "here", tmp_path / "there").err


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sparse_moe.quickstart.story.find_spec", lambda name: None if name == "peft" else name)
    assert_one_sentence(run_cli("quickstart", "--output", tmp_path / "out"), "hf-sparse-moe[peft]")


def test_as_a_process(dense, tmp_path):
    """One sentence and nothing else, whatever the libraries underneath would like to say."""
    command = [
        sys.executable,
        "-m",
        "hf_sparse_moe.cli",
        "upcycle",
        dense,
        tmp_path / "out",
        "--num-experts-per-tok",
        "9",
    ]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("Error: `num_experts_per_tok=9` is not allowed")
    assert finished.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs_data("stories260k")
def test_a_real_checkpoint_keeps_its_text(data_dir, tmp_path):
    source = data_dir / "stories260k" / "hf"
    assert run_cli("upcycle", source, tmp_path / "made").code == 0
    texts = []
    for folder in (source, tmp_path / "made"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
        written = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=60, do_sample=False)
        texts.append(tokenizer.decode(written[0]))
    assert texts[0] == texts[1]


def test_export_and_back(mixture, tmp_path):
    folder, _ = mixture
    stock, back = tmp_path / "stock", tmp_path / "back"
    finished = run_cli("export", folder, stock, "--resume")  # where nothing is to be gone on with, it starts
    assert finished.code == 0, finished.err
    assert json.loads((stock / "config.json").read_text())["model_type"] == "mixtral"
    assert (stock / "tokenizer.json").exists()
    assert run_cli("import-native", stock, tmp_path / "by its old name").code == 0
    finished = run_cli("import-stock", stock, back)
    assert finished.code == 0, finished.err
    ours, again = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(back)
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)


def test_export_that_does_not_fit_says_why(mixture, tmp_path):
    assert_one_sentence(run_cli("export", mixture[0], tmp_path / "stock", "--architecture", "qwen3_moe"), "qwen3_moe")
    assert not (tmp_path / "stock").exists()


def test_verify_measures_and_compares(dense, mixture, tmp_path):
    folder, _ = mixture
    finished = run_cli("verify", folder, "--against", dense)
    assert finished.code == 0, finished.out
    assert finished.out.startswith("verified")
    other = tmp_path / "other"
    tiny_dense("llama", vocab_size=97).save_pretrained(other)
    assert run_cli("verify", folder, "--against", other).code in (1, 2)


def test_plan_reads_and_writes_nothing(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = json.loads(run_cli("plan", dense, "--num-experts", 4, "--json").out)
    model = hf_sparse_moe.upcycle(str(dense), num_experts=4)
    assert report["parameters"]["total"] == model.num_parameters()
    assert report["parameters"]["active"] == model.config.num_parameters(only_active=True)
    assert report["flops_per_token"]["mixture"] == model.config.flops_per_token()
    assert "mixtral" in report["exports"]
    assert "arXiv 2406.06563" in report["rule_of_thumb"].replace(":", " ")
    assert not list(tmp_path.iterdir())


def test_options_of_methods_and_layers(dense, tmp_path):
    finished = run_cli(
        "upcycle", dense, tmp_path / "made", "--method", "split", "--num-experts", 8, "--num-experts-per-tok", 4,
        "--set", "granularity=4", "--layers", "last_1", "--json",
    )  # fmt: skip
    assert finished.code == 0, finished.err
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert made.config.mlp_layer_types == ["dense", "sparse"]
    assert made.config.moe_intermediate_size == 12
    assert_one_sentence(run_cli("upcycle", dense, tmp_path / "other", "--set", "granularity"), "NAME=VALUE")


@pytest.mark.needs_data("stories260k")
def test_verify_measures_the_loss_on_a_text(data_dir, tmp_path):
    dense = data_dir / "stories260k" / "hf"
    assert run_cli("upcycle", dense, tmp_path / "made", "--method", "drop", "--num-experts", 4).code == 0
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside. " * 20)
    report = json.loads(run_cli("verify", tmp_path / "made", "--against", dense, "--text", text, "--json").out)
    assert report["loss"]["dense"] < report["loss"]["mixture"]  # half of every expert was redrawn
    assert_one_sentence(run_cli("verify", tmp_path / "made", "--against", dense, "--text", tmp_path / "none.txt"))
