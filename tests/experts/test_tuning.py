"""The fastest way to compute the experts is measured in the first calls, remembered, and never changes a result."""

import json
import multiprocessing

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hf_sparse_moe.experts.function as function_module
from experts.experts_modules import inputs, make
from experts.experts_oracle import experts_oracle
from experts.test_function import assert_equals_oracle
from hf_sparse_moe.experts import tuning
from hf_sparse_moe.experts.choice import FEW, GROUPED, LOOP, STOCK
from hf_sparse_moe.experts.projection import Projection
from hf_sparse_moe.hub.fingerprint import probe_output
from hf_sparse_moe.upcycling.receipt import output_difference
from tiny_models import tiny_inputs, tiny_sparse


CALLS = 3 * (tuning.TIMED + 1)  # after which three ways are decided


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """The folder of the file; tests run with measuring off otherwise, and in deterministic mode."""
    monkeypatch.setenv("HF_SPARSE_MOE_MEASURE", "1")
    monkeypatch.setenv("HF_SPARSE_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_contests", {})
    torch.use_deterministic_algorithms(False)
    yield tmp_path / "cache"
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def lines(caplog):
    """What was logged as a warning."""
    caplog.set_level("WARNING")
    tuning.logger.parent.propagate = True
    tuning.logger.warning_once.cache_clear()
    return lambda: [record.message for record in caplog.records]


def learn(experts, tensors) -> None:
    assert_equals_oracle(experts, tensors, 1e-5)


def infer(experts, tensors) -> None:
    with torch.no_grad():
        torch.testing.assert_close(experts(*tensors), experts_oracle(experts, *tensors).float(), rtol=1e-5, atol=1e-5)


def race(speeds: dict[str, float], calls: int, monkeypatch) -> tuple[str, list[str]]:
    """The winner of ways that take so many seconds, by a clock of the test's own, and who had a turn."""
    now, turns = [0.0], []
    monkeypatch.setattr(tuning.time, "thread_time", lambda: now[0])
    for _ in range(calls):
        turn = tuning.choose(("a kind",), tuple(speeds), 8)
        turns.append(turn.way)
        with turn.timed(last=False):
            now[0] += speeds[turn.way] / 2
        with turn.timed(last=True):
            now[0] += speeds[turn.way] / 2
    return turns[-1], turns


@pytest.mark.parametrize(
    ("speeds", "winner"),
    [({"a": 1.0, "b": 0.9, "c": 1.1}, "b"), ({"a": 1.0, "b": 0.98}, "a"), ({"a": 5.0, "b": 4.0, "c": 1.0}, "c")],
)
def test_the_fastest_wins_and_the_first_if_it_is_as_good(measuring, monkeypatch, speeds, winner):
    assert race(speeds, CALLS + 1, monkeypatch)[0] == winner
    assert list(json.loads(tuning.cache_file().read_text())["winners"].values()) == [winner]


@pytest.mark.parametrize("slower", [1.1, 1.4, 2.0, 2.8])
def test_measuring_costs_little(measuring, monkeypatch, slower):
    """Of the first hundred steps of a model with four such layers."""
    speeds = {"a": 1.0, "b": slower, "c": slower}
    _, turns = race(speeds, 400, monkeypatch)
    assert sum(speeds[way] for way in turns) <= 1.03 * 400


@pytest.mark.parametrize("kind", ["mixtral", "ours, gated, biased", "aria, transposed"])
def test_results_stay_right_while_it_measures(measuring, kind):
    for call, tokens in ((learn, 9), (infer, 9), (infer, 40)):
        experts = make(kind, "sparse_moe")
        for seed in range(CALLS + 2):
            call(experts, inputs(tokens, 2, seed=seed))
    raced = {tuple(contest.ways): contest for contest in tuning._contests.values()}
    assert raced.keys() == {(LOOP, GROUPED), (FEW, GROUPED, STOCK), (GROUPED, LOOP, STOCK)}
    assert all(contest.winner and all(contest.seconds.values()) for contest in raced.values())


def test_the_next_process_measures_nothing(measuring, monkeypatch):
    experts = make("mixtral", "sparse_moe")
    for _ in range(CALLS):
        infer(experts, inputs(9, 2))
    (contest,) = tuning._contests.values()
    monkeypatch.setattr(tuning, "_contests", {})
    infer(experts, inputs(9, 2))
    (again,) = tuning._contests.values()
    assert again.winner == contest.winner is not None
    assert not any(again.seconds.values())


@pytest.mark.parametrize("off", ["setting", "deterministic", "compiled", "autocast casts"])
def test_nothing_is_measured(measuring, monkeypatch, off):
    experts = make("mixtral", "sparse_moe")
    if off == "setting":
        monkeypatch.setenv("HF_SPARSE_MOE_MEASURE", "0")
    elif off == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
    elif off == "compiled":
        torch.compiler.reset()
        experts.compile(backend="eager", fullgraph=True)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=off == "autocast casts"):
            experts(*inputs(9, 2)).sum().backward()
    assert not tuning._contests
    assert not measuring.exists()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_that_computes_again_is_not_timed(measuring, use_reentrant):
    experts, tensors = make("gated dropout", "sparse_moe").train(), inputs(20, 2)
    found = []
    for call in (experts, lambda *args: checkpoint(experts, *args, use_reentrant=use_reentrant)):
        tuning._contests.clear()
        tuning.cache_file().unlink(missing_ok=True)
        for seed in range(2 * (tuning.TIMED + 1) + 1):
            torch.manual_seed(seed)
            experts.zero_grad()
            output = call(*tensors)
            output.sum().backward()
            found.append((output, experts.down_proj.grad))
    for expected, computed in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        torch.testing.assert_close(computed, expected)
    learning = [contest for kind, contest in tuning._contests.items() if kind[10]]
    assert [any(contest.seconds.values()) for contest in learning] == [not use_reentrant]


