"""Mixtures whose files hold codes, MXFP4 and FP8: cut as they are; or one sentence, and nothing written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sparse_moe import (
    disable_experts,
    expand,
    measure_experts,
    merge_experts,
    prune_experts,
    quantize_experts,
    to_dense,
)
from hf_sparse_moe.checkpoints.loading import load_whole
from hf_sparse_moe.models.quantized_weight import QuantizedWeight
from hf_sparse_moe.upcycling import verify
from routing.test_mixture_layers import build, inputs_of
from tiny_models import enlarge_weights, tiny_inputs, tiny_sparse


DROPPED = [1, 4]  # of 8


def write_quantised(folder, tensors, **quantization) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def save_mxfp4(folder) -> None:
    """gpt-oss as it is published: blocks of 32 codes of 4 bits with a scale."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 64}
    config = AutoConfig.for_model("gpt_oss", **sizes, **heads, **rope, pad_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    whole = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write_quantised(folder, tensors, quant_method="mxfp4", modules_to_not_convert=whole)


def save_fp8(folder) -> None:
    """DeepSeek-V3 as it is published: experts apart, each matrix with the scales of its blocks."""
    enlarge_weights(build("deepseek_v3")).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    settings = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    write_quantised(folder, tensors, quant_method="fp8", **settings, modules_to_not_convert=["lm_head"])


@pytest.fixture(params=[save_mxfp4, save_fp8], ids=["mxfp4", "fp8"])
def folder(request, tmp_path):
    request.param(tmp_path / "source")
    return tmp_path / "source"


@torch.no_grad()
def test_codes_are_cut_as_they_are(folder, tmp_path):
    """On disk no weight changes its dtype; in memory transformers computes with what the codes stand for."""
    report = prune_experts(folder, drop=DROPPED, output=tmp_path / "pruned")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "pruned"))
    sizes = {when: sum(t.nbytes for t in each.values()) for when, each in (("before", before), ("after", after))}
    assert report.receipt["pruned"]["bytes"] == sizes
    assert {t.dtype for t in before.values()} == {t.dtype for t in after.values()}
    model = load_whole(folder).float().eval()
    inputs = inputs_of(model)
    whole = model(**inputs).logits
    with disable_experts(model, DROPPED):
        expected = model(**inputs).logits
    assert (whole - expected).abs().max() > 1e-2
    for pruned in (load_whole(tmp_path / "pruned").float().eval(), prune_experts(model, drop=DROPPED)):
        torch.testing.assert_close(pruned(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
    assert verify(tmp_path / "pruned", folder).passed


def test_codes_have_no_mean(folder, tmp_path):
    model = load_whole(folder)
    measured = measure_experts(model, [inputs_of(model)])
    with pytest.raises(ValueError, match="is quantised"):
        merge_experts(folder, measured, into=6, output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"is quantised|`gpt_oss` cannot be read"):
        to_dense(folder, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert prune_experts(folder, measured, keep=6, output=tmp_path / "out").receipt["pruned"]["method"] == "reap"


@torch.no_grad()
def test_packed_experts_stay_packed(tmp_path):
    """Our own packed files: loaded, cut or copied as codes, and saved as codes."""
    quantize_experts(tiny_sparse("llama"), 4).save_pretrained(tmp_path / "packed")
    model = load_whole(tmp_path / "packed")
    inputs = tiny_inputs(model, labels=False)
    expand(tmp_path / "packed", 2, router_noise=0, output=tmp_path / "expanded")
    prune_experts(tmp_path / "packed", drop=[1], output=tmp_path / "pruned")
    expected = {"expanded": model(**inputs).logits}
    with disable_experts(model, [1]):
        expected["pruned"] = model(**inputs).logits
    for name, logits in expected.items():
        result = load_whole(tmp_path / name)
        assert isinstance(result.sparse_blocks[0].experts.down_proj, QuantizedWeight)
        torch.testing.assert_close(result(**inputs).logits, logits, rtol=1e-4, atol=2e-5)
        report = verify(tmp_path / name, tmp_path / "packed")
        assert report.passed, report.findings
    with pytest.raises(ValueError, match="Merge the experts, then quantise them"):
        merge_experts(tmp_path / "packed", measure_experts(model, [inputs]), into=3, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
