"""Each recipe end to end, as a person runs it: the model, its numbers, its checkpoints, and what they are worth."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import hf_sparse_moe
from training_runs import COMMON, TRAINING, command_line, history, launch_recipe, results, run_recipe


PROBE = Path(__file__).with_name("launch_probe.py")


@pytest.fixture(scope="module")
def causal_run(checkpoints, files, tmp_path_factory):
    """A dense decoder, upcycled and trained; jitter and dropout, so that resuming must restore the random state."""
    arguments = {
        "model_name_or_path": checkpoints["decoder"],
        "train_file": files["docs.jsonl.gz"],
        "config_overrides": '{"router_jitter_noise": 0.1, "expert_dropout": 0.1}',
        "output_dir": tmp_path_factory.mktemp("runs") / "causal",
        "learning_rate": 3e-3,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_steps": 5,
        # The losses fall, so that by this the first checkpoint is the best, and the last model is not.
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
    }
    run_recipe("run_clm.py", *command_line(arguments))
    return arguments


def test_causal_lm_writes_model_numbers_and_checkpoints(causal_run):
    folder = causal_run["output_dir"]
    logs = [log for log in history(folder) if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["loss"] == pytest.approx(log["task_loss"] + 0.01 * log["aux_loss"], rel=1e-5)
    assert logs[1]["task_loss"] < logs[0]["task_loss"]
    scores = results(folder)
    assert {"train_loss", "eval_loss", "eval_perplexity"} <= set(scores)
    # Blocks of equal length: the mean over batches is nearly the mean over tokens.
    assert scores["eval_perplexity"] == pytest.approx(math.exp(scores["eval_loss"]), rel=1e-3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, hf_sparse_moe.SparseMoeDecoderForCausalLM)
    assert model.config.num_experts == 4
    assert model.config.router_jitter_noise == 0.1
    assert model.receipt["arguments"]["method"] == "copy"
    inputs = AutoTokenizer.from_pretrained(folder)("Return the", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_the_best_model_is_reloaded_whole(causal_run):
    folder = causal_run["output_dir"]
    evaluations = {log["step"]: log["eval_loss"] for log in history(folder) if "eval_loss" in log}
    assert evaluations[5] > evaluations[10]
    assert results(folder)["eval_loss"] == evaluations[5]
    saved, best, last = (
        load_file(folder / name / "model.safetensors") for name in ("", "checkpoint-5", "checkpoint-10")
    )
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert any(not torch.equal(last[name], best[name]) for name in best if ".experts." in name)


def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(causal_run, tmp_path):
    whole, resumed = causal_run["output_dir"], tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")  # all that an interruption leaves
    output = run_recipe("run_clm.py", *command_line({**causal_run, "output_dir": resumed}))
    assert "Going on from" in output
    expected, found = (load_file(folder / "checkpoint-10" / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    timing = ("runtime", "per_second", "train_loss", "total_flos")
    for expected, found in zip(history(whole), history(resumed), strict=True):
        for key, value in expected.items():
            if not key.endswith(timing):
                assert found[key] == value, key


def test_masked_lm_from_scratch_by_a_yaml_file(checkpoints, files, tmp_path):
    arguments = {
        **COMMON,
        "config_name": "modernbert",
        "tokenizer_name": str(checkpoints["tokenizer"]),
        "config_overrides": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "train_file": str(files["docs.txt"]),
        "validation_percentage": 20,
        "output_dir": str(tmp_path / "out"),
        "learning_rate": 3e-3,
        "eval_strategy": "epoch",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(arguments))
    run_recipe("run_mlm.py", str(tmp_path / "run.yaml"))
    scores = results(tmp_path / "out")
    assert 1 < scores["eval_perplexity"] < 1000
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert len(model.sparse_blocks) == 1
    assert model.config.hidden_size == 32


def test_seq2seq_from_a_dense_checkpoint(checkpoints, files, tmp_path):
    arguments = {
        "model_name_or_path": checkpoints["encoder_decoder"],
        "train_file": files["docs.jsonl"],
        "source_column": "text",
        "target_column": "first",
        "source_prefix": "summarize: ",
        "metric": "rouge",
        "generation_max_length": 8,
        "max_eval_samples": 8,
        "output_dir": tmp_path,
    }
    run_recipe("run_seq2seq.py", *command_line(arguments))
    scores = results(tmp_path)
    assert {"eval_loss", "eval_rouge1", "eval_rougeLsum"} <= set(scores)
    assert len(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).sparse_blocks) == 4


def test_classification_of_texts_and_then_further_with_the_mixture(checkpoints, files, call_recipe, tmp_path):
    arguments = {
        "train_file": files["docs.jsonl"],
        "label_column": "label",
        "max_steps": 30,
        "learning_rate": 3e-3,
        "save_strategy": "no",
    }
    first, second = tmp_path / "first", tmp_path / "second"
    arguments["model_name_or_path"] = checkpoints["encoder"]
    run_recipe("run_classification.py", *command_line({**arguments, "output_dir": first}))
    scores = results(first)
    assert {"eval_loss", "eval_accuracy", "eval_f1"} <= set(scores)
    model = AutoModelForSequenceClassification.from_pretrained(first)
    assert model.config.id2label == {0: "long", 1: "short"}
    # The validation data alone: the same model gives the same numbers.
    held_out = {"model_name_or_path": first, "num_experts": None, "train_file": files["docs.jsonl"]}
    call_recipe("run_classification.py", **{**arguments, **held_out, "learning_rate": 0.0, "output_dir": second})
    assert results(second)["eval_loss"] == pytest.approx(scores["eval_loss"], rel=1e-5)


def test_scores_on_a_data_set_of_the_hub(checkpoints, files, call_recipe, tmp_path, monkeypatch):
    rows = Dataset.from_json(str(files["docs.jsonl"])).select(range(8))
    monkeypatch.setattr("recipe.data.load_dataset", lambda name, config: DatasetDict(train=rows, validation=rows))
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["encoder"],
        dataset_name="user/lengths",
        dataset_config_name="short",
        max_steps=1,
        save_strategy="no",
        output_dir=tmp_path,
    )
    entries = yaml.safe_load((tmp_path / ".eval_results" / "hf-sparse-moe.yaml").read_text())
    assert [entry["dataset"] for entry in entries] == [{"id": "user/lengths", "task_id": "short"}] * len(entries)
    found = {entry["notes"]: entry["value"] for entry in entries}
    assert found["accuracy"] == pytest.approx(results(tmp_path)["eval_accuracy"])
    card = (tmp_path / "README.md").read_text()
    assert "on the split validation" in card
    assert ModelCard(card).data.datasets == ["user/lengths"]


def test_classification_of_tokens(checkpoints, files, call_recipe, tmp_path):
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["encoder"],
        task="tokens",
        text_column="words",
        label_column="tags",
        train_file=files["words.jsonl"],
        max_steps=60,
        learning_rate=5e-3,
        save_strategy="no",
        output_dir=tmp_path,
    )
    scores = results(tmp_path)
    assert {"eval_precision", "eval_recall", "eval_f1"} <= set(scores)
    assert scores["eval_accuracy"] > 0.8
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.num_labels == 2


def test_two_processes_lose_what_one_loses(checkpoints, files, call_recipe, tmp_path):
    """The same global batch: 2 processes with 4 rows each, and one process with 4 rows twice."""
    arguments = {
        "model_name_or_path": checkpoints["decoder"],
        "train_file": files["docs.jsonl"],
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "max_steps": 6,
        "save_strategy": "no",
    }
    config = str(TRAINING / "configs" / "cpu_2_processes.yaml")
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--main_process_port",
        "0",
    )
    line = command_line({**arguments, "output_dir": tmp_path / "two"})
    launch_recipe("run_clm.py", *line, launcher=(*launcher, str(PROBE), str(tmp_path / "facts.json")))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == {"world_size": 2, "wrapper": "DistributedDataParallel"}
    call_recipe("run_clm.py", **arguments, gradient_accumulation_steps=2, output_dir=tmp_path / "one")
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    steps = [log for log in one if "loss" in log]
    assert len(steps) == 6
    for expected, found in zip(steps, [log for log in two if "loss" in log], strict=True):
        for key in ("loss", "task_loss", "aux_loss"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (found["step"], key)
    scores = [results(tmp_path / name) for name in ("one", "two")]
    assert scores[1]["eval_perplexity"] == pytest.approx(scores[0]["eval_perplexity"], rel=1e-5)