BROKEN = {
    "no JSON": "{",
    "a list": "[]",
    "no winners": json.dumps({"version": tuning.VERSION}),
    "winners of another kind": json.dumps({"version": tuning.VERSION, "winners": 3}),
    "other version": json.dumps({"version": "0", "winners": {"a kind": "b"}}),
    "an unknown way": json.dumps({"version": tuning.VERSION, "winners": {"a kind": "z"}}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_says_nothing_is_measured_anew(measuring, monkeypatch, lines, content):
    measuring.mkdir()
    tuning.cache_file().write_text(content)
    winner, turns = race({"a": 1.0, "b": 0.5}, CALLS, monkeypatch)
    assert (winner, set(turns)) == ("b", {"a", "b"})
    assert json.loads(tuning.cache_file().read_text()) == {"version": tuning.VERSION, "winners": {"a kind": "b"}}
    assert len(lines()) == (content not in list(BROKEN.values())[4:])


def test_a_folder_that_cannot_be_written(measuring, lines):
    measuring.write_text("a file")
    experts = make("mixtral", "sparse_moe")
    for call in [infer] * CALLS + [learn] * CALLS:
        call(experts, inputs(9, 2))
    assert all(contest.winner for contest in tuning._contests.values())
    assert ["cannot be kept" in line for line in lines()].count(True) == 1
    assert len(lines()) <= 2  # the file cannot be read either


def _write_and_infer(number: int) -> None:
    for count in range(30):
        tuning._write(f"kind {number} {count}", "a")
    infer(make("mixtral", "sparse_moe"), inputs(9, 2))


def test_processes_forked_after_measuring_write_at_once(measuring):
    infer(make("mixtral", "sparse_moe"), inputs(9, 2))
    processes = [
        multiprocessing.get_context("fork").Process(target=_write_and_infer, args=(number,)) for number in (1, 2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    winners = json.loads(tuning.cache_file().read_text())["winners"]
    assert len(winners) >= 30
    assert [path.name for path in measuring.iterdir()] == [tuning.cache_file().name]


def test_a_way_that_raises_in_forward_is_dropped(measuring, monkeypatch, lines):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(function_module, "grouped_mm_experts_forward", broken)
    for _ in range(CALLS):
        infer(make("mixtral", "sparse_moe"), inputs(9, 2))
    (contest,) = tuning._contests.values()
    assert contest.winner in (FEW, GROUPED)
    assert [line for line in lines() if "no such kernel" in line] == lines()
    assert len(lines()) == 1


def test_a_way_that_raises_in_backward_is_dropped(measuring, monkeypatch, lines):
    transposed_product = Projection.transposed_product

    def broken(self, gradient, batch, out=None):
        if batch.grouped:
            raise RuntimeError("no such kernel")
        return transposed_product(self, gradient, batch, out)

    monkeypatch.setattr(Projection, "transposed_product", broken)
    for _ in range(CALLS):
        learn(make("mixtral", "sparse_moe"), inputs(9, 2))
    (contest,) = tuning._contests.values()
    assert contest.winner == LOOP
    assert len(lines()) == 1


def test_an_expert_that_does_not_exist_is_refused_by_each_way(measuring):
    hidden, index, weights = inputs(4, 2)
    index[2, 1] = 5
    for way in (FEW, GROUPED, LOOP, STOCK):
        tuning._contests.clear()
        infer(make("mixtral", "sparse_moe"), inputs(4, 2))
        (contest,) = tuning._contests.values()
        contest.winner = way
        with torch.no_grad(), pytest.raises(ValueError, match="names expert 5"):
            make("mixtral", "sparse_moe")(hidden, index, weights)


def test_nan_and_no_rows(measuring):
    experts = make("mixtral", "sparse_moe")
    for tokens in [0, 9] * CALLS:
        hidden, index, weights = inputs(tokens, 2)
        with torch.no_grad():
            hidden[:1] = torch.nan
            output = experts(hidden, index, weights)
        assert output.shape == hidden.shape
        assert output[1:].isfinite().all()
        assert output[:1].isnan().all()
    assert len(tuning._contests) == 1


def test_shapes_that_change_with_every_call(measuring, monkeypatch, lines):
    experts = make("mixtral", "sparse_moe")
    for tokens in range(1, 130):
        infer(experts, inputs(tokens, 2))
    assert len(tuning._contests) <= 9
    monkeypatch.setattr(tuning, "MOST_KINDS", len(tuning._contests))
    for tokens in (200, 300, 600):
        infer(experts, inputs(tokens, 2))
    assert len(tuning._contests) == tuning.MOST_KINDS
    assert len(lines()) == 1


def test_what_is_kept_or_compared_is_not_measured(measuring):
    """The fingerprint of a second push is that of the first."""
    model = tiny_sparse("llama").eval()
    outputs = [probe_output(model) for _ in range(CALLS)]
    assert all(torch.equal(outputs[0], one) for one in outputs)
    assert output_difference(model, model)["max_abs_difference"] == 0
    assert not tuning._contests
    with torch.no_grad():
        model(**tiny_inputs(model))
    assert tuning._contests
