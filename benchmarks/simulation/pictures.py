"""Plots of the benchmark of attacks, as PNG files for the documentation. They need matplotlib, of the `demo` extra."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.simulation.tally import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """One attack's excess loss, as a share of the loss of the honest alone."""

    attack: str
    volunteers: int
    excess: Interval


def plot_excess(found: Sequence[Excess], path: Path, *, target: float) -> None:
    """Write one line for each attack: the mean and two standard errors to either side, in per cent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 0.27 * len(found) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ordered = sorted(found, key=lambda one: one.excess.mean)
    for height, one in enumerate(ordered):
        axes.errorbar(
            100 * one.excess.mean,
            height,
            xerr=200 * one.excess.error if one.excess.n > 1 else None,
            fmt="o",
            markersize=4,
            color="tab:blue" if one.volunteers < _MANY else "tab:orange",
        )
    axes.set_yticks(range(len(ordered)), [f"{one.attack} ({one.volunteers})" for one in ordered], fontsize=8)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.axvline(100 * target, color="black", linestyle="--", linewidth=1)
    axes.set_xlabel("excess over the honest alone, per cent (mean, two standard errors)")
    axes.set_title("What hostile volunteers (3 of 8, 8 of 20) cost a run, by attack (volunteers)", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


_MANY = 20


def plot_curves(honest: Sequence[float], attacked: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write the held-out loss by checkpoint: of the honest alone, and of runs under attack."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(len(honest)), honest, color="black", linewidth=2, label="the honest alone")
    for attack, losses in attacked.items():
        axes.plot(range(len(losses)), losses, linewidth=1.2, label=attack)
    axes.set_yscale("log")
    axes.set_xlabel("checkpoint (rounds merged)")
    axes.set_ylabel("held-out velocity loss")
    axes.set_title("The worst attacks, 3 of 8 volunteers hostile (mean over seeds)", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
