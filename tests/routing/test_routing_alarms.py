"""When alarms sound, what they name, and when they are quiet again."""

import logging

import pytest
import torch

from hf_sparse_moe.routing.routing_alarms import LayerHealth, RoutingAlarms
from hf_sparse_moe.routing.statistics import LayerRouting


@pytest.fixture
def check(caplog, monkeypatch):
    """`check(counts=..., z_loss=..., log=20)`: the warnings of one more log, after 20 steps of 10 times `counts`."""
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    caplog.set_level(logging.WARNING)
    alarms = RoutingAlarms(
        min_evenness=0.5,
        max_dominance=0.95,
        starvation=0.1,
        patience=40,
        max_z_loss=1000.0,
        balance_remedy="Do this.",
    )

    steps = {}

    def run(counts=(25.0, 25, 25, 25), z_loss=1.0, label="layer_3", top_k=1, log=20, **health):
        routing = LayerRouting("decoder", 0, ("all",), torch.tensor([counts], dtype=torch.float64) * 10)
        health = {"confidence": 0.5, "dropped": 0.0, "logit_size": torch.ones(len(counts)), **health}
        layer = LayerHealth(label, f"model.{label}.mlp", top_k, routing, z_loss=z_loss, **health)
        last = steps.get(label, 0)
        steps[label] = last + log
        alarms.check([layer], last + log, last)
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return run


def test_an_even_load_is_quiet(check):
    assert check() == []
    assert check(counts=(40.0, 25, 20, 15)) == []


def test_collapse_by_entropy_names_layer_expert_and_remedy_once_until_it_clears(check):
    collapsed = (2.0, 90, 4, 4)
    assert check(counts=collapsed) == []  # routers that were just made are uneven for a while
    (message,) = check(counts=collapsed)
    for part in ("layer_3", "model.layer_3.mlp", "collapses", "Expert 1", "90.0%", "40 steps", "Do this."):
        assert part in message
    assert check(counts=collapsed) == []
    assert check(counts=collapsed, label="layer_4") == []
    assert len(check(counts=collapsed, label="layer_4")) == 1  # another layer is another alarm
    assert check(counts=(5.0, 81, 7, 7)) == check(counts=collapsed) == []  # has not clearly cleared
    assert check() == []
    assert check(counts=collapsed) == []
    assert len(check(counts=collapsed)) == 1


def test_a_load_that_becomes_more_even_is_no_collapse(check):
    for counts in ((97.0, 1, 1, 1), (91.0, 3, 3, 3), (85.0, 5, 5, 5), (79.0, 7, 7, 7), (64.0, 12, 12, 12)):
        assert check(counts=counts, label="layer_5") == []


def test_collapse_by_one_expert_that_serves_all(check):
    # 2 of 8 experts a token: expert 0 serves all of them, the others share the second place evenly.
    counts = (70.0, 10, 10, 10, 10, 10, 10, 10)
    check(counts=counts, top_k=2)
    (message,) = check(counts=counts, top_k=2)
    assert "Expert 0" in message


def test_what_counts_as_collapse_follows_top_k(check):
    """Half of the experts for every token: all there is to collapse to at K = 2, and harmless at K = 1."""
    counts = (49.0, 49, 1, 1)
    assert sum(len(check(counts=counts, top_k=2)) for _ in range(2)) == 1
    for _ in range(4):
        assert check(counts=(45.0, 45, 5, 5), label="layer_4") == []
        assert check(top_k=4, label="layer_5") == []


def test_collapse_is_told_after_as_many_steps_however_often_is_logged(check):
    collapsed = (97.0, 1, 1, 1)
    for label, log in (("layer_0", 1), ("layer_1", 5), ("layer_2", 40), ("layer_3", 500)):
        steps = next(log * (i + 1) for i in range(200) if check(counts=collapsed, label=label, log=log))
        assert steps == max(40, log)


def test_few_tokens_are_no_ground_for_an_alarm(check):
    for _ in range(9):
        assert check(counts=(0.97, 0.01, 0.01, 0.01), label="layer_6") == []  # 10 assignments a log, of 400 needed


def test_starvation_must_last(check):
    starved = (33.0, 33, 33, 1)
    assert check(counts=starved) == check(counts=starved) == []
    assert check() == []  # begins anew
    assert check(counts=starved) == check(counts=starved) == []
    (message,) = check(counts=starved)
    for part in ("layer_3", "expert 3", "10% of an even load", "60 steps", "Do this."):
        assert part in message
    assert check(counts=starved) == []


@pytest.mark.parametrize("z_loss", [1001.0, float("nan"), float("inf")])
def test_exploding_logits_name_the_expert(check, z_loss):
    assert check(z_loss=999.0) == []
    (message,) = check(z_loss=z_loss, logit_size=torch.tensor([1.0, 2.0, 40.0, 3.0]))
    for part in ("layer_3", "explode", "expert 2", "router_z_loss_coef"):
        assert part in message
    assert check(z_loss=z_loss) == []


def test_logits_that_are_not_finite_name_their_experts(check):
    (message,) = check(z_loss=float("nan"), logit_size=torch.tensor([1.0, float("nan"), 1.0, float("inf")]))
    assert "experts 1, 3 are not finite" in message
