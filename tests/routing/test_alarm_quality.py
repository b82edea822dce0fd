"""No alarm in a healthy training, and one in every training that collapses, within `STEPS` steps."""

import pytest

from alarm_runs import final_loads, train


KINDS = ("llama", "bert", "t5")
# (E, K, how often is logged)
SHAPES = ((4, 1, 1), (4, 2, 1), (4, 2, 10), (8, 2, 5), (8, 4, 20), (16, 2, 10), (16, 4, 50))
RUNS = [(kind, *shape, seed) for seed, (kind, shape) in enumerate((k, s) for s in SHAPES for k in KINDS)][:20]


def _marked(place: int) -> tuple:
    return () if place == 3 else (pytest.mark.conformance,)


@pytest.mark.slow
@pytest.mark.parametrize("run", [pytest.param(run, marks=_marked(i)) for i, run in enumerate(RUNS)])
def test_a_healthy_training_raises_no_alarm(run, tmp_path, warnings_of_ours):
    kind, experts, top_k, logging_steps, seed = run
    trainer = train(kind, experts, top_k, seed, tmp_path, logging_steps=logging_steps)
    for even, dominant in final_loads(trainer, seed):  # far from the monitor's limits, so that no rounding tips it
        assert even > 0.85
        assert dominant < 0.5
    assert [message for message in warnings_of_ours() if "num_experts_per_tok=1" not in message] == []  # of `upcycle`


@pytest.mark.parametrize("run", [pytest.param(run, marks=_marked(i)) for i, run in enumerate(RUNS)])
def test_a_training_that_collapses_raises_one(run, tmp_path, warnings_of_ours):
    kind, experts, top_k, logging_steps, seed = run
    # With one expert a token, a loss that rewards an uneven load may stop at two experts, which is no collapse.
    way = "rewarded" if seed % 2 == 0 and top_k > 1 else "from_start"
    trainer = train(kind, experts, top_k, 100 + seed, tmp_path, way, logging_steps=logging_steps)
    assert min(even for even, _ in final_loads(trainer, seed)) < 0.3
    layers = [message.split(" ")[0] for message in warnings_of_ours() if "the load collapses" in message]
    assert layers
    assert len(layers) == len(set(layers))  # once a layer
