"""What a person gets wrong ends in one sentence that says what, and exit code 2."""

import gzip
import json
import re
import shutil
import sys

import pytest
from transformers import TrainingArguments

import recipe
from hf_sparse_moe import upcycle


def base(checkpoints, files):
    return {"model_name_or_path": checkpoints["decoder"], "train_file": files["docs.jsonl"]}


@pytest.mark.parametrize(
    ("script", "changes", "sentence"),
    [
        ("run_clm.py", {"train_file": "nowhere/*.txt"}, "`--train_file=nowhere/*.txt` matches no file"),
        ("run_clm.py", {"train_file": __file__}, "`--train_file` must name files of one kind"),
        ("run_clm.py", {"train_file": None}, "Pass either `--train_file`"),
        (
            "run_clm.py",
            {"text_column": "body"},
            "`--text_column=body` is no column of the train data; it has ['first'",
        ),
        ("run_clm.py", {"model_name_or_path": "/nowhere/model"}, "`--model_name_or_path=/nowhere/model` is no folder"),
        ("run_clm.py", {"model_name_or_path": None}, "Pass either `--model_name_or_path`"),
        (
            "run_clm.py",
            {"config_overrides": '{"experts": 3}'},
            "`experts` is neither a field of `SparseMoeDecoderConfig`",
        ),
        ("run_clm.py", {"config_overrides": "{experts"}, "is no JSON"),
        ("run_clm.py", {"num_experts_per_tok": 9}, "`num_experts_per_tok=9` is not allowed"),
        ("run_clm.py", {"upcycling_method": "magic"}, "`method='magic'` is not allowed"),
        ("run_clm.py", {"max_length": 4096}, "`--max_length=4096` is more than the 128 tokens"),
        ("run_clm.py", {"max_length": 0}, "`--max_length=0` must be at least 1"),
        ("run_seq2seq.py", {"max_target_length": 0}, "`--max_target_length=0` must be at least 1"),
        ("run_clm.py", {"max_length": 128, "max_train_samples": 1}, "fill no block of 128 tokens"),
        ("run_clm.py", {"nonsense": 1}, "['--nonsense', '1']"),
        ("run_mlm.py", {}, "which has no `AutoModelForMaskedLM`"),
        ("run_seq2seq.py", {"source_column": "text.en"}, "`--source_column=text.en` is no column"),
        (
            "run_seq2seq.py",
            {"metric_tokenizer": "klingon"},
            "`--metric_tokenizer=klingon` of `--metric sacrebleu` must",
        ),
        ("run_seq2seq.py", {"metric": "rouge", "metric_tokenizer": "intl"}, "must be one of ('zh', 'char')"),
        ("run_classification.py", {"label_column": "class"}, "`--label_column=class` is no column"),
        ("run_classification.py", {"task": "chapters"}, "`--task=chapters` must be one of"),
    ],
)
def test_one_sentence_and_exit_code_2(script, changes, sentence, checkpoints, files, call_recipe, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call_recipe(script, **{**base(checkpoints, files), "output_dir": tmp_path / "out", **changes})
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sentence in error[0]
    assert not (tmp_path / "out").exists()


def test_files_that_do_not_hold_what_their_name_says(checkpoints, files, call_recipe, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_clm.py", **{**base(checkpoints, files), "train_file": broken, "output_dir": tmp_path / "out"})
    assert stop.value.code == 2
    assert "cannot be read as json" in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(checkpoints, files, call_recipe, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_clm.py", **base(checkpoints, files), output_dir=tmp_path)
    assert stop.value.code == 2
    assert "is not empty and holds no checkpoint" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model_name_or_path: x\ntrain_file: y\nlerning_rate: 1.0\n", "lerning_rate"),
        ("model_name_or_path: [x\n", "expected ',' or ']'"),
        ("model_name_or_path: x\ntrain_file: y\nnum_experts: four\n", "invalid int value: 'four'"),
        ("model_name_or_path: x\ntrain_file: y\nlearning: 1.0\n", "learning"),
        ("- model_name_or_path\n", "must hold a mapping"),
        ("", "must hold a mapping"),
    ],
)
def test_mistakes_in_a_yaml_file(text, sentence, call_recipe, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_clm.py", str(tmp_path / "run.yaml"))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_command_line_wins_over_the_file(monkeypatch, tmp_path):
    """And numbers that YAML 1.1 reads as text, such as 1e-3, are numbers."""
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: x\ntrain_file: y\nlearning_rate: 1e-3\nnum_experts: 4\nwarmup_steps: 2e-1\n"
        "report_to: []\nuse_cpu: true\nconfig_overrides: {capacity_factor: 1.5}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    for line, rate, experts in (([], 1e-3, 4), (["--learning_rate", "1e-4", "--num_experts=2"], 1e-4, 2)):
        monkeypatch.setattr(sys, "argv", ["run_clm.py", str(tmp_path / "run.yaml"), *line])
        classes = (recipe.ModelArguments, recipe.DataArguments, TrainingArguments)
        model_args, data_args, args = recipe.parse_arguments("A recipe.", *classes)
        assert (args.learning_rate, model_args.num_experts) == (rate, experts)
        assert (args.warmup_steps, args.report_to, args.use_cpu) == (0.2, [], True)
        assert (data_args.train_file, data_args.max_length) == (["y"], None)
        assert model_args.config_overrides == {"capacity_factor": 1.5}
        assert args.num_train_epochs == 3  # a default


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("rows.jsonl", "", "has no rows"),
        ("rows.jsonl.gz", "", "has no rows"),
        ("rows.jsonl", "\n \n", "has no rows"),
        ("rows.json", "[]", "has no rows"),
        ("rows.csv", "text,label\n", "has no rows"),
        ("rows.txt.gz", "\n\n", "has no rows"),
        ("rows.jsonl.gz", None, "cannot be read as json: Compressed file ended"),
    ],
)
def test_files_without_rows_are_named(name, text, sentence, tmp_path):
    """Alone, and beside a file that has some."""
    path, other = tmp_path / name, tmp_path / f"other-{name}"
    rows = "text,label\none,two\n" if ".csv" in name else '{"text": "one"}\n'
    for each, content in ((path, rows if text is None else text), (other, rows)):
        with gzip.open(each, "wt") if name.endswith(".gz") else each.open("w") as file:
            file.write(content)
    if text is None:
        path.write_bytes(path.read_bytes()[:-12])
    for files in [path], [path, other]:
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + re.escape(sentence)):
            recipe.load_data(recipe.DataArguments(train_file=list(map(str, files))))


