"""The dense twin, what is frozen, and when a training stops."""

import ast
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
)

from hf_sparse_moe import upcycle
from hf_sparse_moe.models.pretrained_model import SparseMoePreTrainedModel
from recipe.optimization import TrainingArguments, freeze, prepare_training
from tiny_models import FAMILIES, tiny_dense, tiny_sparse
from training_runs import history, results


TASKS = {
    "run_clm.py": ("decoder", "docs.jsonl", {}),
    "run_mlm.py": ("encoder", "docs.jsonl", {}),
    "run_seq2seq.py": ("encoder_decoder", "docs.jsonl", {"source_column": "text", "target_column": "first"}),
    "run_classification.py": ("encoder", "docs.jsonl", {"dataloader_num_workers": 0}),
}


@pytest.mark.parametrize("script", TASKS)
def test_label_smoothing_leaves_the_balance_loss(script, checkpoints, files, call_recipe, tmp_path):
    """Trainer's smoothed loss is one from outside: of copies only the balance loss moves a router."""
    family, rows, arguments = TASKS[script]
    routers = {}
    for coefficient in (0, 1):
        call_recipe(
            script,
            model_name_or_path=checkpoints[family],
            train_file=files[rows],
            label_smoothing_factor=0.1,
            router_aux_loss_coef=coefficient,
            freeze=["experts"],
            learning_rate=0.1,
            optim="sgd",
            max_steps=2,
            save_strategy="no",
            output_dir=tmp_path / str(coefficient),
            **arguments,
        )
        tensors = load_file(tmp_path / str(coefficient) / "model.safetensors")
        routers[coefficient] = torch.cat([value.flatten() for name, value in tensors.items() if "gate.weight" in name])
    assert (routers[0] - routers[1]).abs().max() > 1e-5


@pytest.mark.parametrize("script", TASKS)
def test_the_dense_twin_by_the_same_arguments(script, checkpoints, files, call_recipe, tmp_path):
    """A mixture of copies begins where the dense model does, and both are trained, saved and described."""
    family, rows, arguments = TASKS[script]
    for name, dense in (("dense", True), ("mixture", None)):
        call_recipe(
            script,
            model_name_or_path=checkpoints[family],
            train_file=files[rows],
            dense=dense,
            max_eval_samples=8,
            max_steps=2,
            logging_steps=1,
            eval_on_start=True,
            eval_strategy="steps",
            save_strategy="no",
            output_dir=tmp_path / name,
            **arguments,
        )
    before = [history(tmp_path / name)[0]["eval_loss"] for name in ("dense", "mixture")]
    assert before[0] == pytest.approx(before[1], rel=1e-5)
    assert set(results(tmp_path / "dense")) == set(results(tmp_path / "mixture"))
    assert (tmp_path / "dense" / "README.md").is_file()
    classes = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM}
    if script != "run_seq2seq.py":
        auto_class = AutoModelForSequenceClassification if "label" in script else classes[family]
        model = auto_class.from_pretrained(tmp_path / "dense")
        assert not isinstance(model, SparseMoePreTrainedModel)


def test_the_dense_twin_accumulates_gradients_as_the_mixture_does(checkpoints, files, call_recipe, tmp_path):
    """BERT's own head takes `num_items_in_batch` and does not divide by it."""
    norms = {}
    for name, steps, size in (("whole", 1, 8), ("parts", 4, 2)):
        call_recipe(
            "run_classification.py",
            model_name_or_path=checkpoints["encoder"],
            train_file=files["docs.jsonl"],
            dense=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            config_overrides=None,
            output_dir=tmp_path / name,
        )
        norms[name] = next(log for log in history(tmp_path / name) if "loss" in log)["loss"]
    assert norms["parts"] == pytest.approx(norms["whole"], rel=0.05)


def test_the_dense_twin_from_scratch(checkpoints, files, call_recipe, tmp_path):
    call_recipe(
        "run_mlm.py",
        config_name="bert",
        tokenizer_name=checkpoints["tokenizer"],
        config_overrides='{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, '
        '"num_attention_heads": 4, "num_shared_experts": 1}',
        train_file=files["docs.txt"],
        dense=True,
        max_steps=1,
        save_strategy="no",
        output_dir=tmp_path,
    )
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert model.config.model_type == "bert"
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path))


