"""A mixture as the one file that llama.cpp runs: tensors, settings and vocabulary in GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from hf_sparse_moe.checkpoints.companions import copy_companions
from hf_sparse_moe.checkpoints.files import read_json
from hf_sparse_moe.checkpoints.folder import new_folder
from hf_sparse_moe.checkpoints.source import Source

from .targets import ExportTarget
from .tensors import Tensors, part_to_target


logger = logging.get_logger(__name__)

GGUF_NAME = "model.gguf"
# The architecture of llama.cpp, and whether it turns neighbouring units, where transformers turns those of two halves.
_ARCHITECTURES = {"mixtral": ("LLAMA", True), "qwen3_moe": ("QWEN3MOE", False)}
# llama.cpp's name of the pattern by which a byte-level BPE splits text before it merges.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {_SPLIT % "{1,3}": "llama-bpe", _SPLIT % "": "qwen2"}


def write_gguf(
    output: str | Path,
    mixture: Any,
    row: ExportTarget,
    config: PreTrainedConfig,
    parts: list[tuple[str, list[str]]],
    stored: Tensors,
    read: Callable[[str], torch.Tensor],
) -> None:
    """
    Write the folder `output` with `model.gguf`, read that again and compare every tensor with the mixture's. Matrices
    keep their dtype; norms and routers are float32.

    Args:
        mixture (`SparseMoePreTrainedModel` or `Source`): Where the vocabulary is; without one the file has none.
        config (`PreTrainedConfig`): The stock config.
        parts (`list`): Of [`parts_of`].
        stored, read: The tensors without storage, and how to read one.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("llama.cpp's files are written with `gguf`: pip install hf-sparse-moe[gguf].") from None
    architecture, neighbours = _ARCHITECTURES[row.model_type]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)

    def converted(get: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for path, keys in parts:
            for name, tensor in part_to_target(row, path, {key: get(key) for key in keys}, {}).items():
                for stock_name, matrix in _split(name, tensor):
                    if neighbours and name.endswith(("q_proj.weight", "k_proj.weight")):
                        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                        matrix = matrix.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
                    yield names.get_name(stock_name, try_suffixes=(".weight",)), matrix.contiguous()
        yield from _rope_factors(config)

    with new_folder(output, needed_bytes=sum(tensor.nbytes for tensor in stored.values())) as folder:
        if isinstance(mixture, Source):
            copy_companions(mixture.folder, folder)
        path = folder / GGUF_NAME
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
        _add_settings(writer, gguf, config)
        _add_vocabulary(writer, gguf, folder, config.vocab_size)
        types = {}
        for name, tensor in converted(stored.__getitem__):
            types[name] = kind = _type_of(gguf, name, tensor)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            writer.add_tensor_info(
                name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in converted(read):
            writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), types[name]))
        writer.close()
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name, tensor in converted(read):
            values = gguf.quants.dequantize(written.pop(name).data, types[name])
            if not np.array_equal(values.reshape(tensor.shape), tensor.float().numpy(), equal_nan=True):
                raise OSError(f"`{name}` of `{output}` is not what was written. Check the disk, and run it again.")


def _split(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if name.endswith("experts.gate_up_proj"):
        for part, matrix in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
            yield name.replace("gate_up_proj", f"{part}.weight"), matrix
    else:
        yield name if name.endswith(".weight") else f"{name}.weight", tensor


def _rope_factors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What each frequency of a Llama 3.1 rotary embedding is divided by."""
    if config.rope_parameters["rope_type"] == "llama3":
        dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
        plain = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        yield "rope_freqs.weight", plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]


def _type_of(gguf: Any, name: str, tensor: torch.Tensor) -> Any:
    types = gguf.GGMLQuantizationType
    if tensor.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
        return types.F32
    return {torch.float16: types.F16, torch.bfloat16: types.BF16}.get(tensor.dtype, types.F32)


def _add_settings(writer: Any, gguf: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_vocabulary(writer: Any, gguf: Any, folder: Path, vocab_size: int) -> None:
    """The tokenizer in `folder`: a byte-level BPE that llama.cpp knows, or Llama 2's."""
    tokenizer = read_json(folder / "tokenizer.json", optional=True)
    if not tokenizer:
        logger.warning("The mixture has no tokenizer.json, so that model.gguf has no vocabulary: it takes token ids.")
        writer.add_tokenizer_model("none")
        return
    model, loaded = tokenizer["model"], AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts, types = _tokens(gguf, loaded, vocab_size)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(loaded.tokenize("a")[0].startswith("▁"))
        writer.add_token_scores([-float(place) for place in range(vocab_size)])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer)


def _tokens(gguf: Any, tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    texts, types = [], []
    known, added = {place: text for text, place in tokenizer.get_vocab().items()}, tokenizer.added_tokens_decoder
    for place in range(vocab_size):
        texts.append(known.get(place, f"[PAD{place}]"))
        if place not in known:
            types.append(gguf.TokenType.UNUSED)
        elif place in added:
            types.append(gguf.TokenType.CONTROL if added[place].special else gguf.TokenType.USER_DEFINED)
        elif len(texts[-1]) == 6 and texts[-1].startswith("<0x"):
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.NORMAL)
    return texts, types


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    if tokenizer["model"]["type"] == "BPE" and steps[-1].get("type") == "ByteLevel":
        if not patterns and steps[-1].get("use_regex", True):
            return "gpt-2"
        if len(patterns) == 1 and patterns[0] in _PRE_TOKENIZERS:
            return _PRE_TOKENIZERS[patterns[0]]
    raise ValueError(
        "This tokenizer has no counterpart in llama.cpp that is known here: a byte-level BPE split as Llama 3, Qwen 2 "
        "or GPT-2, or Llama 2's, can be written. Move tokenizer.json away to write model.gguf without a vocabulary."
    )
