"""The vocabulary grows and shrinks, and tied embeddings stay tied."""

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import hf_sparse_moe
from tiny_models import BACKBONES, LANGUAGE_MODELS, VOCAB_SIZE, architecture_of, tiny_dense, tiny_inputs, tiny_sparse


# Untied: T5's config knows no such thing (see the last test); a resized dense BERT loses a bias, and a dense BART its
# encoder's embeddings, in transformers itself.
TIES = [(name, True) for name in BACKBONES] + [(name, False) for name in ("modernbert", "llama", "gpt2", "qwen3")]


def auto_class(name: str) -> type:
    return LANGUAGE_MODELS[architecture_of(name)[1].family]


def assert_embeddings(model: hf.PreTrainedModel, size: int, tied: bool) -> None:
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embeddings.shape[0] == head.shape[0] == size
    assert (embeddings.data_ptr() == head.data_ptr()) == tied
    assert model.config.vocab_size == model.config.dense_config.vocab_size == size
    for key, bias in model.named_parameters():
        if key.endswith(("decoder.bias", "lm_head.bias", "final_logits_bias")):
            assert bias.shape[-1] == size, key


@pytest.mark.parametrize("size", [VOCAB_SIZE + 17, VOCAB_SIZE - 16], ids=["larger", "smaller"])
@pytest.mark.parametrize(("name", "tied"), TIES, ids=lambda value: {True: "tied", False: "untied"}.get(value, value))
def test_resized_model_runs_saves_and_comes_back(name, tied, size, tmp_path):
    model = tiny_sparse(name, dense_fields={"tie_word_embeddings": tied})
    assert_embeddings(model, VOCAB_SIZE, tied)
    inputs = tiny_inputs(model)
    inputs = {key: value.clamp(max=VOCAB_SIZE - 20) for key, value in inputs.items()}
    before = model(**inputs).logits
    returned = model.resize_token_embeddings(size, mean_resizing=False)
    assert returned is model.get_input_embeddings()
    assert_embeddings(model, size, tied)
    outputs = model(**inputs)
    common = min(size, VOCAB_SIZE)
    torch.testing.assert_close(outputs.logits[..., :common], before[..., :common], rtol=1e-4, atol=1e-5)
    assert outputs.logits.shape[-1] == size
    assert torch.isfinite(outputs.loss)
    model.save_pretrained(tmp_path)
    loaded, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    assert_embeddings(loaded, size, tied)
    torch.testing.assert_close(loaded(**inputs).logits, outputs.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_resize_to_a_multiple_and_train(name):
    model = tiny_sparse(name)
    model.resize_token_embeddings(VOCAB_SIZE + 1, pad_to_multiple_of=8)
    assert model.config.vocab_size == VOCAB_SIZE + 8
    model.train()(**tiny_inputs(model)).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape[0] == VOCAB_SIZE + 8


@pytest.mark.parametrize("name", BACKBONES)
def test_embeddings_can_be_replaced(name):
    model = tiny_sparse(name)
    fresh = torch.nn.Embedding(VOCAB_SIZE, model.get_input_embeddings().embedding_dim)
    torch.nn.init.normal_(fresh.weight)
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh
    assert torch.isfinite(model(**tiny_inputs(model)).loss)


def test_a_t5_checkpoint_with_a_head_of_its_own_stays_untied(tmp_path):
    """T5 v1.1 and FLAN-T5: the config says tied, the file has both tensors, and the file is right."""
    dense = tiny_dense("t5_gated")
    dense.save_pretrained(tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    state["lm_head.weight"] = torch.randn(VOCAB_SIZE, 32)
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    sparse = hf_sparse_moe.upcycle(str(tmp_path / "dense"), num_experts=4)
    assert torch.equal(sparse.get_output_embeddings().weight, state["lm_head.weight"])
    assert sparse.receipt["equality"]["max_abs_difference"] < 1e-4
    sparse.save_pretrained(tmp_path / "sparse")
    loaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse")
    assert_embeddings(loaded, VOCAB_SIZE, tied=False)
    assert torch.equal(loaded.get_output_embeddings().weight, sparse.get_output_embeddings().weight)
