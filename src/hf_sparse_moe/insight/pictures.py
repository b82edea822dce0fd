"""Which expert served which group, as a picture and on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from hf_sparse_moe.routing.statistics import LayerRouting, RoutingStatistics


if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS = 6
# Colours that stay apart for colour-blind readers (Okabe and Ito), then a second round in lighter tones.
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#7A9CC6", "#B7D7A8",
)  # fmt: skip
INK, FAINT = "#222222", "#8A8A8A"


def plot_expert_load(statistics: RoutingStatistics, path: str | Path, title: str | None = None) -> Path:
    """
    Draw, for up to six layers from first to last: left, each expert's share of the load, coloured by the groups that
    it served; right, where each group's tokens went.

    Args:
        statistics ([`RoutingStatistics`]): What [`routing_statistics`] found.
        path (`str` or `Path`): The file to write; its suffix (`.png`, `.svg`, `.pdf`) is the format.
        title (`str`, *optional*): The headline.

    Returns:
        `Path`: the file.

    Raises:
        ImportError: matplotlib is missing; it is in the extra `report`.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf-sparse-moe[report]'.") from error

    layers = [statistics.layers[place] for place in spread(len(statistics.layers), MAX_LAYERS)]
    groups, experts = statistics.groups, statistics.num_experts
    row_height = max(1.75, 0.24 * len(groups) + 0.75)
    height = row_height * len(layers) + 1.8
    # `Figure` without pyplot: no window, no global state, no backend to choose.
    figure = Figure(figsize=(12, height), facecolor="white")
    axes = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(1, 1.15))
    around = {"left": 0.07, "right": 0.985, "top": 1 - 1.2 / height, "bottom": 0.92 / height}
    figure.subplots_adjust(**around, wspace=0.27, hspace=0.6 / (row_height - 0.6))
    highest = max(layer.group_load.max().item() for layer in layers)
    tallest = max(layer.load.max().item() for layer in layers)
    for (left, right), layer in zip(axes, layers, strict=True):
        _draw_load(left, layer, tallest)
        _draw_groups(right, layer, highest)
    for axis in axes[-1]:
        axis.set_xlabel("expert", color=INK)
    figure.text(
        0.012, 1 - 0.36 / height, title or "Which expert served which group", fontsize=17, weight="bold", color=INK
    )
    figure.text(
        0.012, 1 - 0.66 / height,
        f"top {statistics.num_experts_per_tok} of {experts} experts · left: share of all tokens' choices an expert "
        "(dashed: even) · right: where each group's choices went, in percent",
        fontsize=10, color=FAINT,
    )  # fmt: skip
    if len(groups) > 1:
        handles = [Patch(color=_colour(place), label=group) for place, group in enumerate(groups)]
        figure.legend(handles=handles, loc="lower left", ncols=min(6, len(groups)), frameon=False, fontsize=9)
    path = Path(path)
    figure.savefig(path, dpi=130)
    return path


def expert_load_table(layer: LayerRouting) -> Table:
    """One layer's heat map for a terminal: groups by experts, percent of a group's choices."""
    table = Table(title=_layer_name(layer), title_justify="left", title_style="bold", box=None, padding=(0, 0))
    table.add_column("", justify="right")
    experts = layer.counts.shape[1]
    for expert in range(experts):
        table.add_column(f"{expert}", justify="center")
    highest = max(layer.group_load.max().item(), 2 / experts)
    for group, shares in zip(layer.groups, layer.group_load.tolist(), strict=True):
        table.add_row(f"{group} ", *(_heat(share, share / highest) for share in shares))
    return table


def _heat(share: float, heat: float) -> Text:
    # From the terminal's dark to a warm yellow; the text flips where the ground gets light.
    low, high = (24, 32, 56), (255, 196, 60)
    red, green, blue = (round(a + (b - a) * heat) for a, b in zip(low, high, strict=True))
    ink = "black" if heat > 0.55 else "white"
    return Text(f"{100 * share:4.0f} ", style=f"{ink} on rgb({red},{green},{blue})")


def _draw_load(axis: Axes, layer: LayerRouting, tallest: float) -> None:
    experts = layer.counts.shape[1]
    parts = (layer.counts / layer.counts.sum().clamp(min=1)).tolist()
    bottom = [0.0] * experts
    for place, part in enumerate(parts):
        axis.bar(range(experts), part, 0.78, bottom=bottom, color=_colour(place), linewidth=0)
        bottom = [low + more for low, more in zip(bottom, part, strict=True)]
    axis.axhline(1 / experts, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    unused = len(layer.dead_experts) or "none"
    title = f"{_layer_name(layer)} · busiest {1 + layer.max_violation:.1f}x the mean · {unused} unused"
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlim(-0.6, experts - 0.4)
    axis.set_ylim(0, 1.12 * max(tallest, 1 / experts))
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    _expert_ticks(axis, experts)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=FAINT, labelsize=8)


def _draw_groups(axis: Axes, layer: LayerRouting, highest: float) -> None:
    shares = layer.group_load.tolist()
    experts = layer.counts.shape[1]
    axis.imshow(shares, aspect="auto", cmap="YlGnBu", vmin=0, vmax=highest)
    if experts <= 16:
        for row, values in enumerate(shares):
            for column, share in enumerate(values):
                ink = "white" if share > 0.6 * highest else INK
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_yticks(range(len(layer.groups)), layer.groups)
    _expert_ticks(axis, experts)
    if len(layer.groups) > 1:
        axis.set_title(
            f"group and expert share {layer.mutual_information:.0%} of their information",
            loc="left", fontsize=10, color=INK,
        )  # fmt: skip
    axis.tick_params(colors=INK, labelsize=8.5, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _expert_ticks(axis: Axes, experts: int) -> None:
    axis.set_xticks(range(0, experts, max(1, experts // 16)))


def _layer_name(layer: LayerRouting) -> str:
    return f"{layer.side} layer {layer.position}"


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, the first and the last among them, evenly apart."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})
