"""The parts of a mixture add up to what the model counts."""

import pytest
from transformers import AutoModelForSequenceClassification

from hf_sparse_moe.insight.anatomy import describe_checkpoint, parameters_by_part
from hf_sparse_moe.models.size import count_parameters
from tiny_models import ARCHITECTURES, tiny_sparse


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_add_up(name):
    model = tiny_sparse(name, num_shared_experts=1)
    parts = parameters_by_part(model)
    assert parts["total"] == {"total": count_parameters(model), "active": count_parameters(model, only_active=True)}
    blocks = model.sparse_blocks
    assert parts["experts"]["total"] == sum(p.numel() for block in blocks for p in block.experts.parameters())
    assert parts["experts"]["active"] * 2 == parts["experts"]["total"]  # 2 of 4 experts
    assert parts["router"]["total"] == sum(p.numel() for block in blocks for p in block.gate.parameters())
    assert parts["shared experts"]["total"] == sum(
        p.numel() for block in blocks for p in block.shared_experts.parameters()
    )
    for part in ("embeddings and head", "attention", "rest"):
        assert parts[part]["total"] > 0


def test_llama_by_hand():
    parts = parameters_by_part(tiny_sparse("llama"))
    assert parts["embeddings and head"]["total"] == 2 * 96 * 32  # untied
    assert parts["attention"]["total"] == 2 * (32 * 32 * 2 + 32 * 16 * 2)  # q and o, k and v, in two layers
    assert parts["rest"]["total"] == 5 * 32  # norms


def test_the_checkpoints_own_head_is_described(tmp_path):
    tiny_sparse("bert", AutoModelForSequenceClassification).save_pretrained(tmp_path)
    description = describe_checkpoint(str(tmp_path))
    assert description.architecture == "SparseMoeEncoderForSequenceClassification"
    assert description.receipt is None
