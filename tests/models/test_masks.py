"""Which tokens count: one answer for every family, told by the arguments of the call."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from hf_sparse_moe import SparseMoePreTrainedModel, select_experts
from hf_sparse_moe.models.masks import tokens_by_side
from hf_sparse_moe.routing import find_mixture_layers, fix_balance, routing_statistics
from monitored_training import make_model
from routing.test_balance_fix import stock
from tiny_models import tiny_inputs, tiny_sparse, without_dropout


IDS = torch.tensor([[0, 7, 8, 0], [0, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
LABELS = torch.tensor([[5, 6, -100], [-100, 5, -100]])


def model(two_sides: bool, **attributes):
    return SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=two_sides, pad_token_id=0, eos_token_id=8), **attributes
    )


def mask_of(side: str, model, num_tokens: int, **inputs):
    mask = tokens_by_side(model, inputs)[side].context(num_tokens).mask
    return None if mask is None else mask.long().tolist()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_of_one_side_the_attention_mask_tells(side):
    assert mask_of(side, model(False), 8, input_ids=IDS, attention_mask=MASK) == MASK.flatten().tolist()
    assert mask_of(side, model(False), 8, input_ids=IDS) is None


DECODER = {
    "its own mask first": ({"decoder_attention_mask": MASK, "labels": LABELS, "decoder_input_ids": IDS}, MASK),
    "neither an end nor before a pad": ({"decoder_input_ids": IDS}, torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])),
    "the only one": ({"decoder_input_ids": IDS[:, :1]}, torch.tensor([[1], [1]])),
    "labels": ({"labels": LABELS}, LABELS.ne(-100)),
    "labels before ids": ({"labels": LABELS, "decoder_input_ids": IDS[:, :3]}, LABELS.ne(-100)),
    "the source": ({}, MASK),
    "nothing": ({"decoder_inputs_embeds": torch.zeros(2, 3, 4)}, None),
    "labels beside embeddings": ({"decoder_inputs_embeds": torch.zeros(2, 3, 4), "labels": LABELS}, LABELS.ne(-100)),
}


@pytest.mark.parametrize("case", DECODER)
def test_of_a_decoder_with_an_encoder_the_first_of_these_tells(case):
    inputs, expected = DECODER[case]
    tokens = 6 if expected is None else expected.numel()
    found = mask_of("decoder", model(True), tokens, input_ids=IDS, attention_mask=MASK, **inputs)
    assert found == (None if expected is None else expected.flatten().long().tolist())
    assert mask_of("encoder", model(True), 8, input_ids=IDS, attention_mask=MASK, **inputs) == MASK.flatten().tolist()


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "switch"])
def test_of_sequences_that_end_labels_say_no_more_than_ids(name):
    """What the model makes of them is what a collator makes of them, with whatever pads."""
    mixture = stock("Switch", top_k=1) if name == "switch" else tiny_sparse(name)
    ends = mixture.config.eos_token_id
    labels = torch.tensor([[7, 8, 9, 11, ends], [7, 8, ends, -100, -100], [7, 8, 9, ends, -100]])
    inputs = {"input_ids": torch.full((3, 4), 7)}
    ids = mixture.prepare_decoder_input_ids_from_labels(labels)
    given = [{"labels": labels}, {"decoder_input_ids": ids}, {"labels": labels, "decoder_input_ids": ids}]
    found = [mask_of("decoder", mixture, 15, **inputs, **one) for one in given]
    assert found[0] == found[1] == found[2] == labels.ne(-100).flatten().long().tolist()
    padded = mixture.prepare_decoder_input_ids_from_labels(torch.nn.functional.pad(labels, (0, 2), value=-100))
    assert sum(mask_of("decoder", mixture, 21, **inputs, decoder_input_ids=padded)) == sum(found[0])


def test_every_reader_counts_the_same_decoder_tokens_with_labels_and_without():
    """Statistics, the choice of experts for an adapter, `fix_balance` and the losses."""
    labels = torch.tensor([[7, 8, 9, 11, 1], [7, 8, 1, -100, -100]])
    for mixture in (without_dropout(tiny_sparse("t5", router_aux_loss_coef=1.0)), stock("Switch", top_k=1)):
        ids = mixture.prepare_decoder_input_ids_from_labels(labels)
        source = {"input_ids": torch.full((2, 4), 7), "attention_mask": torch.ones(2, 4)}
        counts, losses, chosen = [], [], []
        for given in ({"labels": labels}, {"decoder_input_ids": ids}, {"labels": labels, "decoder_input_ids": ids}):
            given = source | given
            decoder = [layer for layer in routing_statistics(mixture, [given]).layers if layer.side == "decoder"]
            counts.append({layer.counts.sum().item() for layer in decoder})
            ours = isinstance(mixture, SparseMoePreTrainedModel)
            chosen.append(select_experts(mixture, [given], by="count") if ours else None)  # of Switch it takes none
            fix = None if ours else fix_balance(mixture)
            outputs = mixture.train()(**given)
            losses.append([outputs[name].item() for name in ("aux_loss", "decoder_aux_loss") if name in outputs])
            mixture.eval()
            if fix is not None:
                fix.restore()
        assert counts[0] == counts[1] == counts[2] == {8 * find_mixture_layers(mixture)[0].top_k}
        for others in losses[1:]:
            assert others == pytest.approx(losses[0])
        assert chosen[0] == chosen[1] == chosen[2]


def test_labels_that_are_no_targets_do_not_tell():
    head = model(True, labels_are_targets=False)  # a label for each of two classes
    assert mask_of("decoder", head, 8, decoder_input_ids=IDS, labels=torch.ones(2, 2)) == [1, 1, 0, 0, 1, 0, 0, 0]


def test_with_a_cache_the_last_columns_count():
    assert mask_of("decoder", model(False), 4, input_ids=IDS[:, -2:], attention_mask=MASK) == [1, 0, 1, 1]


def test_choices_are_rows_and_pairs_of_tokens_are_not():
    choices, pairs = torch.ones(2, 3, 4), torch.ones(2, 4, 4)
    choices[0, 1, 2] = 0
    expected = choices.flatten().long().tolist()
    assert mask_of("encoder", model(False), 24, input_ids=torch.ones(2, 3, 4), attention_mask=choices) == expected
    for mask in (pairs, {"full_attention": MASK}):
        assert mask_of("encoder", model(False), 8, input_ids=IDS, attention_mask=mask) is None


@pytest.mark.parametrize("kind", ["bool", "long", "added"])
def test_of_a_mask_over_pairs_a_token_that_none_sees_is_a_pad(kind):
    pairs = MASK[:, None, None, :].bool() & torch.ones(4, 4, dtype=torch.bool).tril()
    given = torch.zeros(pairs.shape).masked_fill(~pairs, float("-inf")) if kind == "added" else pairs
    given = given.long() if kind == "long" else given
    assert mask_of("decoder", model(False), 8, input_ids=IDS, attention_mask=given) == MASK.flatten().tolist()
    assert mask_of("decoder", model(False), 4, input_ids=IDS[:, -2:], attention_mask=given[:, :, -2:]) == [1, 0, 1, 1]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])  # "sequence" tells the samples apart
def test_numbers_of_packed_samples_weigh_no_token_more(name, scope):
    """Masks such as 1, 1, 2, 2, 0, as packing collators make them."""
    ours = name == "llama"
    mixture = make_model(name, balance_scope=scope, router_z_loss_coef=0.1)
    inputs = tiny_inputs(mixture, pads=2)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    numbered = inputs | {"attention_mask": inputs["attention_mask"].cumsum(-1) * inputs["attention_mask"]}
    fix = None if ours else fix_balance(mixture, balance_scope=scope)
    found = [mixture.train()(**given).aux_loss.item() for given in (inputs, numbered)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    if fix is not None:
        fix.restore()


def test_a_stock_encoder_decoder_counts_as_ours():
    """Of a Switch Transformer, `fix_balance` sees the pads of `decoder_input_ids` too."""
    switch = stock("Switch", top_k=1)
    assert isinstance(switch, hf.SwitchTransformersForConditionalGeneration)
    found = mask_of("decoder", switch, 8, input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS)
    assert found == [1, 1, 0, 0, 1, 0, 0, 0]