def test_expert_dropout_and_early_stopping(checkpoints, files, call_recipe, tmp_path):
    """At a rate that only makes the model worse, the second evaluation without a gain ends the training."""
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["encoder"],
        train_file=files["docs.jsonl"],
        expert_dropout=0.4,
        freeze=["embeddings", "layers:0"],
        early_stopping_patience=2,
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=20,
        logging_steps=1,
        learning_rate=10.0,
        output_dir=tmp_path,
    )
    evaluated = [log["eval_loss"] for log in history(tmp_path) if "eval_loss" in log]
    best = evaluated.index(min(evaluated))
    assert len(evaluated) == best + 3 < 20
    assert results(tmp_path)["eval_loss"] == pytest.approx(evaluated[best])
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert trained.sparse_blocks[0].experts.dropout.p == 0.4 or trained.config.expert_dropout == 0.4
    start = AutoModelForMaskedLM.from_pretrained(checkpoints["encoder"]).bert
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"):
        assert torch.equal(trained.base_model.state_dict()[name], start.state_dict()[name])
    moved = "encoder.layer.1.attention.self.query.weight"
    assert not torch.equal(trained.base_model.state_dict()[moved], start.state_dict()[moved])


PAIRS = {"text_column": "first", "second_text_column": "text"}
SCORED = {
    "clm": ("run_clm.py", "decoder", "docs.jsonl", {"group_by": "label"}),
    "mlm": ("run_mlm.py", "encoder", "docs.jsonl", {}),
    "seq2seq": ("run_seq2seq.py", *TASKS["run_seq2seq.py"]),
    "texts": ("run_classification.py", "encoder", "docs.jsonl", {}),
    "regression": ("run_classification.py", "encoder", "numbers.jsonl", {}),
    "tokens": (
        "run_classification.py",
        "encoder",
        "words.jsonl",
        {"task": "tokens", "text_column": "words", "label_column": "tags"},
    ),
    "qa": ("run_qa.py", "encoder", "some.jsonl", {}),
    "search": ("run_embeddings.py", "encoder", "docs.jsonl", PAIRS),
    "similarity": ("run_embeddings.py", "encoder", "numbers.jsonl", {**PAIRS, "score_column": "label"}),
}


@pytest.mark.parametrize("task", SCORED)
def test_the_metric_of_the_best_model_is_one_of_the_recipe(task, checkpoints, files, call_recipe, tmp_path, capsys):
    """The sentence names all that an evaluation computes."""
    script, family, name, arguments = SCORED[task]
    numbers = [{"text": f"word {row}", "first": f"{row}", "label": row / 4} for row in range(4)]
    asked = [{"context": "one two", "question": "?", "answers": {"text": words}} for words in (["two"], [])]
    for path, rows in (("numbers.jsonl", numbers), ("some.jsonl", asked)):
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = {"model_name_or_path": checkpoints[family], "validation_file": files.get(name, tmp_path / name)}
    line |= {"max_eval_samples": 8, "output_dir": tmp_path / "out", **arguments}
    with pytest.raises(SystemExit) as stop:
        call_recipe(script, **line, metric_for_best_model="eval_ter")
    assert stop.value.code == 2
    (names,) = re.findall(
        r"`--metric_for_best_model=eval_ter` is not computed here\. Choose one of (\[.*\])\.", capsys.readouterr().err
    )
    if script != "run_embeddings.py":  # its evaluator needs no predictions
        with pytest.raises(SystemExit):
            call_recipe(script, **line, metric_for_best_model=ast.literal_eval(names)[1], prediction_loss_only="true")
        assert "Choose one of ['loss']." in capsys.readouterr().err
    call_recipe(script, **line)
    computed = {key.removeprefix("eval_") for key in results(tmp_path / "out") if key.startswith("eval_")}
    speed = {"runtime", "samples", "samples_per_second", "steps_per_second", "model_preparation_time"}
    assert set(ast.literal_eval(names)) == computed - speed


@pytest.mark.parametrize("name", ["loss", "perplexity", "eval_perplexity_law", "mse", "accuracy", "rouge1"])
def test_lower_is_better_for_errors(name, tmp_path):
    arguments = {"metric_for_best_model": name, "report_to": [], "use_cpu": True}
    assert TrainingArguments(str(tmp_path), **arguments).greater_is_better is (name in ("accuracy", "rouge1"))
    assert TrainingArguments(str(tmp_path), **arguments, greater_is_better=True).greater_is_better


