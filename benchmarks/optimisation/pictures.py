"""Curves of loss, as a PNG file for the documentation. It needs matplotlib, which the `demo` extra brings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_AXES: Final = {
    "samples": "samples",
    "gigabytes": "GB up and down for each volunteer, 2 billion parameters",
    "hours": "hours at 20 Mbit/s up, 100 down, nothing overlapping",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Mean held-out loss over something, with its standard deviation over seeds."""

    label: str
    x: Sequence[float]
    loss: Sequence[float]
    spread: Sequence[float]


def plot_curves(panels: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Write a panel for each axis, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (axis, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for curve in curves:
            (line,) = axes.plot(curve.x, curve.loss, label=curve.label, linewidth=1.4)
            low = [loss - spread for loss, spread in zip(curve.loss, curve.spread, strict=True)]
            high = [loss + spread for loss, spread in zip(curve.loss, curve.spread, strict=True)]
            axes.fill_between(curve.x, low, high, alpha=0.2, color=line.get_color())
        if axis != "samples":
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(_AXES[axis])
        axes.set_ylabel("held-out loss")
        axes.grid(alpha=0.3, which="both")
        if place == 1:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
