"""Which tokens count: one answer for every family, told by the arguments of the call."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from hf_sparse_moe.models.masks import tokens_by_side
from hf_sparse_moe.routing import fix_balance
from monitored_training import make_model
from routing.test_balance_fix import stock
from tiny_models import tiny_inputs


IDS = torch.tensor([[0, 7, 8, 0], [0, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
LABELS = torch.tensor([[5, 6, -100], [-100, 5, -100]])


def model(two_sides: bool, **attributes):
    return SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=two_sides, pad_token_id=0), **attributes)


def mask_of(side: str, model, num_tokens: int, **inputs):
    mask = tokens_by_side(model, inputs)[side].context(num_tokens).mask
    return None if mask is None else mask.long().tolist()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_of_one_side_the_attention_mask_tells(side):
    assert mask_of(side, model(False), 8, input_ids=IDS, attention_mask=MASK) == MASK.flatten().tolist()
    assert mask_of(side, model(False), 8, input_ids=IDS) is None


DECODER = {
    "its own mask first": ({"decoder_attention_mask": MASK, "labels": LABELS, "decoder_input_ids": IDS}, MASK),
    "labels": ({"labels": LABELS}, LABELS != -100),
    "labels before ids": ({"labels": LABELS, "decoder_input_ids": IDS[:, :3]}, LABELS != -100),
    "pads, but for the first": ({"decoder_input_ids": IDS}, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])),
    "the source": ({}, MASK),
    "nothing": ({"decoder_inputs_embeds": torch.zeros(2, 3, 4)}, None),
}


@pytest.mark.parametrize("case", DECODER)
def test_of_a_decoder_with_an_encoder_the_first_of_these_tells(case):
    inputs, expected = DECODER[case]
    tokens = 6 if expected is None else expected.numel()
    found = mask_of("decoder", model(True), tokens, input_ids=IDS, attention_mask=MASK, **inputs)
    assert found == (None if expected is None else expected.flatten().long().tolist())
    assert mask_of("encoder", model(True), 8, input_ids=IDS, attention_mask=MASK, **inputs) == MASK.flatten().tolist()


def test_labels_that_are_no_targets_do_not_tell():
    head = model(True, labels_are_targets=False)  # a label for each of two classes
    assert mask_of("decoder", head, 8, decoder_input_ids=IDS, labels=torch.ones(2, 2)) == [1, 1, 1, 0, 1, 1, 0, 0]


def test_with_a_cache_the_last_columns_count():
    assert mask_of("decoder", model(False), 4, input_ids=IDS[:, -2:], attention_mask=MASK) == [1, 0, 1, 1]


def test_choices_are_rows_and_pairs_of_tokens_are_not():
    choices, pairs = torch.ones(2, 3, 4), torch.ones(2, 4, 4)
    choices[0, 1, 2] = 0
    expected = choices.flatten().long().tolist()
    assert mask_of("encoder", model(False), 24, input_ids=torch.ones(2, 3, 4), attention_mask=choices) == expected
    for mask in (pairs, pairs[:, None], {"full_attention": MASK}):
        assert mask_of("encoder", model(False), 8, input_ids=IDS, attention_mask=mask) is None


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
    assert found == [1, 1, 1, 0, 1, 1, 0, 0]
