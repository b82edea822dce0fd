"""`upcycle(quantize=...)`: packed in memory and streamed to disk are the same bits, and say what they are."""

import pytest
import torch

from adapted_models import logits_of
from hf_sparse_moe import upcycle, verify
from hf_sparse_moe.models.quantized_weight import QuantizedWeight
from hf_sparse_moe.quantization import quantize_experts
from tiny_models import FAMILIES, LANGUAGE_MODELS, architecture_of, tiny_dense, tiny_inputs


pytest.importorskip("bitsandbytes")


def packed(model):
    return {name: value for name, value in model.named_parameters() if isinstance(value, QuantizedWeight)}


def load(name, folder):
    return LANGUAGE_MODELS[architecture_of(name)[1].family].from_pretrained(folder)


def assert_same(model, other):
    assert packed(model).keys() == packed(other).keys() != set()
    for (name, value), (_, wanted) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if isinstance(value, QuantizedWeight):
            assert torch.equal(value.codes, wanted.codes), name
            assert torch.equal(value.scales, wanted.scales), name
        else:
            assert torch.equal(value, wanted), name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_on_disk_is_packed_in_memory(name, bits, tmp_path):
    tiny_dense(name).save_pretrained(tmp_path / "dense")
    arguments = {"num_experts": 4, "method": "noise"}
    upcycle(tmp_path / "dense", output=tmp_path / "streamed", quantize=bits, max_shard_size="10KB", **arguments)
    expected = quantize_experts(upcycle(tmp_path / "dense", **arguments), bits)
    in_memory = upcycle(tmp_path / "dense", quantize=bits, **arguments)
    streamed = load(name, tmp_path / "streamed")
    assert_same(in_memory, expected)
    assert_same(streamed, expected)
    assert streamed.receipt["arguments"]["quantize"] == bits
    inputs = tiny_inputs(streamed, labels=False)
    assert torch.equal(logits_of(streamed, inputs), logits_of(expected, inputs))


def test_verify_knows_that_packing_rounds(tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", output=tmp_path / "streamed", quantize=4)
    report = verify(tmp_path / "streamed", tmp_path / "dense")
    assert report.passed
    assert not report.promised
    assert "experts are packed" in report.findings[0]
    mixture = upcycle(tiny_dense("llama"), output=tmp_path / "in memory", quantize=4)
    measured = mixture.receipt["equality"]["max_abs_difference"]
    assert measured == pytest.approx(report.measured["as_stored"]["max_abs_difference"], rel=1e-3)
    assert measured > 1e-3


def test_what_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`quantize=2` must be 8 or 4"):
        upcycle(tiny_dense("llama"), quantize=2)
    quantised = upcycle(tiny_dense("llama"), 4, quantize=4)
    with pytest.raises(ValueError, match="takes `layers` and `seed` alone"):
        upcycle(quantised, quantize=4)
