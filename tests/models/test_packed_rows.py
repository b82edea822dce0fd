"""Rows that hold several sequences, by whatever tells it, and steps without labels."""

import pytest
import torch
import transformers as hf

from hf_sparse_moe import fix_balance
from tiny_models import tiny_sparse, without_dropout


LENGTHS = (3, 5, 4)
IDS = torch.randint(5, 50, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
WHICH = torch.cat([torch.full((length,), number) for number, length in enumerate(LENGTHS)])
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BLOCK = (WHICH[:, None] == WHICH[None])[None, None]
PACKED = {
    "positions": {"position_ids": POSITIONS},
    "cu_seq_lens": {
        "position_ids": POSITIONS,
        "cu_seq_lens_q": torch.tensor([0, 3, 8, 12]),
        "cu_seq_lens_k": torch.tensor([0, 3, 8, 12]),
    },
    "4-D mask": {"position_ids": POSITIONS, "attention_mask": BLOCK & torch.ones(12, 12, dtype=torch.bool).tril()},
}


def gates_of(model):
    return [p for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))]


def gradient(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs.aux_loss.item(), torch.cat([gate.grad.flatten() for gate in gates_of(model)])


def alone():
    """The same sequences, a row each, padded."""
    parts = IDS[0].split(LENGTHS)
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(how):
    """The first token of a sequence is not predicted from the last one of another."""
    labels = IDS.masked_fill(POSITIONS == 0, -100)
    return {"input_ids": IDS, "labels": labels, "use_cache": False, **PACKED[how]}


@pytest.mark.parametrize("how", ["positions", "cu_seq_lens", "4-D mask"])
def test_the_sequence_scope_finds_the_sequences(how):
    model = without_dropout(tiny_sparse("llama", router_aux_loss_coef=1.0, balance_scope="sequence")).train()
    expected_loss, expected = gradient(model, **alone())
    loss, found = gradient(model, **packed(how))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_so_does_fix_balance():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **heads)).train()
    with fix_balance(model, router_aux_loss_coef=1.0, balance_scope="sequence"):
        expected_loss, expected = gradient(model, **alone())
        loss, found = gradient(model, **packed("positions"))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_numbers_in_the_mask_tell_the_sequences_apart():
    model = without_dropout(tiny_sparse("llama", router_aux_loss_coef=1.0, balance_scope="sequence")).train()
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    expected = gradient(model, **inputs, attention_mask=torch.ones_like(IDS), position_ids=POSITIONS)
    found = gradient(model, **inputs, attention_mask=(WHICH + 1)[None], position_ids=POSITIONS)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert gradient(model, **inputs)[0] != pytest.approx(expected[0], rel=1e-3)


def test_expert_choice_refuses_packed_rows():
    model = without_dropout(tiny_sparse("bert", router_type="expert_choice"))
    model(input_ids=IDS, position_ids=torch.arange(12)[None])
    for how in (PACKED["positions"], {"attention_mask": BLOCK}, {"attention_mask": (WHICH + 1)[None]}):
        with pytest.raises(ValueError, match="a row of its own"):
            model(input_ids=IDS, **how)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), 7])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_a_micro_batch_without_labels_adds_nothing(scope, count):
    model = without_dropout(
        tiny_sparse("llama", router_aux_loss_coef=1.0, router_z_loss_coef=0.1, balance_scope=scope)
    ).train()
    outputs = model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=count)
    outputs.loss.backward()
    assert outputs.loss.item() == outputs.task_loss.item() == 0.0
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_nor_under_fix_balance(count):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **heads)).train()
    with fix_balance(model, router_aux_loss_coef=1.0):
        outputs = model(input_ids=IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=count)
    outputs.loss.backward()
    assert outputs.loss.item() == 0.0
    assert all(p.grad is None or p.grad.eq(0).all() for p in model.parameters())
