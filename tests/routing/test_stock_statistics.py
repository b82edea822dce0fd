"""`routing_statistics`, the pictures and `select_experts` take stock mixtures as they take ours."""

import pytest
import torch

from hf_sparse_moe.adapters import select_experts
from hf_sparse_moe.insight import plot_expert_load
from hf_sparse_moe.routing import find_mixture_layers, observe_routing, routing_statistics
from models.router_kinds import routed_model
from routing.test_balance_fix import EXPERTS, LAYERS, batch, stock
from tiny_models import tiny_inputs


STOCK = ["Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "GPT-OSS", "Switch"]


def counts_by_hand(model, batches):
    """`(layers, sequences, E)`, token by token from what the experts were called with."""
    layers = find_mixture_layers(model)
    calls = []
    total = []
    for inputs in batches:
        calls.clear()
        with observe_routing(layers, lambda *call: calls.append(call)), torch.no_grad():
            model(**inputs)
        counts = torch.zeros(len(calls), len(inputs["input_ids"]), EXPERTS)
        for place, (layer, routing) in enumerate(calls):
            in_decoder = model.config.is_encoder_decoder and layer.side == "decoder"
            mask = inputs["labels"] != -100 if in_decoder else inputs["attention_mask"] == 1
            index = routing.top_k_index.unflatten(0, mask.shape)
            for sequence, token in mask.nonzero().tolist():
                for expert in index[sequence, token].tolist():
                    counts[place, sequence, expert] += 1
        total.append(counts)
    return torch.cat(total, dim=1)


@pytest.mark.parametrize("name", STOCK)
def test_statistics_of_stock_mixtures_equal_a_count_by_hand(name, tmp_path):
    model = stock(name, top_k=1 if name == "Switch" else 2).eval()
    batches = [batch(rows=2, pads=3), batch(rows=1)]
    statistics = routing_statistics(model, batches, ["en", "de", "en"])
    expected = counts_by_hand(model, batches)
    assert len(statistics.layers) == LAYERS
    assert (statistics.num_experts, statistics.groups) == (EXPERTS, ("en", "de"))
    for layer, counts in zip(statistics.layers, expected, strict=True):
        assert layer.counts.tolist() == [(counts[0] + counts[2]).tolist(), counts[1].tolist()]
    sides = {layer.side for layer in statistics.layers}
    assert sides == ({"encoder", "decoder"} if name == "Switch" else {"decoder"})
    pytest.importorskip("matplotlib")
    assert plot_expert_load(statistics, tmp_path / "load.png").stat().st_size > 1000


@pytest.mark.parametrize("by", ["weight", "count"])
@pytest.mark.parametrize("kind", ["expert choice", "softmax"])
def test_selected_experts_are_those_that_serve(kind, by):
    """Where experts choose, an assignment that was dropped counts for none of them: their loads are even."""
    model = routed_model("bert", kind)
    inputs = tiny_inputs(model, labels=False, pads=4)
    routed = []
    with observe_routing(model, lambda layer, routing: routed.append(routing)), torch.no_grad():
        model(**inputs)
    chosen = select_experts(model, [inputs], share=0.25, by=by)
    for experts, routing in zip(chosen.values(), routed, strict=True):
        scores = torch.zeros(4, dtype=torch.float64)
        for row in range(len(routing.top_k_index)):
            token = row if routing.token_index is None else int(routing.token_index[row])
            for slot, expert in enumerate(routing.top_k_index[row].tolist()):
                if inputs["attention_mask"].flatten()[token] and (routing.kept is None or routing.kept[row, slot]):
                    scores[expert] += routing.top_k_weights[row, slot].double() if by == "weight" else 1
        assert experts[:1] == [int(scores.argmax())] or len(experts) > 1
        if kind == "expert choice" and by == "count":
            assert len(set(scores.tolist())) == 1
            assert experts == [0]
