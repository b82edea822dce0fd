"""benchmarks/quality.py runs every arm of every family, and resumes a comparison that was killed."""

import gzip
import importlib
import json
import random
import shutil
import tomllib
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parent.parent
TINY = {"length": 32, "batch_size": 4, "dense_tokens": 512, "sparse_tokens": 512, "dense_rate": 1e-3}
TINY |= {"rate_seed": 0, "machine_characters": 20_000}
TINY |= {"tuning_characters": 300, "test_characters": 300}
MODELS = {
    "decoder": {"hidden_size": 16, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2},
    "encoder": {"hidden_size": 16, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
    "encoder-decoder": {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8},
}
WORDS = {"colours": ["red", "green", "blue", "white", "black"], "numbers": ["one", "two", "three", "four", "five"]}


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("quality")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains and a few captions in three languages, of made-up words."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def sentence(words, length):
        return " ".join(f"{generator.choice(words)}{generator.randrange(50)}" for _ in range(length))

    for split, count in (("train", 40), ("valid", 4)):
        for domain, words in WORDS.items():
            rows = [{"text": sentence(words, 60), "domain": domain, "doc": f"{split}{n}"} for n in range(count)]
            write(folder / "domains" / split / f"{domain}.jsonl.gz", rows)
    for split, count in (("train", 60), ("validation", 4), ("test_2016_flickr", 4)):
        captions = [{code: sentence([code], 8) for code in ("en", "de", "fr")} for _ in range(count)]
        write(folder / "multi30k" / f"{split}.jsonl.gz", [{"translation": caption} for caption in captions])
    return folder


def configuration(quality, family):
    """The committed arms on a tiny model."""
    committed = tomllib.loads((REPOSITORY / "benchmarks" / "quality.toml").read_text())
    model = committed[family]["model"] | MODELS[family]
    return {name: committed[name] for name in ("arms", "ablations")} | {
        family: committed[family] | TINY | {"model": model}
    }


def make(quality, family, data, folder, rates=(1e-3,)):
    made = configuration(quality, family)
    made[family]["rates"] = list(rates)
    return quality.Comparison(family, made, data, folder / "cache", folder / "results")


def files(folder):
    """What the runs found, without what no two runs share."""
    return {
        path.name: {
            name: value
            for name, value in json.loads(path.read_text()).items()
            if name not in ("cpu_seconds", "peak_bytes")
        }
        for path in folder.rglob("*.json")
    }


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder-decoder"])
def test_every_arm_of_a_family(quality, data, tmp_path, family):
    comparison = make(quality, family, data, tmp_path)
    found = {}
    for arm in configuration(quality, family)["arms"]:
        found[arm] = comparison.run(arm, 0, comparison.rate(arm))

    dense = found["D"]
    assert len({json.dumps(result["dense_sha256"]) for result in found.values()}) == 1
    assert found["M1"]["start"] == pytest.approx(dense["start"], abs=1e-5)  # the same function
    assert found["M2"]["start"] == pytest.approx(dense["start"], abs=1e-5)
    assert found["G"]["start"] == pytest.approx(dense["start"], abs=1e-5)
    assert found["H"]["start"] == pytest.approx(dense["start"], abs=1e-5)
    assert found["AA"]["test_loss"] != dense["test_loss"]
    assert found["P"]["test_loss"] != found["M1"]["test_loss"]
    assert found["D+"]["tokens"] > dense["tokens"] == found["M1"]["tokens"]
    assert found["W"]["parameters_total"] > dense["parameters_total"]
    routers = comparison.arms["M1"]["upcycle"]["num_experts"] * 16 * 2
    assert found["M1"]["flops_per_token"] - dense["flops_per_token"] <= 2 * routers * 2
    assert all(result["document_losses"] for result in found.values())
    assert len(dense["document_losses"]) == len(comparison.text.test.documents)


@pytest.mark.slow
def test_every_ablation(quality, data, tmp_path):
    comparison = make(quality, "decoder", data, tmp_path)
    ablations = configuration(quality, "decoder")["ablations"]
    found = {arm: comparison.run(arm, 0, comparison.rate(arm)) for arm in ablations}
    assert found["M1-constant"]["rate"] == pytest.approx(0.1 * comparison.rate("M1"))
    assert len({result["test_loss"] for result in found.values()}) == len(ablations)
    for name in ("M1-fine", "M2-noise", "M2-top4"):
        assert found[name]["start"] == pytest.approx(comparison.run("D", 0, 1e-3)["start"], abs=1e-2)


def test_a_killed_comparison_resumes_and_repeats_nothing(quality, data, tmp_path, monkeypatch):
    def run_all(folder):
        comparison = make(quality, "decoder", data, folder, rates=(1e-3, 2e-3))
        for arm in ("D", "M1"):
            comparison.run(arm, 0, comparison.rate(arm))

    run_all(tmp_path / "whole")
    train, calls = quality.Comparison.train, []

    def killed(self, model, rows, rate, name, **options):
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(self, model, rows, rate, name, **options)

    monkeypatch.setattr(quality.Comparison, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "killed")
    run_all(tmp_path / "killed")
    assert calls.count("dense, seed 0") == 1
    assert len(calls) == 6  # the dense model, two rates for each arm, and once more what was killed
    assert files(tmp_path / "killed" / "results") == files(tmp_path / "whole" / "results")


def test_an_arm_whose_trained_model_is_gone_is_trained_again_before_its_result_goes(
    quality, data, tmp_path, monkeypatch
):
    comparison = make(quality, "decoder", data, tmp_path)
    comparison.run("M1", 0, 1e-3)
    shutil.rmtree(next(comparison.cache.glob("M1-*")))
    with monkeypatch.context() as patch:
        patch.setattr(quality.Comparison, "train", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            comparison.run("P", 0, 1e-3)
    assert comparison.path("M1", 0, 1e-3).is_file()
    assert comparison.run("P", 0, 1e-3)["test_loss"] != comparison.run("M1", 0, 1e-3)["test_loss"]


def test_results_of_other_settings_are_refused(quality, data, tmp_path):
    comparison = make(quality, "decoder", data, tmp_path)
    comparison.run("D", 0, 1e-3)
    comparison.settings["dense_rate"] = 5e-3
    with pytest.raises(ValueError, match="made with other settings"):
        comparison.run("D", 0, 1e-3)


def test_copies_of_held_out_text_are_not_trained_on(quality):
    text = importlib.import_module("quality_text")
    words = [f"word{number}" for number in range(60)]
    copied, other = " ".join(words), " ".join(reversed(words))
    train, (held_out,) = text.without_copies(
        {("a", "copy"): f"{copied} {copied}", ("a", "other"): other}, [{("b", "kept"): copied}]
    )
    assert list(train) == [("a", "other")]
    assert list(held_out) == [("b", "kept")]
