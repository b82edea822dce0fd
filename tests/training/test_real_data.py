"""The recipes on real public data and a real dense checkpoint, briefly."""

import json
import math

import pytest
from transformers import BertTokenizerFast

from training_runs import history, results


TINY_BERT = '{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}'
TINY_T5 = '{"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8}'
BRIEF = {"save_strategy": "no", "max_train_samples": 400, "max_eval_samples": 40}


@pytest.mark.needs_data("stories260k", "domains")
def test_stories260k_on_domains(call_recipe, data_dir, tmp_path):
    call_recipe(
        "run_clm.py",
        model_name_or_path=data_dir / "stories260k" / "hf",
        train_file=data_dir / "domains" / "train" / "d*.jsonl.gz",
        validation_file=data_dir / "domains" / "valid" / "d*.jsonl.gz",
        group_by="file",
        prompts=["Once upon a time", "The king"],
        max_length=64,
        max_steps=20,
        learning_rate=3e-3,
        eval_on_start=True,
        eval_strategy="epoch",
        output_dir=tmp_path,
        **BRIEF,
    )
    scores = results(tmp_path)
    assert scores["eval_perplexity_drama"] == scores["eval_perplexity"]
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert samples[0].startswith("Once upon a time")
    assert samples[1].startswith("The king")
    assert all(len(sample) > 20 for sample in samples)
    assert scores["eval_loss"] == pytest.approx(math.log(scores["eval_perplexity"]), rel=1e-3)
    before = history(tmp_path)[0]["eval_loss"]
    assert scores["eval_loss"] < before - 0.1


@pytest.mark.needs_data("wikitext2")
def test_masked_lm_on_wikitext(call_recipe, checkpoints, data_dir, tmp_path):
    call_recipe(
        "run_mlm.py",
        config_name="bert",
        config_overrides=TINY_BERT,
        tokenizer_name=checkpoints["tokenizer"],
        train_file=data_dir / "wikitext2" / "valid.txt",
        validation_file=data_dir / "wikitext2" / "test.txt",
        output_dir=tmp_path,
        **BRIEF,
    )
    assert results(tmp_path)["eval_perplexity"] < 1000


@pytest.mark.needs_data("multi30k")
def test_translation_on_multi30k(call_recipe, checkpoints, data_dir, tmp_path):
    call_recipe(
        "run_seq2seq.py",
        config_name="t5",
        config_overrides=TINY_T5,
        tokenizer_name=checkpoints["tokenizer"],
        train_file=data_dir / "multi30k" / "train.jsonl.gz",
        validation_file=data_dir / "multi30k" / "validation.jsonl.gz",
        source_column="translation.en",
        target_column="translation.de",
        generation_max_length=12,
        output_dir=tmp_path,
        **BRIEF,
    )
    assert {"eval_bleu", "eval_chrf"} <= set(results(tmp_path))


@pytest.mark.needs_data("sst2")
def test_sentiment_on_sst2(call_recipe, checkpoints, data_dir, tmp_path):
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["decoder"],
        train_file=data_dir / "sst2" / "train.tsv",
        validation_file=data_dir / "sst2" / "dev.tsv",
        column_names=["text", "label"],
        no_quotes=True,
        output_dir=tmp_path,
        **BRIEF,
    )
    assert 0.2 < results(tmp_path)["eval_accuracy"] < 1


@pytest.mark.needs_data("banking77")
def test_intents_on_banking77(call_recipe, checkpoints, data_dir, tmp_path):
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["encoder"],
        train_file=data_dir / "banking77" / "train.csv.gz",
        validation_file=data_dir / "banking77" / "test.csv.gz",
        label_column="category",
        output_dir=tmp_path,
        **{**BRIEF, "max_train_samples": None},
    )
    assert "eval_f1" in results(tmp_path)


@pytest.mark.needs_data("stsb")
def test_similarity_on_stsb(call_recipe, checkpoints, data_dir, tmp_path):
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["encoder"],
        train_file=data_dir / "stsb" / "stsb-en-train.csv.gz",
        validation_file=data_dir / "stsb" / "stsb-en-dev.csv.gz",
        column_names=["text", "other", "label"],
        second_text_column="other",
        output_dir=tmp_path,
        **BRIEF,
    )
    assert {"eval_pearson", "eval_spearman", "eval_mse"} <= set(results(tmp_path))


@pytest.mark.needs_data("ud_ewt")
def test_parts_of_speech_on_ud_ewt(call_recipe, checkpoints, data_dir, tmp_path):
    call_recipe(
        "run_classification.py",
        model_name_or_path=checkpoints["encoder"],
        task="tokens",
        text_column="tokens",
        label_column="upos",
        train_file=data_dir / "ud_ewt" / "dev.jsonl.gz",
        validation_file=data_dir / "ud_ewt" / "test.jsonl.gz",
        output_dir=tmp_path,
        **BRIEF,
    )
    assert {"eval_accuracy", "eval_f1"} <= set(results(tmp_path))


@pytest.mark.needs_data("squad_v11_dev")
def test_questions_on_squad(call_recipe, checkpoints, data_dir, tmp_path):
    call_recipe(
        "run_qa.py",
        model_name_or_path=checkpoints["encoder"],
        train_file=data_dir / "squad_v11_dev" / "train.jsonl.gz",
        validation_file=data_dir / "squad_v11_dev" / "validation.jsonl.gz",
        max_length=96,
        output_dir=tmp_path,
        **BRIEF,
    )
    assert 0 <= results(tmp_path)["eval_exact_match"] <= results(tmp_path)["eval_f1"] <= 100


@pytest.mark.needs_data("cmrc2018", "bert_chinese_vocab")
def test_chinese_questions_on_cmrc(call_recipe, data_dir, tmp_path):
    """SQuAD's nested files; the tokenizer is made of the public Chinese vocabulary."""
    tokens = (data_dir / "bert_chinese_vocab" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    BertTokenizerFast(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(tmp_path / "zh")
    call_recipe(
        "run_qa.py",
        config_name="bert",
        config_overrides=TINY_BERT,
        tokenizer_name=tmp_path / "zh",
        train_file=data_dir / "cmrc2018" / "cmrc2018_dev.json.gz",
        validation_file=data_dir / "cmrc2018" / "cmrc2018_trial.json.gz",
        language="zh",
        max_length=96,
        output_dir=tmp_path / "out",
        **BRIEF,
    )
    scores = results(tmp_path / "out")
    assert 0 <= scores["eval_f1"] < 100
    assert scores["eval_exact_match"] <= scores["eval_f1"]


@pytest.mark.needs_data("domains", "bert_chinese_vocab")
def test_chinese_topics_on_domains(call_recipe, data_dir, tmp_path):
    """Poetry, encyclopedia and, with other letters altogether, English law."""
    tokens = (data_dir / "bert_chinese_vocab" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    BertTokenizerFast(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(tmp_path / "zh")
    names = [f"{name}.jsonl.gz" for name in ("zh_encyclopedia", "zh_poetry", "law")]
    call_recipe(
        "run_classification.py",
        config_name="bert",
        config_overrides=TINY_BERT,
        tokenizer_name=tmp_path / "zh",
        train_file=[data_dir / "domains" / "train" / name for name in names],
        validation_file=[data_dir / "domains" / "valid" / name for name in names],
        label_column="domain",
        max_steps=40,
        learning_rate=2e-3,
        save_strategy="no",
        output_dir=tmp_path / "out",
    )
    assert results(tmp_path / "out")["eval_accuracy"] > 0.6
