"""The picture is drawn at a size a person can read, whatever the number of layers, experts and groups."""

import pytest
import torch
from rich.console import Console

from hf_sparse_moe.insight import expert_load_table, plot_expert_load
from hf_sparse_moe.insight.pictures import spread
from hf_sparse_moe.routing import LayerRouting, RoutingStatistics


def statistics(layers, groups, experts):
    names = tuple(f"group {group}" for group in range(groups))
    counts = [torch.randint(0, 50, (groups, experts)).double() for _ in range(layers)]
    return RoutingStatistics([LayerRouting("decoder", place, names, c) for place, c in enumerate(counts)], experts, 2)


@pytest.mark.parametrize(("layers", "groups", "experts"), [(1, 1, 2), (4, 4, 8), (28, 10, 64)])
def test_it_is_a_picture(layers, groups, experts, tmp_path):
    path = plot_expert_load(statistics(layers, groups, experts), tmp_path / "load.png", "A headline")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(path.read_bytes()[at : at + 4]) for at in (16, 20))
    assert width == 1560
    assert 300 < height < 3500


def test_first_and_last_layer_are_always_drawn():
    chosen = spread(28, 6)
    assert chosen[0] == 0
    assert chosen[-1] == 27
    assert len(set(chosen)) == 6
    assert spread(3, 6) == [0, 1, 2]


def test_terminal_table_shows_percent():
    layer = LayerRouting("encoder", 3, ("prose", "code"), torch.tensor([[3.0, 1.0], [0.0, 9.0]]))
    console = Console(width=60, no_color=True)
    with console.capture() as capture:
        console.print(expert_load_table(layer))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines == [["encoder", "layer", "3"], ["0", "1"], ["prose", "75", "25"], ["code", "0", "100"]]
