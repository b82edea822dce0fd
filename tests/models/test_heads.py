"""A checkpoint of one head loads into every other head of its family, and only the new head is fresh."""

import inspect

import pytest
import torch
import transformers as hf

from hf_sparse_moe.models.modeling_sparse_moe import AUTO_CLASSES
from tiny_models import FAMILIES, LANGUAGE_MODELS, tiny_inputs, tiny_sparse


# All pairs on one architecture a family; on the others, from the language model and from the bare model.
PAIRS = [
    (name, source, target)
    for family, classes in zip(FAMILIES, AUTO_CLASSES.values(), strict=True)
    for name in FAMILIES[family]
    for source in classes
    for target in classes
    if source is not target
    and (name in ("bert", "llama", "bart") or source in (LANGUAGE_MODELS[family], hf.AutoModel))
]


def pair_id(value: object) -> str:
    return value if isinstance(value, str) else value.__name__.removeprefix("AutoModel") or "Model"


def body_keys(model: hf.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights of the body, without the prefix that depends on the head."""
    prefix = f"dense.{model.dense.base_model_prefix}."
    body = {key.removeprefix(prefix): value for key, value in model.state_dict().items() if key.startswith(prefix)}
    return body or {key.removeprefix("dense."): value for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "source", "target"), PAIRS, ids=pair_id)
def test_a_checkpoint_loads_into_every_other_head(name, source, target, tmp_path):
    model = tiny_sparse(name, source)
    model.save_pretrained(tmp_path)
    loaded, info = target.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is AUTO_CLASSES[type(model.config)][target]
    assert not info["mismatched_keys"]
    expected, body = body_keys(model), body_keys(loaded)
    shared = expected.keys() & body.keys()
    assert sum("experts.down_proj" in key for key in shared) >= 2
    for key in shared:
        assert torch.equal(body[key], expected[key]), key
    for key in info["missing_keys"]:
        assert key.removeprefix(f"dense.{loaded.dense.base_model_prefix}.") not in expected, key
        assert "experts" not in key
        assert "layers.0" not in key
    for key, tensor in loaded.state_dict().items():
        assert torch.isfinite(tensor).all(), key


@pytest.mark.parametrize("name", [names[0] for names in FAMILIES.values()])
def test_a_pickled_checkpoint_loads_into_every_other_head(name, tmp_path):
    """As zero_to_fp32.py and torch.save write it: by the name of the file, transformers reads it in another way."""
    model = tiny_sparse(name)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for target in AUTO_CLASSES[type(model.config)]:
        loaded = target.from_pretrained(tmp_path)
        expected, body = body_keys(model), body_keys(loaded)
        shared = expected.keys() & body.keys()
        assert sum("experts.down_proj" in key for key in shared) >= 2
        assert all(torch.equal(body[key], expected[key]) for key in shared)


@pytest.mark.parametrize("name", [names[0] for names in FAMILIES.values()])
def test_the_bare_model_computes_the_hidden_states_of_the_language_model(name, tmp_path):
    model = tiny_sparse(name)
    model.save_pretrained(tmp_path)
    bare = hf.AutoModel.from_pretrained(tmp_path)
    inputs = tiny_inputs(model, labels=False)
    outputs = model(**inputs, output_hidden_states=True)
    states = outputs.decoder_hidden_states if model.config.is_encoder_decoder else outputs.hidden_states
    torch.testing.assert_close(bare(**inputs).last_hidden_state, states[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_question_answering_takes_what_its_dense_model_takes_and_two_ends_for_labels(family):
    """By its arguments Trainer knows which columns of a data set it may keep."""
    model = tiny_sparse(family, hf.AutoModelForQuestionAnswering)
    own = inspect.signature(model.forward).parameters
    dense = inspect.signature(model.dense.forward).parameters
    assert own.keys() >= dense.keys() | {"start_positions", "end_positions"}
    assert "labels" not in own
    inputs = tiny_inputs(model, labels=False)
    ends = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    outputs = model(**inputs, **ends)
    expected = model.dense(**inputs, **ends)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert model(**inputs).loss is None