def test_one_row_cannot_be_divided(tmp_path):
    (tmp_path / "row.txt").write_text("one line\n")
    with pytest.raises(ValueError, match=r"leaves none of the rows of `.*row\.txt` \(1\) to train on"):
        recipe.load_data(recipe.DataArguments(train_file=str(tmp_path / "row.txt")))


@pytest.mark.parametrize(
    ("pair", "column"),
    [(None, "source"), ({"source": None, "target": "two"}, "source"), ({"source": "one", "target": None}, "target")],
)
def test_a_pair_without_a_text(pair, column, checkpoints, call_recipe, tmp_path, capsys):
    rows = [{"pair": {"source": "one", "target": "two"}}, {"pair": pair}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = {"model_name_or_path": checkpoints["encoder_decoder"], "validation_file": tmp_path / "pairs.jsonl"}
    line |= {"source_column": "pair.source", "target_column": "pair.target", "output_dir": tmp_path / "out"}
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_seq2seq.py", **line)
    assert stop.value.code == 2
    assert f"column=pair.{column}` must hold a text in every row: not so in 1 of 2" in capsys.readouterr().err


def test_a_dense_model_in_4_bits(checkpoints, files, call_recipe, tmp_path, capsys):
    shutil.copytree(checkpoints["decoder"], tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": packed}))
    line = {**base(checkpoints, files), "model_name_or_path": tmp_path / "packed", "output_dir": tmp_path / "out"}
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_clm.py", **line)
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "is quantised (" in error[0]


def test_a_mixture_keeps_its_number_of_experts(checkpoints, files, call_recipe, tmp_path, capsys):
    upcycle(str(checkpoints["decoder"]), num_experts=2).save_pretrained(tmp_path / "mixture")
    arguments = {**base(checkpoints, files), "model_name_or_path": tmp_path / "mixture", "num_experts": 4}
    arguments["tokenizer_name"] = checkpoints["tokenizer"]
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_clm.py", **arguments, output_dir=tmp_path / "out")
    assert stop.value.code == 2
    assert "has 2 experts" in capsys.readouterr().err


def test_a_truncated_mixture(checkpoints, files, call_recipe, tmp_path, capsys):
    upcycle(str(checkpoints["decoder"]), num_experts=2).save_pretrained(tmp_path / "mixture")
    weights = tmp_path / "mixture" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = {**base(checkpoints, files), "model_name_or_path": tmp_path / "mixture", "num_experts": None}
    arguments["tokenizer_name"] = checkpoints["tokenizer"]
    with pytest.raises(SystemExit) as stop:
        call_recipe("run_clm.py", **arguments, output_dir=tmp_path / "out")
    assert stop.value.code == 2
    assert "truncated or corrupt" in capsys.readouterr().err
