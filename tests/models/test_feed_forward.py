"""Feed-forwards are found by their structure."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from hf_sparse_moe.models import feed_forward
from hf_sparse_moe.models.feed_forward import find_feed_forwards, list_feed_forward_layouts
from tiny_models import ARCHITECTURES, tiny_dense


LAYOUTS = {
    "gate_up_down": "llama qwen2 qwen3 mistral gemma2 gemma3_text olmo2 smollm3 eurobert t5gemma",
    "packed_gate_up": "phi3",
    "packed_wi_wo": "modernbert",
    "wi_wo": "t5",
    "wi_0_wi_1_wo": "t5_gated mt5",
    "c_fc_c_proj": "gpt2 starcoder2",
    "dense_4h": "gpt_neox falcon",
    "lin1_lin2": "distilbert",
    "inline_fc1_fc2": "opt bart mbart marian pegasus m2m_100",
    "split_intermediate_output": "bert roberta xlm_roberta electra deberta_v2",
}
EXPECTED = [(name, layout) for layout, names in LAYOUTS.items() for name in names.split()]


def test_the_table_names_every_architecture():
    assert {name for name, _ in EXPECTED} == set(ARCHITECTURES)
    assert set(LAYOUTS) <= set(list_feed_forward_layouts())


@pytest.mark.parametrize(("name", "layout"), EXPECTED)
def test_layout_of_an_architecture(name, layout):
    dense = tiny_dense(name)
    found = find_feed_forwards(dense)
    assert {feed_forward.layout.name for feed_forward in found} == {layout}
    assert len(found) == 2 * (1 + dense.config.is_encoder_decoder)
    assert {(item.hidden_size, item.intermediate_size) for item in found} == {(32, 48)}
    assert len({item.block_path for item in found}) == len(found)


class Unlike(nn.Module):
    """Has the names of a gated feed-forward, but its shapes or its extra part make it none."""

    def __init__(self, up: int, extra: bool):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, up)
        self.down_proj = nn.Linear(16, 8)
        self.act_fn = ACT2FN["silu"]
        if extra:
            self.norm = nn.LayerNorm(16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@pytest.mark.parametrize(("up", "extra"), [(12, False), (16, True)], ids=["shapes", "a part that would be lost"])
def test_the_right_names_are_not_enough(up, extra):
    with pytest.raises(ValueError, match="no feed-forward of a known layout"):
        find_feed_forwards(Unlike(up, extra))
    assert len(find_feed_forwards(Unlike(16, False))) == 1


def test_modules_without_a_first_projection_are_not_examined(monkeypatch):
    """Else finding the feed-forwards costs as much as converting them."""
    dense = tiny_dense("llama")
    examined = []
    differences = feed_forward._differences
    monkeypatch.setattr(feed_forward, "_differences", lambda *args: examined.append(args) or differences(*args))
    found = find_feed_forwards(dense)
    modules = {module for module, _ in examined if not isinstance(module, nn.ModuleList)}  # whose children are numbers
    assert modules == {site.owner for site in found}
