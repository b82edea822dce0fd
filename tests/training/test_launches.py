"""A recipe on engines that share the model out: what evaluates and describes it finds whole weights all the same."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hf_sparse_moe import upcycle
from training_runs import TRAINING, command_line, launch_recipe, results


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
PROBE = str(Path(__file__).with_name("launch_probe.py"))
ZERO3 = TRAINING / "configs" / "zero3.json"
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("c++") is None, reason="needs DeepSpeed and a C++ compiler"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "wrapper"),
    [
        pytest.param({"deepspeed": ZERO3}, "DeepSpeedEngine", marks=needs_deepspeed, id="zero3"),
        pytest.param({"distributed_config": '{"fsdp_size": 2, "ep_size": 2}'}, "FSDPSparseMoe", id="native"),
    ],
)
def test_seq2seq_generates_and_writes_its_card(engine, wrapper, checkpoints, files, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    dense = checkpoints["encoder_decoder"]
    shutil.copytree(dense, tmp_path / "mixture", ignore=shutil.ignore_patterns("*.safetensors"))  # the tokenizer
    upcycle(str(dense), num_experts=4).save_pretrained(tmp_path / "mixture")
    arguments = {
        "model_name_or_path": tmp_path / "mixture",
        "train_file": files["docs.jsonl"],
        "source_column": "text",
        "target_column": "first",
        "metric": "rouge",
        "generation_max_length": 8,
        "max_eval_samples": 8,
        "max_steps": 2,
        "save_strategy": "no",
        "output_dir": tmp_path / "out",
        **engine,
    }
    line = command_line(arguments)
    launch_recipe("run_seq2seq.py", *line, launcher=(*TORCHRUN, PROBE, str(tmp_path / "facts.json")))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["world_size"] == 2
    assert facts["wrapper"].startswith(wrapper)
    assert {"eval_loss", "eval_rouge1"} <= set(results(tmp_path / "out"))
    assert "| Parameters, total |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
