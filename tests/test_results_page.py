"""docs/results.md says what the result files say, and its intervals find an effect that is there, and no other."""

import importlib
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest


REPOSITORY = Path(__file__).parent.parent
DOMAINS = ["law"] * 30 + ["verse"] * 6
ROW = {"task": "sentiment", "command": "python benchmarks/tasks.py sentiment", "metric": "accuracy"}
ROW |= {"arms": {"dense": [0.7, 0.8], "mixture": [0.75, 0.85]}, "difference": 0.05, "interval": [0.01, 0.09]}
ROW |= {"minutes": {"dense": 2.0, "mixture": 3.0}, "parameters_total": {"dense": 1_500_000, "mixture": 4_000_000}}
ROW |= {"parameters_active": {"dense": 1_500_000, "mixture": 2_000_000}}


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("write_results")


@pytest.fixture
def configuration(writer):
    return tomllib.loads((writer.HERE / "quality.toml").read_text())


def test_page_is_that_of_the_result_files(writer, configuration):
    page = writer.PAGE.read_text(encoding="utf-8")
    assert page == writer.render(configuration), "Run `python benchmarks/write_results.py`."
    folder = writer.RESULTS / "quality" / "decoder"
    arms = writer.load_arms(folder, "decoder", configuration)
    documents = json.loads((folder / "documents.json").read_text())
    assert writer.domain_file("decoder").read_text() == writer.domain_table(arms, documents)


def test_readme_says_what_the_comparison_found(writer, configuration):
    folder = writer.RESULTS / "quality" / "decoder"
    arms = writer.load_arms(folder, "decoder", configuration)
    domains = [domain for domain, _ in json.loads((folder / "documents.json").read_text())["test"]]
    seeds, differences = arms["M1"].differences(arms["D"])
    assert len(seeds) == 5
    equal_flops = [f"{-value:.3f}" for value in writer.interval(differences, domains)]
    two_experts = -writer.interval(arms["M2"].differences(arms["D"])[1], domains)[0]
    readme = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    mean, most, least = equal_flops
    assert writer.outside(differences, domains) == "5, 0 of 5"
    assert f"in 5 of 5 seeds**: {mean} nats a token less on held-out text (95 % interval {least} to {most})" in readme
    assert f"and {two_experts:.2f} less with two whole experts a token" in readme


def draws(effect, seed):
    """Differences of 5 seeds: documents differ, seeds differ, and `effect` is what all have in common."""
    generator = np.random.default_rng(seed)
    of_seeds, of_documents = generator.normal(0, 0.01, (5, 1)), generator.normal(0, 0.02, (1, len(DOMAINS)))
    return effect + of_seeds + of_documents + generator.normal(0, 0.02, (5, len(DOMAINS)))


def test_interval_finds_a_known_effect_and_a_known_null(writer):
    holds, found = 0, 0
    for seed in range(40):
        mean, low, high = writer.interval(draws(0.0, seed), DOMAINS, draws=1000)
        assert low <= mean <= high
        holds += low <= 0 <= high
        found += writer.interval(draws(-0.05, seed), DOMAINS, draws=1000)[2] < 0
    assert holds >= 32  # 38 where there are many seeds; the bootstrap of five is a little narrow
    assert found == 40


def test_a_domain_weighs_as_much_as_another(writer):
    differences = np.array([[1.0] * 30 + [0.0] * 6])
    assert writer.interval(differences, DOMAINS) == pytest.approx((0.5, 0.5, 0.5))


def test_interval_is_wider_where_seeds_disagree(writer):
    documents = draws(0.0, 0)[:1]
    alike = np.repeat(documents, 5, axis=0)
    apart = alike + np.array([[-0.1], [-0.05], [0.0], [0.05], [0.1]])
    width = [high - low for _, low, high in (writer.interval(each, DOMAINS) for each in (alike, apart))]
    assert width[1] > 2 * width[0]


def run(arm, seed, rate, losses, last):
    return {
        "arm": arm, "seed": seed, "rate": rate, "document_losses": losses, "tuning_loss": last,
        "test_loss": sum(losses) / len(losses), "curve": [[0, 5.0], [500, 4.5], [1000, last]], "tokens": 1000,
        "cpu_seconds": 10.0, "peak_bytes": 2**20, "parameters_total": 10**6, "parameters_active": 10**6,
        "flops_per_token": 10**6, "device": "some CPU", "versions": {"torch": "2"},
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


def test_an_arm_is_left_out_until_all_its_rates_are_tried(writer, configuration, results):
    rate = configuration["decoder"]["rates"][2]
    (results / "quality" / "decoder" / f"M1-seed0-rate{rate:g}.json").unlink()
    assert "**M1**" not in writer.render(configuration, results)


def test_page_without_results_and_with_a_task(writer, configuration, tmp_path):
    assert writer.render(configuration, tmp_path) == writer.INTRODUCTION
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sentiment.json").write_text(json.dumps(ROW))
    page = writer.render(configuration, tmp_path)
    assert (
        "| sentiment | accuracy | 0.750 (0.700 to 0.800) | 0.800 (0.750 to 0.850) | +0.050 [+0.010, +0.090] |" in page
    )
    assert f"| 2.0, 3.0 | 1.5, 4.0 | 1.5, 2.0 | `{ROW['command']}` |" in page
