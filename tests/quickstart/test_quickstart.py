"""The whole story, with very few steps: on its own text, on a person's model and data, on a Hub."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_sparse_moe
from cli_client import assert_one_sentence, run_cli
from hf_sparse_moe.quickstart.examples import interleave, make_examples
from hf_sparse_moe.quickstart.training import train
from hub_server import HubServer
from tiny_models import ARCHITECTURES, VOCAB_SIZE, enlarge_weights, tiny_dense


FEW = {"steps": 2, "dense-steps": 2, "adapter-steps": 2, "batch-size": 2, "sequence-length": 16, "num-experts": 4}
SMALL_OPTIONS = [part for name, value in FEW.items() for part in (f"--{name}", str(value))]
WORDS = ["once", "upon", "a", "time", "there", "was", "an", "expert", "who", "knew", "one", "thing", "and", "another"]


@pytest.fixture(scope="module")
def tokenizer():
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    base.train_from_iterator([" ".join(WORDS)], trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special))
    base.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=base, **names)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for shift, domain in enumerate(("ahead", "behind")):
        texts = [" ".join(WORDS[place % 7 + shift :] * 4) for place in range(30)]
        (folder / f"{domain}.txt").write_text("\n\n".join(texts))
    return folder


def check_output(folder, family, domains):
    report = json.loads((folder / "report.json").read_text())
    for name in ("before", "dense twin", "mixture", "adapter"):
        assert set(report["held_out_loss"][name]) == set(domains)
        assert all(0 < loss < 50 for loss in report["held_out_loss"][name].values())
    assert {layer["side"] for layer in report["routing"]["layers"]} <= {"encoder", "decoder"}
    assert (folder / "experts.png").read_bytes()[:4] == b"\x89PNG"
    assert "What every expert does" in (folder / "routing.html").read_text()
    written = json.loads((folder / "mixture" / "routing_statistics.json").read_text())
    assert written == report["routing"]  # what the card says, and the page
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((folder / "mixture" / "config.json").read_text())["model_type"] == f"sparse_moe_{family}"
    assert "held-out loss" in (folder / "mixture" / "README.md").read_text()
    assert not list(folder.parent.glob(".*.partial"))


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(name, marks=pytest.mark.conformance) for name in ("modernbert", "t5_gated"))]
)
def test_own_model_and_data(name, tokenizer, data, tmp_path):
    tiny_dense(name, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    finished = run_cli("quickstart", "--model", tmp_path / "dense", "--data", data, "--output", out, *SMALL_OPTIONS)
    assert finished.code == 0, finished.err
    check_output(out, ARCHITECTURES[name].family, ["ahead", "behind"])
    for name in ("mixture", "adapter"):
        assert re.search(rf"{name}: \d+ checks passed, \d+ checks not checked\n", finished.out), finished.out
    receipt = json.loads((out / "mixture" / "receipt.json").read_text())
    assert receipt["equality"]["max_abs_difference"] < 1e-5


def test_from_nothing_to_a_hub(tmp_path):
    """The default run, published to a Hub and read back from there, in processes of their own."""
    with HubServer(tokens={"hf_writer": "tester"}) as server:
        environment = server.client_environment(tmp_path / "home")
        command = [
            sys.executable,
            "-m",
            "hf_sparse_moe.cli",
            "quickstart",
            "--push-to",
            "tester/first",
            *SMALL_OPTIONS,
            "--batch-size",
            "32",
        ]
        finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        published = set(server.hub.repos["tester/first"].resolve("main").files)
    assert {"README.md", "model.safetensors", "receipt.json", "tokenizer.json", "modeling_sparse_moe.py"} <= published
    assert "mixture: " in finished.stdout
    assert "checks failed" not in finished.stdout
    check_output(tmp_path / "quickstart", "decoder", ["code", "documentation", "reference"])
    assert (tmp_path / "quickstart" / "dense" / "model.safetensors").exists()


def test_models_it_cannot_work_on(data, tokenizer, tmp_path):
    out = tmp_path / "out"
    assert_one_sentence(run_cli("quickstart", "--model", "/nowhere", "--output", out), "a folder")
    no_data = run_cli("quickstart", "--data", "/nowhere", "--output", out)
    assert no_data.code == 2
    assert no_data.err == "Error: `/nowhere` is neither a folder nor the id of a Hub data set. Check the path.\n"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert_one_sentence(run_cli("quickstart", "--output", tmp_path / "taken"), "not empty")
    assert not out.exists()


def test_blocks_are_the_text_in_its_order(tokenizer):
    documents = [" ".join(WORDS), " ".join(reversed(WORDS))]
    examples = make_examples(documents, tokenizer, hf_sparse_moe.SparseMoeDecoderConfig, 8, 100)
    tokens = torch.cat([example["input_ids"] for example in examples])
    assert f" {'</s> '.join(documents)}".startswith(tokenizer.decode(tokens))
    assert all(torch.equal(example["input_ids"], example["labels"]) for example in examples)


def test_masks_are_the_same_for_every_model(tokenizer):
    arguments = ([" ".join(WORDS) * 10], tokenizer, hf_sparse_moe.SparseMoeEncoderConfig, 16, 100)
    first, second = make_examples(*arguments), make_examples(*arguments)
    labels = torch.stack([example["labels"] for example in first])
    assert torch.equal(labels, torch.stack([example["labels"] for example in second]))
    assert 0.02 < (labels != -100).float().mean() < 0.4


def test_too_little_text(tokenizer):
    with pytest.raises(ValueError, match="`sequence_length=512`"):
        make_examples(["once"], tokenizer, hf_sparse_moe.SparseMoeDecoderConfig, 512, 1)


def test_every_domain_is_heard_alike():
    examples = {name: [{"input_ids": torch.tensor([place])} for place in range(3)] for name in "ab"}
    chosen = interleave(examples, 8, seed=0)
    assert len(chosen) == 8
    assert sum(any(example is one for one in examples["a"]) for example in chosen) == 4
    assert [id(example) for example in interleave(examples, 8, seed=0)] == [id(example) for example in chosen]


def test_training_keeps_the_order(tmp_path):
    """Mixture and twin see the same tokens: the order is the list's, not the model's random numbers'."""

    class Recorded(list):
        def __getitem__(self, place):
            asked.append(place)
            return super().__getitem__(place)

    asked = []
    examples = Recorded({"input_ids": torch.arange(5, 13), "labels": torch.arange(5, 13)} for _ in range(6))
    model = enlarge_weights(AutoModelForCausalLM.from_config(ARCHITECTURES["llama"].config()))
    options = {"batch_size": 2, "learning_rate": 1e-3, "seed": 0, "name": "model", "folder": tmp_path}
    train(model, examples, console=Console(file=open(os.devnull, "w")), **options)  # noqa: SIM115
    assert asked == list(range(6))


@pytest.mark.slow
@pytest.mark.needs_data("stories260k", "domains")
def test_real_checkpoint_on_real_domains(data_dir, tmp_path):
    out = tmp_path / "out"
    few = ("--steps", 5, "--adapter-steps", 2, "--batch-size", 8, "--sequence-length", 32)
    arguments = ("--model", data_dir / "stories260k" / "hf", "--data", data_dir / "domains", "--output", out)
    finished = run_cli("quickstart", *arguments, *few)
    assert finished.code == 0, finished.err
    domains = json.loads((out / "report.json").read_text())["held_out_loss"]["mixture"]
    assert len(domains) == 10
    check_output(out, "decoder", domains)
