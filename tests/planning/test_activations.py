"""What `plan` says that autograd keeps is near what it keeps."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from hf_sparse_moe import SparseMoeDecoderConfig, SparseMoeDecoderForCausalLM
from hf_sparse_moe.planning import Layout, Workload, read_shape
from hf_sparse_moe.planning.formulas import activation_bytes


def kept_bytes(model, ids) -> int:
    """Bytes of the storages that the backward pass waits for, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config])
def test_activations(config_class, checkpointing):
    dense = config_class(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, attn_implementation="sdpa",
    )  # fmt: skip
    model = SparseMoeDecoderForCausalLM(SparseMoeDecoderConfig.from_dense(dense, num_experts=4)).bfloat16().train()
    model.set_experts_implementation("grouped_mm")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(0))
    shape = read_shape(model.config)

    def predicted(checkpointing: bool) -> float:
        workload = Workload(128, 4, "bfloat16", gradient_checkpointing=checkpointing)
        return activation_bytes(shape, Layout("ddp"), workload)

    # The peak has what a forward pass does not keep: the gradient of the logits, and a layer that is computed again.
    gradient, head = ids.numel() * shape.vocabulary * 4, ids.numel() * shape.vocabulary * 10
    layer = (predicted(False) - head) / shape.num_layers if checkpointing else 0
    assert predicted(checkpointing) - gradient - layer == pytest.approx(kept_bytes(model, ids), rel=0.25)
