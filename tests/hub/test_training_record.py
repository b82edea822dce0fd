"""What the callback saw of a real training is what happened, and what the card and the Hub are told."""

import json
import math

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from transformers import Trainer, TrainingArguments

from hf_sparse_moe.hub import ModelCardCallback, write_model_card
from hf_sparse_moe.hub.evaluation_results import RESULTS_FILE, evaluation_entries, write_evaluation_results
from hf_sparse_moe.hub.training_record import read_evaluation
from hf_sparse_moe.routing import RoutingMonitor, add_leading_callback
from tiny_models import tiny_sparse


ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 60, (8, 6), generator=torch.manual_seed(0))]
PARTS = {"law": ROWS[:2], "python_code": ROWS[2:5]}


def make_trainer(folder, callback, eval_dataset=PARTS, **arguments) -> Trainer:
    torch.manual_seed(0)
    defaults = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    args = TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=2,
        **defaults | arguments,
    )
    model = tiny_sparse("llama")
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=eval_dataset, callbacks=[callback])
    add_leading_callback(trainer, RoutingMonitor())
    return trainer


def read(folder) -> dict:
    return json.loads((folder / "training_record.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model, evaluated once more at the end; the folder and its trainer."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    names = {"train_data": "hf://datasets/a/corpus@c0ffee", "eval_data": "hf://datasets/a/exam@1234"}
    names["eval_metrics"] = "loss is the mean over tokens"
    callback = ModelCardCallback(**names, eval_task="reading", license="mit", language=["en", "zh"], tags=["legal"])
    trainer = make_trainer(folder, callback, hub_token="hf_verysecrettokenofmine", run_name="my-run")
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    return folder, trainer


def test_the_record_is_the_trainer_s_own_history(trained):
    folder, trainer = trained
    record, history = read(folder), trainer.state.log_history
    training = record["training"]
    assert (training["rows"], training["steps"], training["weights_of_step"]) == (len(ROWS), 4, 4)
    assert training["data"] == ["hf://datasets/a/corpus@c0ffee"]
    last = [log for log in history if "loss" in log][-1]
    assert training["last_log"] == pytest.approx(last)
    assert {"task_loss", "aux_loss", "router/entropy"} <= set(training["last_log"])
    assert record["hyperparameters"]["learning_rate"] == trainer.args.learning_rate
    told = {name: record["hyperparameters"][name] for name in ("train_batch_size", "optimizer", "weight_decay")}
    assert told == {"train_batch_size": 2, "optimizer": trainer.args.optim.value, "weight_decay": 0.0}
    logged = [(line["step"], line["part"], line["loss"]) for line in record["evaluation"]["log"]]
    wanted = [
        (log["step"], part, log[f"eval_{part}_loss"])
        for log in history
        for part in PARTS
        if f"eval_{part}_loss" in log
    ]
    assert logged == wanted[:4]  # the fifth and sixth are those of the end
    results = record["evaluation"]["results"]
    assert {part: values["loss"] for part, values in results.items()} == {part: loss for _, part, loss in wanted[4:]}
    assert {part: data["rows"] for part, data in record["evaluation"]["data"].items()} == {"law": 2, "python_code": 3}


def test_every_checkpoint_has_its_own_record(trained):
    folder, trainer = trained
    record = read(folder / "checkpoint-2")
    assert (record["training"]["steps"], record["training"]["weights_of_step"]) == (2, 2)
    of_step_2 = {
        part: log[f"eval_{part}_loss"]
        for log in trainer.state.log_history
        for part in PARTS
        if log["step"] == 2 and f"eval_{part}_loss" in log
    }
    assert {part: values["loss"] for part, values in record["evaluation"]["results"].items()} == of_step_2


def test_no_token_path_or_name_of_the_machine_is_recorded(trained):
    folder, _ = trained
    text = (folder / "training_record.json").read_text()
    for secret in ("hf_verysecrettokenofmine", str(folder), "my-run"):
        assert secret not in text


def test_the_card_tells_the_record(trained):
    folder, _ = trained
    record = read(folder)
    card = write_model_card(folder, "tester/card").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["datasets"] == ["a/corpus"]
    assert (metadata["license"], metadata["language"]) == ("mit", ["en", "zh"])
    assert metadata["tags"] == ["moe", "sparse-moe", "decoder", "legal"]
    assert "| Rows of the training data | 8 |" in card
    assert "| `learning_rate` | 5e-05 |" in card
    assert "| Metrics | loss is the mean over tokens |" in card
    for part, values in record["evaluation"]["results"].items():
        assert f"| {part.replace('_', chr(92) + '_')} | {values['loss']:.6g} |" in card
    assert f"| `router/entropy` | {record['training']['last_log']['router/entropy']:.6g} |" in card


def test_scores_reach_the_hub_in_its_own_form(trained):
    folder, _ = trained
    write_model_card(folder, "tester/card")
    entries = parse_eval_result_entries(yaml.safe_load((folder / RESULTS_FILE).read_text()))
    results = read(folder)["evaluation"]["results"]
    assert {entry.notes: entry.value for entry in entries} == {
        f"loss, part {part}": values["loss"] for part, values in results.items()
    }
    assert {(entry.dataset_id, entry.dataset_revision, entry.task_id) for entry in entries} == {
        ("a/exam", "1234", "reading")
    }
    assert all(entry.date == read(folder)["evaluation"]["date"] for entry in entries)


def test_the_weights_of_the_best_step_have_the_results_of_that_step(tmp_path):
    arguments = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path / "out", ModelCardCallback(), eval_dataset=ROWS[:2], **arguments)
    trainer.train()  # "best" is the highest loss: that of the first evaluation
    assert trainer.state.best_global_step == 2
    record = read(tmp_path / "out")
    losses = {line["step"]: line["loss"] for line in record["evaluation"]["log"]}
    assert losses[2] != losses[4]
    assert (record["training"]["steps"], record["training"]["weights_of_step"]) == (4, 2)
    assert record["evaluation"]["results"][""]["loss"] == losses[2]
    trainer.evaluate()
    assert read(tmp_path / "out")["evaluation"]["results"][""]["loss"] == pytest.approx(losses[2], abs=1e-6)


def test_an_interrupted_training_is_told_whole(tmp_path):
    make_trainer(tmp_path / "out", ModelCardCallback(), max_steps=2).train()
    make_trainer(tmp_path / "out", ModelCardCallback()).train(resume_from_checkpoint=True)
    record = read(tmp_path / "out")
    assert record["training"]["steps"] == 4
    assert [line["step"] for line in record["evaluation"]["log"]] == [2, 2, 4, 4]


def test_what_nobody_told_is_left_out(tmp_path):
    trainer = make_trainer(tmp_path / "out", ModelCardCallback(), eval_dataset=None, eval_strategy="no", max_steps=1)
    trainer.train()
    trainer.save_model()
    card = write_model_card(tmp_path / "out").read_text()
    assert "| Optimizer steps | 1 |" in card
    assert "| Training data |" not in card
    assert "## Evaluation" not in card
    assert "not recorded" not in card
    assert not (tmp_path / "out" / ".eval_results").exists() or not list(
        (tmp_path / "out" / ".eval_results").iterdir()
    )


@pytest.mark.parametrize(
    ("logs", "wanted"),
    [
        ({"eval_loss": 1.0, "eval_runtime": 2.0, "eval_samples_per_second": 3.0, "epoch": 1.0}, ("", {"loss": 1.0})),
        ({"eval_de_loss": 1.0, "eval_de_bleu": 2.0, "eval_de_runtime": 2.0}, ("de", {"loss": 1.0, "bleu": 2.0})),
        ({"eval_runtime_loss": 1.0, "eval_runtime_runtime": 2.0}, ("runtime", {"loss": 1.0})),
        ({"loss": 1.0, "learning_rate": 2.0}, (None, {})),
        ({"train_runtime": 1.0, "train_loss": 2.0}, (None, {})),
        ({"test_runtime": 1.0, "test_loss": 2.0}, (None, {})),
    ],
)
def test_a_log_of_an_evaluation_is_told_by_its_names(logs, wanted):
    assert read_evaluation(logs) == wanted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_words(tmp_path, value):
    callback = ModelCardCallback()
    trainer = make_trainer(tmp_path / "out", callback)
    logs = {"eval_perplexity": value, "eval_runtime": 1.0}
    trainer.state.log_history.append(logs | {"step": 0})
    callback.on_evaluate(trainer.args, trainer.state, trainer.control, logs)
    words = {math.nan: "NaN", math.inf: "Infinity"}[value]
    assert read(tmp_path / "out")["evaluation"]["results"][""] == {"perplexity": words}


def test_data_that_is_not_on_the_hub_has_no_entries():
    results = {"": {"loss": 1.0, "passed": True, "note": "text"}}
    for names in (["some file"], ["hf://datasets/a/b", "hf://datasets/c/d"], [], None, "hf://datasets/a/b"):
        assert evaluation_entries({"evaluation": {"results": results, "data": {"": {"data": names}}}}) == []
    entries = evaluation_entries({"evaluation": {"results": results, "data": {"": {"data": ["hf://datasets/a/b"]}}}})
    assert [(entry.notes, entry.value) for entry in entries] == [("loss", 1.0)]


@pytest.mark.parametrize("record", [{}, {"evaluation": []}, {"evaluation": {"results": {"": 3}, "data": "x"}}])
def test_a_record_of_another_shape_has_no_entries(record):
    assert evaluation_entries(record) == []


def test_scores_are_not_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".eval_results").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads elsewhere"):
        write_evaluation_results({}, tmp_path / "folder")
    assert not list((tmp_path / "elsewhere").iterdir())
