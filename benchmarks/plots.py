"""Plots of measurements, as PNG files for the documentation. They need matplotlib, which the `demo` extra brings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PICTURES = Path(__file__).parent.parent / "docs" / "images"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """One panel: what each threshold on a difference rejects and accepts wrongly, and where the default sits.

    honest, cheats: the measured differences, whose distributions the curves are.
    """

    title: str
    axis: str
    honest: Sequence[float]
    cheats: Sequence[float]
    default: float


def plot_thresholds(panels: Sequence[Thresholds], path: Path, *, columns: int) -> None:
    """Write the panels, `columns` in a row, as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.step(*_falling(panel.honest), where="post", label="honest pairs rejected")
        axes.step(*_rising(panel.cheats), where="post", label="cheats accepted")
        axes.axvline(panel.default, color="black", linestyle="--", linewidth=1, label="default tolerance")
        axes.set_xscale("log")
        axes.set_xlim(_FLOOR, 10)
        axes.set_xlabel(panel.axis)
        axes.set_ylabel("share")
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.3)
        if place == 1:
            axes.legend(fontsize=8, loc="center left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


_FLOOR = 1e-8
"""Differences of zero are drawn here, at the left edge."""


def _falling(values: Sequence[float]) -> tuple[list[float], list[float]]:
    ordered = sorted(max(value, _FLOOR) for value in values)
    return [_FLOOR, *ordered, 10.0], [1.0, *(1 - (i + 1) / len(ordered) for i in range(len(ordered))), 0.0]


def _rising(values: Sequence[float]) -> tuple[list[float], list[float]]:
    ordered = sorted(max(value, _FLOOR) for value in values)
    return [_FLOOR, *ordered, 10.0], [0.0, *((i + 1) / len(ordered) for i in range(len(ordered))), 1.0]
