"""torchao has the linears of a mixture; its experts are packed beside them, or named as left alone."""

import logging

import pytest
import torch
import transformers as hf

from adapted_models import adapted, logits_of, stock_mixture
from hf_sparse_moe import ExpertsQuantizationConfig, quantize_experts, upcycle
from hf_sparse_moe.models.quantized_weight import QuantizedWeight
from tiny_models import tiny_dense, tiny_inputs, tiny_sparse


torchao = pytest.importorskip("torchao.quantization")
pytest.importorskip("bitsandbytes")


def eight_bits():
    return hf.TorchAoConfig(torchao.Int8WeightOnlyConfig())


def load(folder, **kwargs):
    return hf.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def packed(model):
    return {name: value for name, value in model.named_parameters() if isinstance(value, QuantizedWeight)}


def linears_of_torchao(model):
    return [name for name, value in model.named_parameters() if "torchao" in type(value.data).__module__]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_linears_beside_packed_experts(name, tmp_path):
    model = stock_mixture(name) if name == "mixtral" else tiny_sparse(name)
    inputs = tiny_inputs(model, labels=False)
    model.save_pretrained(tmp_path / "floats")
    both = load(tmp_path / "floats", quantization_config=ExpertsQuantizationConfig(4, eight_bits()))
    both.save_pretrained(tmp_path / "packed")
    back = load(tmp_path / "packed")
    codes = packed(quantize_experts(model, 4))
    for one in (both, back):
        assert len(linears_of_torchao(one)) == 8  # the attention of two layers
        assert packed(one).keys() == codes.keys() != set()
        assert all(torch.equal(weight.codes, codes[key].codes) for key, weight in packed(one).items())
    expected = logits_of(both, inputs)
    assert torch.equal(logits_of(back, inputs), expected)
    assert not torch.equal(logits_of(adapted(back), inputs), expected)


def test_alone_it_leaves_the_experts_and_is_told_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for model in (tiny_sparse("llama"), stock_mixture("mixtral")):
        caplog.clear()
        model.save_pretrained(tmp_path / type(model).__name__)
        left = load(tmp_path / type(model).__name__, quantization_config=eight_bits())
        assert not packed(left)
        assert f"`TorchAoConfig` leaves the experts of `{type(model).__name__}` as floats" in caplog.text


def test_a_dense_model_that_it_quantised_is_no_source(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "floats")
    model = load(tmp_path / "floats", quantization_config=eight_bits())
    model.save_pretrained(tmp_path / "quantised")
    for source in (model, tmp_path / "quantised"):
        with pytest.raises(ValueError, match=r"is quantised \(torchao\)"):
            upcycle(source)