def names(model, trained: bool = False) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad is trained}


@pytest.mark.parametrize("family", FAMILIES)
def test_freeze(family):
    model = tiny_sparse(family)
    freeze(model, ["embeddings"])
    assert model.get_input_embeddings().weight.requires_grad is False
    assert not any(".0." in name or ".1." in name for name in names(model))
    model = tiny_sparse(family)
    freeze(model, ["experts"])
    assert names(model) == {name for name in names(tiny_sparse(family), True) if "experts." in name}
    freeze(model, ["routers"])
    assert all(not parameter.requires_grad for block in model.sparse_blocks for parameter in block.parameters())
    model = tiny_sparse(family)
    freeze(model, ["layers:0-1"])
    frozen = names(model)
    assert frozen
    assert all(".0." in name or ".1." in name for name in frozen)
    model = tiny_sparse(family)
    freeze(model, ["all-but-experts"])
    left = names(model, True)
    outside = {name for name, _ in model.named_parameters()} - {
        f"dense.{model.dense.base_model_prefix}.{name}" for name, _ in model.base_model.named_parameters()
    }
    assert any("experts." in name for name in left)
    assert all("experts." in name or name in outside for name in left)


def test_freeze_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"`--freeze attention` is none of embeddings"):
        freeze(tiny_sparse("llama"), ["attention"])
    with pytest.raises(ValueError, match=r"`--freeze layers:7` names nothing"):
        freeze(tiny_sparse("llama"), ["layers:7"])
    with pytest.raises(ValueError, match=r"`--freeze experts` names nothing in a `LlamaForCausalLM`"):
        freeze(tiny_dense("llama"), ["experts"])
    model = tiny_sparse("llama")
    for parameter in (*model.base_model.norm.parameters(), *model.get_output_embeddings().parameters()):
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(model, ["embeddings", "layers:0-1"])


def test_rates_of_routers_and_experts(tmp_path):
    """A rate of 0 leaves them as they are, and no router decays."""
    model = tiny_sparse("llama")
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(5, 60, (4, 6))]
    rates = {"learning_rate": 1e-2, "router_learning_rate": 1e-3, "expert_learning_rate": 0.0, "weight_decay": 0.1}
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", **rates)
    trainer = Trainer(model, args, train_dataset=rows)
    prepare_training(trainer, is_mixture=True)
    trainer.train()
    groups = {id(each): group for group in trainer.optimizer.param_groups for each in group["params"]}
    for name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        moved = not torch.equal(parameter, start[name])
        if ".gate." in name:
            assert (group["initial_lr"], group["weight_decay"], moved) == (1e-3, 0.0, True), name
        elif ".experts." in name:
            assert (group["initial_lr"], moved) == (0.0, False), name
        else:
            assert (group["initial_lr"], moved) == (1e-2, True), name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"early_stopping_patience": 2}, "pass `--load_best_model_at_end true"),
        ({"early_stopping_patience": 0}, "`--early_stopping_patience=0` must be at least 1"),
        ({"freeze": "experts", "expert_learning_rate": 1e-3}, "`expert_learning_rate=0.001` has nothing to act on"),
        ({"freeze": "head"}, "`--freeze head` is none of embeddings"),
        ({"expert_dropout": 1.5}, "`expert_dropout=1.5` is not allowed"),
        ({"dense": True, "distributed_config": '{"fsdp_size": 2}'}, "`--dense` and `--distributed_config`"),
    ],
)
def test_one_sentence(arguments, sentence, checkpoints, files, call_recipe, tmp_path, capsys):
    base = {"model_name_or_path": checkpoints["encoder"], "train_file": files["docs.jsonl"]}
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_classification.py", **base, **arguments, output_dir=tmp_path / "out")
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]


def test_the_dense_twin_of_a_mixture_is_not_in_it(checkpoints, files, call_recipe, tmp_path, capsys):
    upcycle(str(checkpoints["decoder"]), num_experts=2).save_pretrained(tmp_path / "mixture")
    arguments = {"tokenizer_name": checkpoints["tokenizer"], "train_file": files["docs.jsonl"], "dense": True}
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_clm.py", model_name_or_path=tmp_path / "mixture", **arguments, output_dir=tmp_path / "out")
    assert stop.value.code == 2
    assert "`--dense` trains a dense checkpoint" in capsys.readouterr().err
