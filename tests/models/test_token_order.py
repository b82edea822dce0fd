"""Routers that ask for the tokens get those of the hidden states, in whatever order layers see them."""

import pytest
import torch
import transformers as hf
from torch.utils.checkpoint import checkpoint

from conformance.tiny_configs import VOCAB_SIZE, tiny_config
from hf_sparse_moe import routing_statistics, upcycle
from hf_sparse_moe.models.moe_block import SEQUENCE_FIRST
from tiny_models import FIRST_ORDINARY_TOKEN, enlarge_weights, tiny_inputs, tiny_sparse


AUTO_CLASSES = {"xlnet": hf.AutoModelForCausalLM, "fsmt": hf.AutoModelForSeq2SeqLM}


def trained(model_type: str, **fields):
    """As after a training: no two experts are alike."""
    torch.manual_seed(0)
    dense = enlarge_weights(AUTO_CLASSES[model_type].from_config(tiny_config(model_type)))
    model = upcycle(dense, 4, 2, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 5
    return model.eval()


def inputs_of(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def test_the_table_names_the_architectures_of_these_tests():
    assert set(AUTO_CLASSES) == SEQUENCE_FIRST


@pytest.mark.parametrize("model_type", AUTO_CLASSES)
@pytest.mark.parametrize("router_type", ["hash", "expert_choice"])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(model_type, router_type):
    if (model_type, router_type) == ("xlnet", "expert_choice"):
        pytest.skip("a causal decoder has no expert choice")
    model = trained(model_type, router_type=router_type)
    ids = torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE - 1, (3, 7))
    with torch.no_grad():
        together = model(**inputs_of(model, ids)).logits
        alone = torch.cat([model(**inputs_of(model, row[None])).logits for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", AUTO_CLASSES)
def test_pads_are_those_of_the_mask(model_type):
    model = trained(model_type)
    ids = torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE - 1, (3, 7))
    batch = inputs_of(model, ids)
    pads = [0, 2, 4]
    batch["attention_mask"] = (torch.arange(7) >= torch.tensor(pads)[:, None]).long()  # on the left, as XLNet pads
    seen = []
    with torch.no_grad():
        layers = routing_statistics(model, [batch]).layers
        for block in model.sparse_blocks:
            block.gate.register_forward_hook(lambda gate, args, routing: seen.append(routing.top_k_index))
        alone = []
        for row in range(3):
            seen.clear()
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            model(**one)
            alone.append([index_TK[one["attention_mask"][0].bool()] for index_TK in seen])
    for layer, *rows in zip(layers, *alone, strict=True):
        if layer.side == "decoder" and model.config.is_encoder_decoder:
            continue  # its tokens are all read
        expected = torch.bincount(torch.cat(rows).flatten(), minlength=4)
        assert layer.counts.sum(0).tolist() == expected.tolist()


def checkpointed_from_outside(model):
    """torch's wrapper around a layer, as Accelerate's FSDP puts it, computes it again outside of a forward pass."""
    for layer in model.dense.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    return model


@pytest.mark.parametrize("fields", [{"router_type": "hash"}, {"capacity_factor": 1.0}])
def test_a_checkpoint_that_forgets_the_tokens_is_refused(fields):
    model = checkpointed_from_outside(tiny_sparse("llama", **fields).train())
    loss = model(**tiny_inputs(model)).loss
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


def test_such_a_checkpoint_of_a_router_that_asks_for_nothing_changes_no_gradient():
    gradients = []
    for again in (False, True):
        model = tiny_sparse("llama").train()
        model.set_experts_implementation("grouped_mm")
        model = checkpointed_from_outside(model) if again else model
        model(**tiny_inputs(model)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, computed_again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, computed_again)


def test_a_balance_loss_without_a_gradient_is_told(monkeypatch):
    told = []
    monkeypatch.setattr("hf_sparse_moe.models.losses.logger.warning_once", told.append)
    reversible = upcycle(hf.AutoModelForCausalLM.from_config(tiny_config("reformer")), 4, 2).train()
    ids = torch.randint(FIRST_ORDINARY_TOKEN, VOCAB_SIZE - 1, (2, 64))
    reversible(input_ids=ids, labels=ids)
    assert len(told) == 1
    assert "Reformer" in told[0]
    for model in (tiny_sparse("llama").train(), tiny_sparse("llama", router_type="hash").train()):
        model(**tiny_inputs(model))
        model.requires_grad_(False)
        model(**tiny_inputs(model))
    assert len(told) == 1
