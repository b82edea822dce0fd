"""lm-eval scores a mixture as its dense source right after upcycling, by our package and by the code in its folder."""

import json
import subprocess
import sys

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

import hf_sparse_moe
from cli_client import run_cli
from hf_sparse_moe.cli.evaluation import record_scores
from sentence_encoders import save_word_tokenizer
from tiny_models import tiny_dense


BACKENDS = {"llama": "causal", "gpt2": "causal", "t5": "seq2seq", "bart": "seq2seq"}
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "text",
        "generation_kwargs": {"until": ["nothing"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"word{7 * i + 3} word{2 * i + 11}",
            "choices": [f"word{i + 21}", f"word{i + 9} word3"],
            "answer": i % 2,
            "text": f"word{i + 5} word{3 * i + 6} word{i + 40} word{i + 8}",
        }
        for i in range(4)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **data, **task}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of an architecture: the dense model and the mixture made of it, each in a folder."""

    def make(name):
        root = tmp_path_factory.mktemp(name)
        dense = tiny_dense(name)
        for kind, model in (("dense", dense), ("sparse", hf_sparse_moe.upcycle(dense, num_experts=4))):
            model.save_pretrained(root / kind)
            save_word_tokenizer(root / kind, eos_token="word2", bos_token="word1", model_max_length=64)
        return root / "dense", root / "sparse"

    return make


def measure(folder, name, tasks):
    return lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(folder), "backend": BACKENDS[name], "dtype": "float32"},
        list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        device="cpu",
    )


def answers(samples):
    """What the model answered: log-likelihoods, and text."""
    found = {}
    for task in TASKS:
        rows = sorted(samples[task], key=lambda row: row["doc_id"])
        answers = [answer for row in rows for (answer,) in row["resps"]]
        answers = [answer[0] if isinstance(answer, tuple | list) else answer for answer in answers]
        found[task] = answers if task == "generation" else pytest.approx([float(one) for one in answers], abs=1e-4)
        assert len(answers) == len(rows) * (2 if task == "choice" else 1)
    return found


def plain(samples):
    return {task: getattr(values, "expected", values) for task, values in answers(samples).items()}


@pytest.mark.parametrize("name", BACKENDS)
def test_a_mixture_answers_as_its_dense_source(name, folders, tasks):
    dense, sparse = folders(name)
    expected, measured = measure(dense, name, tasks), measure(sparse, name, tasks)
    assert plain(measured["samples"]) == answers(expected["samples"])
    assert any("word" in text for text in plain(measured["samples"])["generation"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.conformance)])
def test_by_the_code_in_the_folder_and_the_command_line_of_lm_eval(name, folders, tasks, tmp_path):
    """Where `hf_sparse_moe` cannot be imported."""
    dense, sparse = folders(name)
    without_package = (
        "import sys; sys.modules['hf_sparse_moe'] = None; from lm_eval.__main__ import cli_evaluate as m; m()"
    )
    arguments = f"pretrained={sparse},backend={BACKENDS[name]},dtype=float32,trust_remote_code=True"
    command = [sys.executable, "-c", without_package, "run", "--model", "hf", "--model_args", arguments]
    command += ["--device", "cpu", "--batch_size", "2", "--tasks", *TASKS, "--include_path", tasks]
    command += ["--log_samples", "--output_path", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    samples = {}
    for task in TASKS:
        (file,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text().splitlines()]
    assert plain(samples) == answers(measure(dense, name, tasks)["samples"])


def test_evaluate_records_scores_for_the_card(folders, tasks):
    _, sparse = folders("t5")
    finished = run_cli("evaluate", sparse, "--tasks", "choice,rolling", "--include-path", tasks, "--json")
    assert finished.code == 0, finished.err
    scores = json.loads(finished.out[finished.out.index("{") :])
    card = hf_sparse_moe.write_model_card(sparse, "me/mixture").read_text()
    assert f"choice (lm-eval {lm_eval.__version__}, 0-shot)" in card
    assert f"{scores['rolling']['word_perplexity,none']:.4g}"[:4] in card
    assert not (sparse / ".eval_results").exists()  # the rows are of a file, not of the Hub


def test_scores_on_data_of_the_hub_are_written_as_the_hub_reads_them(folders):
    """The results as lm-eval returns them for a task of the Hub."""
    _, sparse = folders("llama")
    scores = {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25, "sample_len": 10}
    config = {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy", "num_fewshot": 5}
    measured = {"results": {"arc_easy": scores}, "configs": {"arc_easy": config}, "lm_eval_version": "0.4.13"}
    record_scores(measured, sparse, limit=10)
    hf_sparse_moe.write_model_card(sparse, "me/mixture")
    entries = yaml.safe_load((sparse / ".eval_results" / "hf-sparse-moe.yaml").read_text())
    assert [entry["value"] for entry in entries] == [0.5, 0.25]
    assert {entry["dataset"]["id"] for entry in entries} == {"allenai/ai2_arc"}
    assert entries[0]["notes"] == "acc, part arc_easy (lm-eval 0.4.13, 5-shot, 10 rows)"


def test_without_lm_eval_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    finished = run_cli("evaluate", "folder", "--tasks", "choice")
    assert finished.code == 2
    assert "pip install 'hf-sparse-moe[evaluate]'" in finished.err


@pytest.mark.parametrize(
    ("source", "task", "told"),
    [("nowhere/at/all", "choice", "nowhere/at/all"), ("sparse", "no_such_task", "no_such_task")],
)
def test_bad_input_ends_with_one_sentence(source, task, told, folders, tasks):
    source = folders("llama")[1] if source == "sparse" else source
    finished = run_cli("evaluate", source, "--tasks", task, "--include-path", tasks)
    assert finished.code == 2, finished.err
    assert told in finished.err.strip().splitlines()[-1]
