"""`model.gguf` holds the mixture's tensors, settings and vocabulary, as llama.cpp and transformers read them."""

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_sparse_moe import export
from hf_sparse_moe.stock.gguf import _PRE_TOKENIZERS
from tiny_models import tiny_sparse


TEXT = "It don't cost 12345 euros, ünïcödé: 日本語 🦙!\n\n  so I'LL buy it.  " * 4


def written(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    tensors = {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}
    kinds = {each.name: each.tensor_type.name for each in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, kinds


def test_transformers_computes_from_it_what_the_mixture_computes(tmp_path, mixture):
    """Its reader of Qwen3-MoE leaves the experts' size at 768."""
    model = mixture("qwen3", moe_intermediate_size=768)
    export(model, tmp_path / "gguf", server="llama.cpp")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32).eval()
    input_ids = torch.randint(4, 90, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids).logits, model(input_ids).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", ["llama", "qwen3"])
def test_every_tensor_is_the_mixtures(tmp_path, mixture, dense, dtype):
    model = mixture(dense).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "gguf", server="llama.cpp")
    settings, tensors, kinds = written(tmp_path / "gguf")
    state = {name.removeprefix("dense.model."): tensor.float().numpy() for name, tensor in model.state_dict().items()}
    block, attention = "layers.2.mlp.", "layers.2.self_attn."
    gate, up = np.split(state[f"{block}experts.gate_up_proj"], 2, axis=1)
    expected = {
        "token_embd.weight": state["embed_tokens.weight"],
        "output.weight": state["dense.lm_head.weight"],
        "output_norm.weight": state["norm.weight"],
        "blk.2.ffn_gate_exps.weight": gate,
        "blk.2.ffn_up_exps.weight": up,
        "blk.2.ffn_down_exps.weight": state[f"{block}experts.down_proj"],
        "blk.2.ffn_gate_inp.weight": state[f"{block}gate.weight"],
        "blk.2.attn_v.weight": state[f"{attention}v_proj.weight"],
        "blk.2.attn_output.weight": state[f"{attention}o_proj.weight"],
    }
    for name, tensor in expected.items():
        assert np.array_equal(tensors[name], tensor), name
    per_layer = {name.removeprefix("blk.2.") for name in tensors if name.startswith("blk.2.")}
    assert len(tensors) == 3 + 4 * len(per_layer)
    # llama.cpp turns neighbouring units of a Llama's heads: unit i of the first half stands before i of the second.
    query = state[f"{attention}q_proj.weight"].reshape(4, 16, -1)
    if dense == "llama":
        query = np.stack([query[:, :8], query[:, 8:]], axis=2).reshape(4, 16, -1)
    assert np.array_equal(tensors["blk.2.attn_q.weight"].reshape(4, 16, -1), query)
    kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert kinds["blk.0.ffn_up_exps.weight"] == kind
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    name = "llama" if dense == "llama" else "qwen3moe"
    assert settings["general.architecture"] == name
    assert settings[f"{name}.expert_count"] == 4
    assert settings[f"{name}.expert_used_count"] == 2
    assert settings[f"{name}.attention.key_length"] == 16
    if dense == "llama":
        assert settings["llama.rope.scaling.factor"] == 2.0


def test_a_damaged_file_is_noticed(tmp_path, mixture, monkeypatch):
    write = gguf.GGUFWriter.write_tensor_data
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda self, tensor: write(self, tensor * 0))
    with pytest.raises(OSError, match=r"`token_embd.weight` of .* is not what was written"):
        export(mixture("llama"), tmp_path / "gguf", server="llama.cpp")
    assert not list(tmp_path.iterdir())


def byte_level_bpe(pattern):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"]
    tokenizer.train_from_iterator(
        [TEXT], BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize(("pattern", "name"), _PRE_TOKENIZERS.items(), ids=_PRE_TOKENIZERS.values())
def test_the_vocabulary_of_a_byte_level_bpe(tmp_path, pattern, name):
    tokenizer = byte_level_bpe(pattern)
    tiny_sparse("qwen3", dense_fields={"vocab_size": 310}).save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "gguf", server="llama.cpp")
    settings, _, _ = written(tmp_path / "gguf")
    assert settings["tokenizer.ggml.model"] == "gpt2"
    assert settings["tokenizer.ggml.pre"] == name
    texts, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert texts[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert kinds[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    assert set(kinds[len(tokenizer) :]) == {gguf.TokenType.UNUSED}
    assert settings["tokenizer.ggml.eos_token_id"] == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_a_tokenizer_that_llama_cpp_does_not_know(tmp_path):
    tiny_sparse("qwen3", dense_fields={"vocab_size": 310}).save_pretrained(tmp_path / "ours")
    byte_level_bpe(r"\w+|\s+|.").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="no counterpart in llama"):
        export(tmp_path / "ours", tmp_path / "gguf", server="llama.cpp")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_it_cannot_be_resumed(tmp_path, mixture):
    mixture("llama").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="`resume=True` is not allowed for llama"):
        export(tmp_path / "ours", tmp_path / "gguf", server="llama.cpp", resume=True)
