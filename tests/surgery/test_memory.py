"""From disk to disk no operation holds more than a few layers, of ours and of stock mixtures."""

import ctypes
import json
import sys
from functools import partial

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from hf_sparse_moe import expand, measure_experts, merge_experts, prune_experts, to_dense
from processes import in_processes, peak_bytes
from tiny_models import tiny_sparse


LAYERS = 10
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": LAYERS, "vocab_size": 99}
OPERATIONS = {
    "prune": lambda source, measured, output: prune_experts(source, measured, keep=6, output=output),
    "merge": lambda source, measured, output: merge_experts(source, measured, into=7, output=output),
    "to_dense": lambda source, measured, output: to_dense(source, measured, output=output),
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


def tell_of_memory(folder, operations: list[str]) -> None:
    ctypes.CDLL(None).mallopt(-3, 2**16)  # what is let go of goes back to the system at once
    torch.set_num_threads(1)

    def run(operation: str, size: str) -> None:
        OPERATIONS[operation](folder / size, folder / f"{size}.measured", folder / f"{size}.{operation}")

    peaks = {}
    for operation in operations:
        run(operation, "small")  # whatever is imported for it
        peaks[operation] = peak_bytes(partial(run, operation, "large"))
    (folder / "peaks").write_text(json.dumps(peaks))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "operations"), [("ours", [*OPERATIONS]), ("stock", ["prune", "merge", "to_dense"])])
def test_a_few_layers_are_in_memory(name, operations, tmp_path):
    save(tmp_path / "small", name, 1)
    layer = save(tmp_path / "large", name, LAYERS) / LAYERS
    assert in_processes(1, tell_of_memory, tmp_path, operations) == [0]
    peaks = json.loads((tmp_path / "peaks").read_text())
    assert peaks.keys() == {*operations}
    assert max(peaks.values()) < 4 * layer, peaks
