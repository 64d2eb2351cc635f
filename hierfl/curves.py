"""A picture of how a model got better: accuracy and loss by round, beside what it is compared with.

Plain PNG through matplotlib's Agg canvas, without pyplot: no window, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "draw"]

INK, PALE, GRID = "#1f2933", "#7b8794", "#e4e7eb"
FEDERATED, POOLED = "#0b69a3", "#1f2933"
REGIONS: Final = ("#d9822b", "#2f8132", "#8e44ad", "#b03060", "#5f7c8a", "#a68a00")
DPI: Final = 150
LEGEND_COLUMNS: Final = 6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line in each panel; the value at index i is that after round i + 1."""

    accuracy: Sequence[float]
    """0 to 1."""
    loss: Sequence[float]


def draw(
    path: Path, title: str, federated: Curve, pooled: Curve | None = None, regions: Mapping[str, Curve] | None = None
) -> None:
    """Write the PNG.

    Args:
        path: Where to; its folder exists.
        title: A line above the panels.
        federated: The model of all regions.
        pooled: Training on all data in one place, if it was done.
        regions: Each region's own model, if they were made, by name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    left, right = figure.subplots(1, 2)
    for axes, name, percent in ((left, "accuracy", 100.0), (right, "loss", 1.0)):
        _panel(axes, name, len(federated.accuracy))
        for label, curve, style in _lines(federated, pooled, regions or {}):
            values = [percent * value for value in getattr(curve, name)]
            axes.plot(range(1, len(values) + 1), values, label=label, **style)
    left.set_ylabel("accuracy on held-out data, %", color=INK)
    right.set_ylabel("loss on held-out data", color=INK)
    right.set_ylim(bottom=0)
    handles, labels = left.get_legend_handles_labels()
    columns = min(len(labels), LEGEND_COLUMNS)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK)
    figure.savefig(path, format="png", metadata={"Software": None})  # the same picture, the same bytes


def _lines(
    federated: Curve, pooled: Curve | None, regions: Mapping[str, Curve]
) -> list[tuple[str, Curve, dict[str, Any]]]:
    """Label, curve and style, the most important one last so that it lies on top."""
    found: list[tuple[str, Curve, dict[str, Any]]] = [
        (f"{name} alone", curve, {"color": REGIONS[index % len(REGIONS)], "linewidth": 1.4, "alpha": 0.9})
        for index, (name, curve) in enumerate(regions.items())
    ]
    if pooled is not None:
        found.append(("pooled", pooled, {"color": POOLED, "linewidth": 1.6, "linestyle": (0, (5, 2))}))
    solid = {"color": FEDERATED, "linewidth": 2.6, "marker": "o", "markersize": 4.5, "markeredgecolor": "white"}
    return [*found, ("federated", federated, solid)]


def _panel(axes: Axes, name: str, num_rounds: int) -> None:
    """Bare axes: two spines, a faint grid, whole rounds only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(name, loc="left", fontsize=11, color=PALE)
    axes.set_xlabel("round", color=INK)
    axes.set_xlim(0.7, max(num_rounds, 2) + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=PALE, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
