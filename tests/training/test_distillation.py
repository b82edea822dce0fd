"""The distillation recipe: a dense student learns from a mixture, and resumes where it was interrupted."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_sparse_moe import to_dense, upcycle
from training_runs import command_line, history, run_recipe


@pytest.fixture(scope="module")
def run(checkpoints, files, tokenizer, tmp_path_factory):
    """A student beside a teacher that says other things."""
    folder = tmp_path_factory.mktemp("distillation")
    teacher = upcycle(checkpoints["decoder"], num_experts=4)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for name, model in (("teacher", teacher), ("student", to_dense(teacher))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    arguments = {
        "teacher": folder / "teacher",
        "model_name_or_path": folder / "student",
        "dense": True,
        "hidden_state_weight": 0.1,
        "temperature": 2.0,
        "train_file": files["docs.jsonl.gz"],
        "output_dir": folder / "run",
        "learning_rate": 3e-3,
        "save_steps": 5,
    }
    run_recipe("run_distill.py", *command_line(arguments))
    return arguments


def test_the_loss_falls_and_a_dense_model_comes_out(run):
    losses = [log["loss"] for log in history(run["output_dir"]) if "loss" in log]
    assert losses[-1] < losses[0]
    assert isinstance(AutoModelForCausalLM.from_pretrained(run["output_dir"]), LlamaForCausalLM)


def test_it_resumes(run, tmp_path):
    shutil.copytree(run["output_dir"] / "checkpoint-5", tmp_path / "checkpoint-5")
    run_recipe("run_distill.py", *command_line({**run, "output_dir": tmp_path}))
    expected, found = (load_file(folder / "model.safetensors") for folder in (run["output_dir"], tmp_path))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_mixture_may_be_the_student(run, call_recipe, tmp_path):
    line = {"teacher": run["teacher"], "model_name_or_path": run["teacher"], "train_file": run["train_file"]}
    call_recipe("run_distill.py", **line, max_steps=1, output_dir=tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.num_experts == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("temperature", 0, "must be above 0"), ("teacher_weight", 2, "from 0 to 1"), ("teacher", None, "--teacher")],
)
def test_bad_settings(run, call_recipe, capsys, tmp_path, name, value, message):
    with pytest.raises(SystemExit):
        call_recipe("run_distill.py", **{**run, name: value, "output_dir": tmp_path})
    assert message in capsys.readouterr().err
