"""docs/results.md says what the result files say, and its intervals find an effect that is there, and no other."""

import importlib
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest


REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [("law" if number < 30 else "verse", str(number)) for number in range(36)]
ROW = {"task": "sentiment", "command": "python benchmarks/tasks.py --row sentiment --seeds 0 1", "metric": "accuracy"}
ROW |= {"arms": {"dense": [0.7, 0.8], "mixture": [0.75, 0.85]}, "difference": 0.05, "interval": [0.01, 0.09]}
ROW |= {"minutes": {"dense": 2.0, "mixture": 3.0}, "parameters_total": {"dense": 1_500_000, "mixture": 4_000_000}}
ROW |= {"parameters_active": {"dense": 1_500_000, "mixture": 2_000_000}}
ROW |= {"higher_is_better": True, "seeds": [0, 1], "machine": "some CPU"}
ROW |= {"further": {"f1": {"dense": [0.6, 0.7], "mixture": [0.61, 0.71]}}}


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("write_results")


@pytest.fixture
def reader(writer):
    return importlib.import_module("quality_results")


@pytest.fixture
def configuration(writer):
    return tomllib.loads((writer.HERE / "quality.toml").read_text())


@pytest.mark.slow
def test_page_is_that_of_the_result_files(writer, reader, configuration):
    page = writer.PAGE.read_text(encoding="utf-8")
    assert page == writer.render(configuration), "Run `python benchmarks/write_results.py`."
    families = writer.load_families(configuration)
    assert "decoder" in [folder.name for folder, *_ in families]
    for folder, _, _, arms, documents in families:
        assert (folder / "domains.csv").read_text() == reader.domain_table(arms, documents)
    tasks = writer.RESULTS / "tasks"
    assert (tasks / writer.FURTHER).read_text() == writer.further_metrics(tasks)


def test_readme_says_what_the_comparison_found(writer, reader, configuration):
    folder = writer.RESULTS / "quality" / "decoder"
    arms = reader.load_arms(folder, configuration["decoder"], configuration)
    documents = reader.load_documents(folder)
    seeds, differences = arms["M1"].differences(arms["D"])
    assert len(seeds) == 5
    mean, most, least = [f"{-value:.3f}" for value in reader.interval(differences, documents)]
    two_experts = -reader.interval(arms["M2"].differences(arms["D"])[1], documents)[0]
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert reader.outside(differences, documents) == "5, 0 of 5"
    assert f"in 5 of 5 seeds**: {mean} nats a token less on held-out text (95 % interval {least} to {most})" in readme
    assert f"and {two_experts:.2f} less with two whole experts a token" in readme


def draws(effect, seed):
    """Differences of 5 seeds: documents differ, seeds differ, and `effect` is what all have in common."""
    generator = np.random.default_rng(seed)
    of_seeds, of_documents = generator.normal(0, 0.01, (5, 1)), generator.normal(0, 0.02, (1, len(DOCUMENTS)))
    return effect + of_seeds + of_documents + generator.normal(0, 0.02, (5, len(DOCUMENTS)))


def test_interval_finds_a_known_effect_and_a_known_null(reader):
    holds, found = 0, 0
    for seed in range(40):
        mean, low, high = reader.interval(draws(0.0, seed), DOCUMENTS, draws=1000)
        assert low <= mean <= high
        holds += low <= 0 <= high
        found += reader.interval(draws(-0.05, seed), DOCUMENTS, draws=1000)[2] < 0
    assert holds >= 32  # 38 where there are many seeds; the bootstrap of five is a little narrow
    assert found == 40


def test_a_domain_weighs_as_much_as_another(reader):
    differences = np.array([[1.0] * 30 + [0.0] * 6])
    assert reader.interval(differences, DOCUMENTS) == pytest.approx((0.5, 0.5, 0.5))


def test_interval_is_wider_where_seeds_disagree(reader):
    documents = draws(0.0, 0)[:1]
    alike = np.repeat(documents, 5, axis=0)
    apart = alike + np.array([[-0.1], [-0.05], [0.0], [0.05], [0.1]])
    width = [high - low for _, low, high in (reader.interval(each, DOCUMENTS) for each in (alike, apart))]
    assert width[1] > 2 * width[0]


def test_directions_of_one_caption_are_drawn_together(reader):
    captions = np.random.default_rng(0).normal(0, 1, (1, 50))
    alike = np.concatenate([captions, captions], axis=1)

    def width(names):
        documents = [(domain, name) for domain, part in zip(("en-de", "de-en"), names, strict=True) for name in part]
        _, low, high = reader.interval(alike, documents)
        return high - low

    same, other = [str(number) for number in range(50)], [str(number) for number in range(50, 100)]
    assert width([same, same]) > 1.2 * width([same, other])


def run(arm, seed, rate, losses, last):
    return {
        "arm": arm, "seed": seed, "rate": rate, "document_losses": losses, "tuning_loss": last,
        "test_loss": sum(losses) / len(losses), "curve": [[0, 5.0], [500, 4.5], [1000, last]], "tokens": 1000,
        "cpu_seconds": 10.0, "peak_bytes": 2**20, "parameters_total": 10**6, "parameters_active": 10**6,
        "flops_per_token": 10**6, "device": "some CPU", "versions": {"torch": "2"}, "dense_sha256": f"{seed}",
    }  # fmt: skip


