"""When alarms sound, what they name, and when they are quiet again."""

import logging

import pytest
import torch

from hf_sparse_moe.routing.routing_alarms import LayerHealth, RoutingAlarms
from hf_sparse_moe.routing.statistics import LayerRouting


@pytest.fixture
def check(caplog, monkeypatch):
    """`check(counts=..., z_loss=..., logit_size=...)`: the warnings of one more log."""
    monkeypatch.setattr(logging.getLogger("hf_sparse_moe"), "propagate", True)
    caplog.set_level(logging.WARNING)
    alarms = RoutingAlarms(
        min_evenness=0.5,
        max_dominance=0.8,
        starvation=0.1,
        starvation_logs=3,
        max_z_loss=1000.0,
        balance_remedy="Do this.",
    )

    def run(counts=(25.0, 25, 25, 25), z_loss=1.0, logit_size=(1.0, 1.0, 1.0, 1.0), top_k=1, label="layer_3"):
        routing = LayerRouting("decoder", 0, ("all",), torch.tensor([counts], dtype=torch.float64))
        size = torch.tensor(logit_size)
        alarms.check([LayerHealth(label, f"model.{label}.mlp", top_k, routing, 0.5, 0.0, z_loss, size)])
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return run


def test_an_even_load_is_quiet(check):
    assert check() == []
    assert check(counts=(40.0, 25, 20, 15)) == []


def test_collapse_by_entropy_names_layer_expert_and_remedy_once_until_it_clears(check):
    collapsed = (2.0, 90, 4, 4)
    (message,) = check(counts=collapsed)
    for part in ("layer_3", "model.layer_3.mlp", "collapses", "Expert 1", "90.0%", "Do this."):
        assert part in message
    assert check(counts=collapsed) == []
    assert len(check(counts=collapsed, label="layer_4")) == 1  # another layer is another alarm
    assert check() == []
    assert len(check(counts=collapsed)) == 1


def test_collapse_by_one_expert_that_serves_all(check):
    # 2 of 8 experts a token: expert 0 serves all of them, the others share the second place evenly.
    counts = (70.0, 10, 10, 10, 10, 10, 10, 10)
    (message,) = check(counts=counts, top_k=2, logit_size=(1.0,) * 8)
    assert "Expert 0" in message


def test_what_counts_as_collapse_follows_top_k(check):
    """Half of the experts for every token: all there is to collapse to at K = 2, and harmless at K = 1."""
    counts = (48.0, 48, 2, 2)
    assert len(check(counts=counts, top_k=2)) == 1
    assert check(counts=counts, top_k=1, label="layer_4") == []
    assert check(counts=(25.0, 25, 25, 25), top_k=4, label="layer_5") == []


def test_starvation_needs_several_logs_in_a_row(check):
    starved = (33.0, 33, 33, 1)
    assert check(counts=starved) == []
    assert check(counts=starved) == []
    assert check() == []  # begins anew
    assert check(counts=starved) == []
    assert check(counts=starved) == []
    (message,) = check(counts=starved)
    for part in ("layer_3", "expert 3", "10% of an even load", "3 logs", "Do this."):
        assert part in message
    assert check(counts=starved) == []


@pytest.mark.parametrize("z_loss", [1001.0, float("nan"), float("inf")])
def test_exploding_logits_name_the_expert(check, z_loss):
    assert check(z_loss=999.0) == []
    (message,) = check(z_loss=z_loss, logit_size=(1.0, 2.0, 40.0, 3.0))
    for part in ("layer_3", "explode", "expert 2", "router_z_loss_coef"):
        assert part in message
    assert check(z_loss=z_loss) == []


def test_logits_that_are_not_finite_name_their_experts(check):
    (message,) = check(z_loss=float("nan"), logit_size=(1.0, float("nan"), 1.0, float("inf")))
    assert "experts 1, 3 are not finite" in message
