"""The record of a forward pass: one event a layer, a record a call, and nothing of a call on a module."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_sparse_moe.models.routing import RoutingEvent, RoutingRecord, active_record
from models.router_kinds import ROUTERS, routed_model, routers_of
from tiny_models import tiny_inputs, tiny_sparse, without_dropout


def record_of(monkeypatch, run) -> list[RoutingRecord]:
    """The records that models open while `run()` runs."""
    opened = []
    original = RoutingRecord.open
    monkeypatch.setattr(RoutingRecord, "open", lambda self: opened.append(self) or original(self))
    run()
    return opened


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_layer_records_one_event_with_the_mask_of_its_side(name, monkeypatch):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, pads=2)
    (record,) = record_of(monkeypatch, lambda: model(**inputs, output_router_logits=True))
    assert [event.layer for event in record.events] == list(model.sparse_blocks)
    for event in record.events:
        source = event.layer.side == "encoder" or not model.config.is_encoder_decoder
        expected = inputs["attention_mask"] == 1 if source else inputs["labels"] != -100
        assert torch.equal(event.token_mask, expected.flatten())
        assert event.num_sequences == 2
        assert event.expert_counts(4).sum() == expected.sum() * 2
    assert active_record() is None


def test_where_nobody_asks_nothing_is_kept(monkeypatch):
    model = tiny_sparse("llama")
    (record,) = record_of(monkeypatch, lambda: model(**tiny_inputs(model)))
    assert record.events == []


@pytest.mark.parametrize("kind", ["softmax", "hash", "expert choice"])
@pytest.mark.parametrize("name", ["t5", "bert", "llama"])
def test_eight_threads_share_one_model(name, kind):
    if kind not in routers_of(name):
        pytest.skip("refused by the config")
    model = routed_model(name, kind)
    requests = [torch.randint(5, 60, (2, length)) for length in (4, 7, 9, 12, 15, 17, 20, 23)]

    def answer(input_ids):
        with torch.no_grad():
            if name == "bert":
                found = model(input_ids=input_ids).logits
            else:
                found = model.generate(
                    input_ids=input_ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
                )
        assert active_record() is None  # of this thread
        return found

    expected = [answer(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(answer, requests * 4)):
            torch.testing.assert_close(found, expected[number % 8], rtol=1e-4, atol=1e-4)
    assert not [key for module in model.modules() for key in vars(module) if "token" in key and "record" in key]


@pytest.mark.parametrize("router_type", ["hash", "top_k"])
@pytest.mark.parametrize("inner", ["llama", "t5", "the encoder of t5"])
def test_a_forward_pass_within_a_forward_pass_has_a_record_of_its_own(inner, router_type):
    """As of a model that reads the hidden states of another one."""
    outer = without_dropout(tiny_sparse("t5", router_type=router_type)).train()
    other = tiny_sparse(inner.split()[-1])
    inputs, others = tiny_inputs(outer, pads=2), tiny_inputs(other, batch=3, length=5)
    expected = outer(**inputs)
    seen = []

    def run(*_):
        if inner == "the encoder of t5":
            seen.append(other.get_encoder()(input_ids=others["input_ids"], attention_mask=others["attention_mask"])[0])
        else:
            seen.append(other(**others).logits)

    alone = []
    run()
    alone, seen = seen, []
    outer.sparse_blocks[1].gate.register_forward_hook(run)
    found = outer(**inputs, output_router_logits=True)
    assert len(found.router_logits) == len(outer.sparse_blocks)
    torch.testing.assert_close(found.loss, expected.loss)
    if router_type == "top_k":
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(seen, alone)


@pytest.mark.parametrize("kind", ROUTERS)
def test_counts_of_an_event_are_those_of_its_tokens(kind, monkeypatch):
    model = routed_model("bert", kind).train()
    inputs = tiny_inputs(model, pads=3)
    (record,) = record_of(monkeypatch, lambda: model(**inputs, output_router_logits=True))
    mask = inputs["attention_mask"].flatten().bool()
    for event in record.events:
        routing = event.routing
        chosen = (
            routing.top_k_index[mask] if routing.token_index is None else routing.top_k_index[routing.kept.flatten()]
        )
        expected = chosen.flatten().bincount(minlength=model.config.num_experts)
        assert event.expert_counts(model.config.num_experts).tolist() == expected.tolist()


def test_what_is_not_finite_is_told_by_the_routing():
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [float("inf"), -float("inf")], [0.0, -float("inf")]])
    model = tiny_sparse("llama", num_experts=2, num_experts_per_tok=1)
    gate = model.sparse_blocks[0].gate
    hidden = torch.zeros(4, gate.weight.shape[1])
    gate.logits = lambda router_input: logits
    routing = gate(hidden)
    assert routing.non_finite.tolist() == [False, True, True, True]
    assert routing.router_logits.tolist() == [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert RoutingEvent(None, routing._replace(raw_logits=None, router_logits=logits)).routing.non_finite.sum() == 3
