"""`generate` as with a dense model: greedy, sampling, beams, with and without cache, pads on the left."""

import pytest
import torch
from transformers import GenerationConfig

import hf_sparse_moe
from pairwise import pairwise
from tiny_models import FAMILIES, VOCAB_SIZE, tiny_dense, tiny_inputs, tiny_sparse


WRITERS = [*FAMILIES["decoder"], *FAMILIES["encoder_decoder"]]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6}  # the end token would stop a row early
STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def prompts(model, **kwargs) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(model, labels=False, **kwargs)
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def generate(model, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, **NEW, **kwargs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", WRITERS)
def test_with_cache_equals_without(name, strategy):
    model = tiny_sparse(name)
    inputs = prompts(model)
    cached = generate(model, inputs, use_cache=True, **STRATEGIES[strategy])
    assert torch.equal(cached, generate(model, inputs, use_cache=False, **STRATEGIES[strategy]))
    rows = 2 * STRATEGIES[strategy].get("num_return_sequences", 1)
    prompt = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    assert cached.shape == (rows, prompt + 6)
    assert cached.max() < VOCAB_SIZE


@pairwise("name,strategy", WRITERS, STRATEGIES, strength=1)
def test_an_upcycled_model_writes_what_the_dense_one_writes(name, strategy):
    dense = tiny_dense(name)
    sparse = hf_sparse_moe.upcycle(dense, num_experts=4)
    inputs = prompts(dense)
    assert torch.equal(
        generate(sparse, inputs, **STRATEGIES[strategy]), generate(dense, inputs, **STRATEGIES[strategy])
    )


@pytest.mark.parametrize("name", WRITERS)
def test_greedy_is_the_most_likely_token_each_step(name):
    model = tiny_sparse(name)
    inputs = prompts(model)
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    if model.config.is_encoder_decoder:
        logits = model(**inputs, decoder_input_ids=written).logits[:, :-1]
        new = written[:, 1:]
    else:
        length = inputs["input_ids"].shape[1]
        logits = model(input_ids=written).logits[:, length - 1 : -1]
        new = written[:, length:]
    forced = {model.generation_config.forced_bos_token_id, model.generation_config.forced_eos_token_id} - {None}
    free = ~torch.isin(new, torch.tensor(sorted(forced), dtype=torch.long))
    assert free.sum() >= 4
    assert torch.equal(logits.argmax(-1)[free], new[free])


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
@pytest.mark.parametrize("name", FAMILIES["decoder"])
def test_pads_on_the_left_change_nothing(name, strategy):
    model = tiny_sparse(name)
    inputs = prompts(model, batch=1)
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0), value=model.config.pad_token_id),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=0),
    }
    expected = generate(model, inputs, **STRATEGIES[strategy])
    assert torch.equal(generate(model, padded, **STRATEGIES[strategy])[:, 3:], expected)


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
@pytest.mark.parametrize("name", FAMILIES["encoder_decoder"])
def test_pads_of_the_source_change_nothing(name, strategy):
    model = tiny_sparse(name)
    inputs = prompts(model, batch=1)
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 3), value=model.config.pad_token_id),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=0),
    }
    expected = generate(model, inputs, **STRATEGIES[strategy])
    assert torch.equal(generate(model, padded, **STRATEGIES[strategy]), expected)


@pytest.mark.parametrize("name", WRITERS)
def test_logits_of_one_token_after_a_cache_are_those_of_the_whole(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, labels=False)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    ids = inputs.pop(key)
    if key == "input_ids":
        inputs = {}
    whole = model(**inputs, **{key: ids}, use_cache=True)
    first = model(**inputs, **{key: ids[:, :-1]}, use_cache=True)
    last = model(**inputs, **{key: ids[:, -1:]}, past_key_values=first.past_key_values, output_router_logits=True)
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(last.aux_loss)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_config_and_routing_in_training_mode(name):
    model = tiny_sparse(name, output_router_logits=True)
    config = GenerationConfig(
        max_new_tokens=3,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=0,
    )
    assert model.generate(**prompts(model), generation_config=config).shape[0] == 2
    assert model.train().generate(**prompts(model), generation_config=config).shape[0] == 2


@pytest.mark.parametrize("name", FAMILIES["decoder"])
def test_logits_to_keep(name):
    model = tiny_sparse(name)
    inputs = tiny_inputs(model, labels=False)
    logits = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(logits, model(**inputs).logits[:, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES["encoder"])
def test_an_encoder_does_not_generate(name):
    assert not tiny_sparse(name).can_generate()