@pytest.fixture
def results(tmp_path, configuration):
    """Two seeds of D and of an M1 that is better by 0.1 where the rate is its second one."""
    folder, rates = tmp_path / "quality" / "decoder", configuration["decoder"]["rates"]
    folder.mkdir(parents=True)
    (folder / "documents.json").write_text(json.dumps({"test": [["law", "1"], ["law", "2"], ["verse", "3"]]}))
    for seed in (0, 1):
        for place, rate in enumerate(rates):
            better = 0.1 if place == 1 else 0.0
            for arm, gain in (("D", 0.0), ("M1", better)):
                losses = [4.0 - gain + seed, 4.2 - gain, 4.4 - gain]
                content = run(arm, seed, rate, losses, 4.1 - gain + 0.01 * (place != 1))
                (folder / f"{arm}-seed{seed}-rate{rate:g}.json").write_text(json.dumps(content))
    return tmp_path


def test_page_prints_every_arm_with_its_chosen_rate(writer, configuration, results):
    page = writer.render(configuration, results)
    rate = configuration["decoder"]["rates"][1]
    (line,) = [line for line in page.splitlines() if line.startswith("| **M1**")]
    assert f"| 2 | {rate:g} |" in line
    assert "-0.1000 [-0.1000, -0.1000] | 2, 0 of 2 |" in line
    assert "in 2 of 2 seeds (goal: 4 of 5) and 2 of 2 domains" in page
    assert "| M1 | 1.00 | 1.00 | 1.00 | 10 | 1 | more than 1,000 |" in page


def test_arms_of_different_dense_checkpoints_are_not_compared(writer, configuration, results):
    for path in (results / "quality" / "decoder").glob("M1-seed1-*"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dense_sha256": "another"}))
    with pytest.raises(ValueError, match="`M1` and `D` started from different dense checkpoints with seed 1"):
        writer.render(configuration, results)


def test_tokens_that_the_dense_model_needs(reader):
    def arm(name, *losses, tokens=100_000):
        curve = [[tokens // 2 * place, loss] for place, loss in enumerate(losses)]
        return reader.Arm(name, {}, 1e-3, {0: {"curve": curve, "tokens": tokens}})

    arms = {"D": arm("D", 5.0, 4.5, 4.0)}
    longer = arms | {"D+": arm("D+", 5.0, 3.95, 3.8, tokens=200_000)}
    for last, alone, beside in (
        (4.25, "75,000", "75,000"),
        (3.9, "more than 100,000", "100,000 to 200,000"),
        (3.7, "more than 100,000", "more than 200,000"),
    ):
        found = [reader.tokens_needed(arm("M1", 5.0, 4.4, last), each) for each in (arms, longer)]
        assert found == [alone, beside]


def test_runs_on_a_device_have_a_section_of_their_own(writer, configuration, results):
    folder = results / "quality"
    shutil.copytree(folder / "decoder", folder / "decoder--gpu--some-gpu")
    for path in (folder / "decoder--gpu--some-gpu").glob("*-rate*.json"):
        content = json.loads(path.read_text())
        content["seconds"] = content.pop("cpu_seconds")
        rate = dict(zip(configuration["decoder"]["rates"], configuration["gpu"]["decoder"]["rates"], strict=False))
        if content["rate"] in rate:
            content["rate"] = rate[content["rate"]]
            path.write_text(json.dumps(content))
        else:
            path.unlink()
    page = writer.render(configuration, results)
    assert page.index("## Decoder\n") < page.index("## Decoder, on some-gpu\n")
    assert page.count("(goal: 4 of 5)") == 1


def test_an_arm_is_left_out_until_all_its_rates_are_tried(writer, configuration, results):
    rate = configuration["decoder"]["rates"][2]
    (results / "quality" / "decoder" / f"M1-seed0-rate{rate:g}.json").unlink()
    assert "**M1**" not in writer.render(configuration, results)


def test_page_without_results_and_with_a_task(writer, configuration, tmp_path):
    assert writer.render(configuration, tmp_path) == writer.INTRODUCTION
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sentiment.json").write_text(json.dumps(ROW))
    page = writer.render(configuration, tmp_path)
    scores = "| 0.750 (0.700 to 0.800) | 0.800 (0.750 to 0.850) | +0.050 [+0.010, +0.090] | 2 |"
    assert f"| sentiment | accuracy {scores} 2.0, 3.0 | 1.5, 4.0 | 1.5, 2.0 | `--row sentiment` |" in page
    further = writer.further_metrics(tmp_path / "tasks").splitlines()
    assert further[1:] == ["sentiment,f1,dense,0.6500", "sentiment,f1,mixture,0.6600"]


def test_specialists_are_compared_with_the_dense_model_of_as_much_training(writer):
    def run(shift):
        losses = {"D, 5 steps more": 2.0, "mixture, 5 steps more": 1.9 + shift}
        return {
            name: {"loss": {"law": loss, "verse": loss}, "mutual_information": None if name[0] == "D" else 0.5}
            for name, loss in losses.items()
        }

    found = {"setting": {"domains": ["law", "verse"], "mixture_steps": 5}, "machine": "some CPU"}
    section = "".join(writer.branches_section(found | {"seeds": {"0": run(0.0), "1": run(0.0), "2": run(0.0)}}))
    assert "| D, 5 steps more | 2.000 | 2.000 | 2.000 |  |  |" in section
    assert "| mixture, 5 steps more | 1.900 | 1.900 | 1.900 | 0.50 | -0.100 [-0.100, -0.100] |" in section
