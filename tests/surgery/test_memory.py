"""From disk to disk no operation holds more than a few layers, of ours and of stock mixtures."""

import ctypes
import json
import sys

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_sparse_moe import expand, measure_experts, merge_experts, prune_experts, to_dense
from processes import in_processes, peak_bytes
from tiny_models import tiny_sparse


LAYERS = 12
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": LAYERS, "vocab_size": 99}
OPERATIONS = {
    "prune": lambda source, measured, output: prune_experts(source, measured, keep=6, output=output),
    "merge": lambda source, measured, output: merge_experts(source, measured, into=6, output=output),
    "to_dense": lambda source, measured, output: to_dense(source, measured, "merge", output=output),
    "expand": lambda source, measured, output: expand(source, 2, by=measured, output=output),
}


def save(folder, name: str, layers: int) -> int:
    """A mixture with its measurements beside it; returns its bytes."""
    sizes = {**SIZES, "num_hidden_layers": layers}
    if name == "ours":
        model = tiny_sparse("llama", dense_fields=sizes, num_experts=8)
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=8))
    model.eval().save_pretrained(folder)
    measure_experts(model, [{"input_ids": torch.arange(96).reshape(4, 24)}]).save(folder.with_suffix(".measured"))
    return sum(parameter.nbytes for parameter in model.parameters())


def tell_of_memory(folder, operation: str) -> None:
    ctypes.CDLL(None).mallopt(-3, 2**16)  # what is let go of goes back to the system at once
    torch.set_num_threads(1)

    def run(name: str) -> None:
        OPERATIONS[operation](folder / name, folder / f"{name}.measured", folder / f"{name}.{operation}")

    run("small")  # whatever is imported for it
    (folder / operation).write_text(json.dumps(peak_bytes(lambda: run("large"))))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["ours", "stock"])
def test_a_few_layers_are_in_memory(name, tmp_path):
    save(tmp_path / "small", name, 1)
    layer = save(tmp_path / "large", name, LAYERS) / LAYERS
    for operation in OPERATIONS:
        if name == "ours" or operation in ("prune", "merge"):
            assert in_processes(1, tell_of_memory, tmp_path, operation) == [0]
            peak = json.loads((tmp_path / operation).read_text())
            assert peak < 4 * layer, (operation, peak / layer)
