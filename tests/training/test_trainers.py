"""Trainers that compute a loss of their own, on mixtures: `python tests/outside_trainers.py` writes their table."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from sentence_transformers.sentence_transformer import losses

from outside_trainers import (
    ROWS,
    SIZES,
    TRAINERS,
    VARIANTS,
    Run,
    gradients_of_a_rank,
    outcome,
    sentences,
    stock_mixture,
)
from processes import in_processes


PAGE = Path(__file__).parents[2] / "docs" / "training.md"
CELLS = [(trainer, family, variant) for trainer, family in TRAINERS for variant in VARIANTS]


def documented() -> dict[tuple[str, str, str], str]:
    """The cells of the table."""
    text = PAGE.read_text(encoding="utf-8")
    head = re.search(rf"^\| trainer \| family \| {' [|] '.join(map(re.escape, VARIANTS))} \|$", text, re.MULTILINE)
    assert head is not None
    table = {}
    for line in text[head.end() :].split("\n\n")[0].splitlines()[2:]:
        trainer, family, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        table |= {(trainer, family, variant): cell for variant, cell in zip(VARIANTS, cells, strict=True)}
    return table


def test_the_table_names_what_is_run():
    assert documented() == dict.fromkeys(CELLS, "trains")


def marked(cell: tuple[str, str, str]):
    """`make conformance` takes every variant, the other targets every trainer once."""
    return cell if cell[2] == VARIANTS[0] else pytest.param(*cell, marks=pytest.mark.conformance)


@pytest.mark.parametrize(("trainer", "family", "variant"), [marked(cell) for cell in CELLS])
def test_the_balance_loss_reaches_the_routers(trainer, family, variant, tmp_path):
    assert outcome(trainer, family, variant, tmp_path) == "trains"


@pytest.mark.parametrize("trainer", ["`DPOTrainer`", "`KTOTrainer`"])
@pytest.mark.parametrize("kind", ["stock", "mixture"])
def test_a_reference_model_is_loaded_by_name_as_a_stock_model_s_is(kind, trainer, tmp_path):
    """One in memory has none, and TRL wants `ref_model=`; one from a folder needs nothing."""
    run = Run(tmp_path, 1.0, "from `upcycle`")
    model = run.model() if kind == "mixture" else hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, num_key_value_heads=2))
    run.reference = dict
    run.model = lambda: model
    with pytest.raises(OSError, match="Repo id"):
        TRAINERS[trainer, "decoder"](run)
    model.save_pretrained(tmp_path / "model")
    run.model = lambda: hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    reference = TRAINERS[trainer, "decoder"](run).ref_model
    assert type(reference) is type(model)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])


SPLIT = [("`SFTTrainer`", "decoder"), ("`DPOTrainer`", "decoder"), ("`MultipleNegativesRankingLoss`", "encoder")]


def relative(gradient, expected):
    return ((gradient - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", SPLIT, ids=lambda name: name[0].strip("`"))
def test_the_router_gradient_is_the_same_for_every_split(name, tmp_path):
    expected, *others = [
        Run(tmp_path, 1.0, accumulation=accumulation, identical=True).gradient(TRAINERS[name])
        for accumulation in (1, 2, 4, ROWS)
    ]
    assert max(relative(gradient, expected) for gradient in others) <= 1e-5


@pytest.mark.parametrize("size", [8, 3, 2])
@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "CachedGISTEmbedLoss"])
def test_a_loss_that_embeds_in_parts_has_the_gradient_of_one_that_does_not(name, size, tmp_path):
    """It embeds without gradients first, and again, part by part, within the backward pass (GradCache)."""

    def gradient(loss, coefficient=1.0, accumulation=1, **arguments):
        run = Run(tmp_path, coefficient, accumulation=accumulation, scope="sequence", identical=accumulation > 1)

        def make(encoder):
            guide = {"guide": copy.deepcopy(encoder).eval()} if "GIST" in loss else {}
            return getattr(losses, loss)(encoder, **guide, **arguments)

        return run.gradient(lambda run: sentences(run, make, "encoder"))

    whole = name.removeprefix("Cached")
    expected = gradient(whole)
    assert (expected - gradient(whole, 0.0)).norm() > 1e-3
    assert relative(gradient(name, mini_batch_size=size), expected) <= 1e-5
    expected = gradient(whole, accumulation=2)
    assert relative(gradient(name, accumulation=2, mini_batch_size=size), expected) <= 1e-5


@pytest.mark.conformance  # other losses from elsewhere: models/test_global_batch.py
def test_two_processes_have_the_router_gradient_of_one(tmp_path):
    assert in_processes(2, gradients_of_a_rank, tmp_path / "gradients.pt", SPLIT[:2]) == [0, 0]
    saved = torch.load(tmp_path / "gradients.pt")
    assert saved["world_size"] == 2
    for name in SPLIT[:2]:
        expected = Run(tmp_path / "one", 1.0, identical=True, scope="global_batch").gradient(TRAINERS[name])
        assert relative(saved["gradients"][name], expected) <= 1e-5


def test_under_sft_the_coefficient_of_fix_balance_counts(tmp_path):
    """The config's, which TRL reads for the loss that it reports, is another."""

    def gradient(coefficient):
        run = Run(tmp_path, coefficient)
        run.model = lambda: stock_mixture(coefficient)
        return run.gradient(TRAINERS["`SFTTrainer`", "decoder"])

    none, half, whole = (gradient(coefficient) for coefficient in (1e-9, 0.5, 1.0))
    assert (half - none).norm() > 1e-3
    assert relative(whole - none, 2 * (half - none)) <= 1e-4
