"""`verify` holds what was pruned, merged or made dense against its source."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_client import run_cli
from hf_sparse_moe.models.pretrained_model import RECEIPT_NAME
from hf_sparse_moe.surgery import measure_experts, merge_experts, prune_experts, to_dense
from hf_sparse_moe.upcycling import verify
from routing.test_mixture_layers import build, inputs_of
from tiny_models import enlarge_weights, tiny_inputs, tiny_sparse


OPERATIONS = {
    "pruned": lambda source, measured, output: prune_experts(source, measured, 3, output=output),
    "merged": lambda source, measured, output: merge_experts(source, measured, 3, output=output),
    "to_dense": lambda source, measured, output: to_dense(source, output=output),
}
WORDS = {"pruned": "without the experts", "merged": "experts merged", "to_dense": "but for the feed-forwards"}


@pytest.fixture
def made(request, tmp_path):
    """A mixture, and what one operation made of it."""
    model = enlarge_weights(tiny_sparse("llama"))
    model.save_pretrained(tmp_path / "source")
    measured = measure_experts(model, [tiny_inputs(model, batch=8, length=16)])
    OPERATIONS[request.param](tmp_path / "source", measured, tmp_path / "result")
    return request.param, tmp_path / "result", tmp_path / "source"


def change(folder, part, value):
    """Another value of the first tensor with this part in its name."""
    path = folder / "model.safetensors"
    state = load_file(path)
    key = next(name for name in state if part in name)
    state[key] = value(state[key])
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize("made", OPERATIONS, indirect=True)
def test_what_was_made_is_what_the_receipt_says(made):
    operation, result, source = made
    report = verify(result, source)
    assert report.passed, report.findings
    assert WORDS[operation] in report.verdict
    assert "have the hashes" in report.findings[-1]
    finished = run_cli("verify", result, "--against", source)
    assert finished.code == 0, finished
    assert WORDS[operation] in finished.out
    change(source, "norm", lambda tensor: tensor + 1)
    report = verify(result, source)
    assert not report.passed
    assert any("norm" in told for told in report.findings)
    assert "differs" in report.findings[-1]


@pytest.mark.parametrize("made", ["pruned", "merged"], indirect=True)
@pytest.mark.parametrize("part", ["experts.down_proj", "gate.weight"])
def test_other_experts_or_rows_are_told(made, part):
    _, result, source = made
    change(result, part, lambda tensor: tensor.flip(0))
    assert not verify(result, source).passed


@pytest.mark.parametrize("made", ["pruned", "merged"], indirect=True)
@pytest.mark.parametrize("value", [[0, 1], [0, 1, 9], [0, 1, 1], [[0], [1], [2]], "all", None])
def test_a_receipt_of_other_experts(made, value):
    operation, result, source = made
    receipt = json.loads((result / RECEIPT_NAME).read_text())
    chosen = receipt[operation]["groups" if operation == "merged" else "kept"]
    chosen[next(iter(chosen))] = value
    (result / RECEIPT_NAME).write_text(json.dumps(receipt))
    report = verify(result, source)
    assert not report.passed
    assert len(report.findings) == 2


@pytest.mark.parametrize("made", ["pruned"], indirect=True)
def test_the_last_of_several_operations_counts(made, tmp_path):
    _, result, source = made
    model = tiny_sparse("llama").from_pretrained(result)
    measured = measure_experts(model, [tiny_inputs(model, batch=8, length=16)])
    merge_experts(result, measured, 2, output=tmp_path / "merged", align=False)
    assert verify(tmp_path / "merged", result).operation == "merged"
    assert not verify(tmp_path / "merged", source).passed
    prune_experts(source, drop=[0], output=tmp_path / "once")
    prune_experts(tmp_path / "once", drop=[2], output=tmp_path / "twice")
    assert verify(tmp_path / "twice", tmp_path / "once").passed
    assert not verify(tmp_path / "twice", source).passed


@pytest.mark.parametrize("made", ["merged", "to_dense"], indirect=True)
def test_what_no_source_holds_is_held_against_its_hash(made):
    _, result, source = made
    change(result, "experts.down_proj" if "merged" in str(made) else "mlp.down_proj", lambda tensor: tensor * 1.001)
    report = verify(result, source)
    assert not report.passed
    assert any("not those that were written" in told for told in report.findings)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_stock_mixture(name, operation, tmp_path):
    torch.manual_seed(0)
    model = enlarge_weights(build(name)).eval()
    model.save_pretrained(tmp_path / "stock")
    if (name, operation) == ("deepseek_v3", "to_dense"):
        with pytest.raises(ValueError, match="no dense architecture has both"):
            to_dense(model, output=tmp_path / "result")
        return
    OPERATIONS[operation](tmp_path / "stock", measure_experts(model, [inputs_of(model)]), tmp_path / "result")
    report = verify(tmp_path / "result", tmp_path / "stock")
    assert report.passed, report.findings
    assert WORDS[operation] in report.verdict
    for part in ("mlp" if operation == "to_dense" else "experts.0", "norm"):
        change(tmp_path / "result", part, lambda tensor: tensor + 0.01)
        report = verify(tmp_path / "result", tmp_path / "stock")
        assert not report.passed
        finished = run_cli("verify", tmp_path / "result", "--against", tmp_path / "stock")
        assert (finished.code, "not verified" in finished.out) == (1, True), finished
