"""Routing statistics equal what is counted token by token."""

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from hf_sparse_moe.routing import LayerRouting, routing_statistics
from tiny_models import tiny_inputs, tiny_sparse


def layer(counts):
    return LayerRouting("decoder", 0, tuple("abcdef"[: len(counts)]), torch.tensor(counts, dtype=torch.float64))


def test_even_load():
    even = layer([[5, 5, 5, 5], [2, 2, 2, 2]])
    assert even.load.tolist() == [0.25] * 4
    assert even.entropy == pytest.approx(1)
    assert even.max_violation == pytest.approx(0)
    assert even.dead_experts == []
    assert even.mutual_information == pytest.approx(0, abs=1e-12)


def test_one_expert_for_all():
    collapsed = layer([[7, 0, 0, 0], [9, 0, 0, 0]])
    assert collapsed.entropy == 0
    assert collapsed.max_violation == 3
    assert collapsed.dead_experts == [1, 2, 3]
    assert collapsed.mutual_information == 0


def test_an_expert_for_each_group():
    assert layer([[4, 0], [0, 6]]).mutual_information == pytest.approx(1)


def test_group_load_is_a_share_of_the_group():
    assert layer([[3, 1], [0, 8]]).group_load.tolist() == [[0.75, 0.25], [0, 1]]
    assert layer([[0, 0], [1, 1]]).group_load.tolist() == [[0, 0], [0.5, 0.5]]  # a group of pads alone


def test_mutual_information_is_scikit_learns():
    counts = torch.randint(0, 9, (3, 5))
    groups = torch.arange(3).repeat_interleave(counts.sum(dim=1))
    experts = torch.cat([torch.arange(5).repeat_interleave(row) for row in counts])
    expected = normalized_mutual_info_score(groups.numpy(), experts.numpy())
    assert layer(counts.tolist()).mutual_information == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("with_labels", [True, False])
def test_counts_equal_a_count_by_hand(name, with_labels):
    model = tiny_sparse(name)
    batches = [tiny_inputs(model, labels=with_labels, batch=3, length=9, pads=4, seed=seed) for seed in range(2)]
    groups = ["x", "y", "x", "z", "y", "y"]
    statistics = routing_statistics(model, batches, groups)

    assert statistics.groups == ("x", "y", "z")
    expected = [torch.zeros(3, 4) for _ in statistics.layers]
    for number, batch in enumerate(batches):
        logits = model(**batch, output_router_logits=True).router_logits
        for place, layer_logits in enumerate(logits):
            side = statistics.layers[place].side
            choices = layer_logits.unflatten(0, (3, -1)).topk(2, dim=-1).indices
            for sequence in range(3):
                for token in range(choices.shape[1]):
                    if side == "encoder" or not model.config.is_encoder_decoder:
                        counts = batch["attention_mask"][sequence, token]
                    elif with_labels:
                        counts = batch["labels"][sequence, token] != -100
                    else:
                        counts = token == 0 or batch["decoder_input_ids"][sequence, token] != model.config.pad_token_id
                    if counts:
                        for expert in choices[sequence, token]:
                            expected[place]["xyz".index(groups[3 * number + sequence]), expert] += 1
    for found, wanted in zip(statistics.layers, expected, strict=True):
        assert torch.equal(found.counts.float(), wanted)


def test_layers_of_an_encoder_decoder_are_named_by_side():
    model = tiny_sparse("t5", encoder_mlp_layer_types=["dense", "sparse"])
    layers = routing_statistics(model, [tiny_inputs(model)]).layers
    assert [(layer.side, layer.position) for layer in layers] == [("encoder", 0), ("decoder", 0), ("decoder", 1)]


def test_the_model_is_left_as_it_was():
    model = tiny_sparse("llama", output_router_logits=True).train()
    inputs = tiny_inputs(model)
    routing_statistics(model, [inputs])
    assert model.training
    assert model(**inputs).router_logits is not None


def test_multiple_choice_counts_every_choice():
    from transformers import AutoModelForMultipleChoice

    model = tiny_sparse("bert", AutoModelForMultipleChoice)
    inputs = tiny_inputs(model)
    found = routing_statistics(model, [inputs], ["a", "b"]).layers[0]
    assert found.counts.sum().item() == 2 * inputs["input_ids"].numel()


def test_groups_must_fit():
    model = tiny_sparse("llama")
    with pytest.raises(ValueError, match="`groups` has 1 entries"):
        routing_statistics(model, [tiny_inputs(model)], ["a"])
    with pytest.raises(ValueError, match="but `batches` has 2 sequences"):
        routing_statistics(model, [tiny_inputs(model)], ["a", "b", "c"])
    with pytest.raises(ValueError, match="`batches` is empty"):
        routing_statistics(model, [])
