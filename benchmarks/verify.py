"""What the tolerances let through: honest replays on other arithmetic, every delta-shaping attack, and hidden poison.

    python -m benchmarks.verify [--quick]

Three tables. *verify*: replays of the same units with other instruction sets, thread counts, attention kernels and
batch splits, each compared with each as a referee would. *verify_attacks*: each attack of `verify.attacks` on real
units, against a referee's replay and against a replica's sketch. *verify_hidden*: how far the best hidden poison gets.
Every cell is kept in `benchmarks/results/cells/verify`, so that a run can be broken off and taken up again.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.cells import PRECISIONS, TRAINED_ROUNDS, Cells, Precision, Setting, say
from benchmarks.court import measure_attacks, measure_hidden
from benchmarks.plots import PICTURES, Thresholds, plot_thresholds
from benchmarks.report import RESULTS, Cell, Report
from verify.calibration import CHEATS
from verify.laboratory import Measured, Pair
from verify.tolerances import DEFAULT_TOLERANCES

CELLS: Final = RESULTS / "cells" / "verify"
PLOT: Final = PICTURES / "verify-thresholds.png"
COMPARISONS: Final = 2_000
RULE_OF_THREE: Final = 3.0
"""With 0 of n seen, 3 / n bounds the true rate with 95 % confidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured: units of each kind, and from which checkpoints honest units start."""

    precisions: tuple[Precision, ...]
    honest_units: Mapping[int, int]
    wide_units: int
    attack_units: int
    hidden_units: int


FULL: Final = Size(
    precisions=PRECISIONS,
    honest_units={0: 16, 1: 31, TRAINED_ROUNDS: 31},
    wide_units=3,
    attack_units=40,
    hidden_units=10,
)
QUICK: Final = Size(precisions=("fp32",), honest_units={0: 1}, wide_units=0, attack_units=1, hidden_units=1)


def honest_cell(setting: Setting, checkpoint: int, units: int, cells: Cells, name: str) -> list[Pair]:
    """Return all comparisons of some units of a setting; processes start only if something is not measured yet."""
    pairs: list[Pair] = []
    for index in range(units):
        measure = partial(_measure_unit, setting, checkpoint, index)
        cell = cells.get(f"honest-{name}-{checkpoint}-{index:02d}", setting.key, measure)
        measured = _measured(cell)
        pairs += measured.honest + measured.cheats
        say(f"{name} from checkpoint {checkpoint}: {index + 1}/{units}")
    return pairs


def _measure_unit(setting: Setting, checkpoint: int, index: int) -> dict[str, Any]:
    return asdict(setting.laboratory.measure(checkpoint + 1, index, setting.base_file(checkpoint), cheats=CHEATS))


def _measured(cell: Mapping[str, Any]) -> Measured:
    honest, cheats = (tuple(Pair(**pair) for pair in cell[name]) for name in ("honest", "cheats"))
    return Measured(round=cell["round"], index=cell["index"], honest=honest, cheats=cheats)


def measure_honest(folder: Path, size: Size, cells: Cells, report: Report) -> None:
    """Fill the first table and its targets, and draw the curves."""
    panels: list[Thresholds] = []
    for precision in size.precisions:
        tolerances = DEFAULT_TOLERANCES[precision]
        groups: dict[str, list[Pair]] = {}
        with ExitStack() as stack:
            setting = Setting(precision, folder / precision, stack)
            for checkpoint, units in size.honest_units.items():
                groups[f"checkpoint {checkpoint}"] = honest_cell(setting, checkpoint, units, cells, precision)
        with ExitStack() as stack:
            if size.wide_units:
                wide = Setting(precision, folder / f"{precision}-wide", stack, batch=128, steps=4)
                groups["checkpoint 1, batch 128"] = honest_cell(wide, 1, size.wide_units, cells, f"{precision}-wide")
        for name, pairs in groups.items():
            report.add_row(**honest_row(precision, name, pairs, *tolerances))
        everything = [pair for pairs in groups.values() for pair in pairs]
        _add_honest_targets(report, precision, everything, *tolerances)
        panels += _panels(precision, everything, *tolerances)
    if size.wide_units:
        with ExitStack() as stack:
            eager = Setting("bf16", folder / "bf16-eager", stack, eps=1e-8)
            pairs = honest_cell(eager, 1, size.wide_units, cells, "bf16-eager")
        report.add_row(**honest_row("bf16", "checkpoint 1, eps 1e-8", pairs, *DEFAULT_TOLERANCES["bf16"]))
        plot_thresholds(panels, PLOT, columns=2)


def honest_row(
    precision: str, name: str, pairs: Sequence[Pair], tolerance: float, code_tolerance: float
) -> dict[str, Cell]:
    """Return one line of the table: comparisons of honest results, and the nearest cheats beside them."""
    honest, cheats = _honest(pairs), _cheats(pairs)
    different = [pair for pair in honest if not pair.same_bits]
    return {
        "precision": precision,
        "units_from": name,
        "comparisons": len(different),
        "equal_bits_besides": len(honest) - len(different),
        "raw_max": max(pair.raw or 0.0 for pair in honest),
        "least_raw_max": max(pair.least_raw for pair in honest),
        "tolerance": tolerance,
        "cheats_least_raw_min": min(pair.least_raw for pair in cheats),
        "D_max": max(pair.code for pair in honest),
        "D_by_sketch_max": max(pair.sketched for pair in honest),
        "code_tolerance": code_tolerance,
        "cheats_D_min": min(pair.code for pair in cheats),
        "rejected": sum(_rejected(pair, tolerance, code_tolerance) for pair in different),
    }


def _add_honest_targets(
    report: Report, precision: str, pairs: Sequence[Pair], tolerance: float, code_tolerance: float
) -> None:
    different = [pair for pair in _honest(pairs) if not pair.same_bits]
    rejected = sum(_rejected(pair, tolerance, code_tolerance) for pair in different)
    report.add_target(
        f"honest comparisons in {precision}, results with the same bits not counted",
        target=f"at least {COMPARISONS:,}",
        value=len(different),
        met=len(different) >= COMPARISONS,
    )
    report.add_target(f"of them rejected ({precision})", target="0", value=rejected, met=rejected == 0)
    bound = RULE_OF_THREE / len(different)
    report.add_target(
        f"what 0 of so many proves ({precision}): true rate with 95 % confidence, were they independent",
        target=f"at most {RULE_OF_THREE / COMPARISONS:.4f}",
        value=bound,
        met=rejected == 0 and bound <= RULE_OF_THREE / COMPARISONS,
    )


def _honest(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.raw is not None]


def _cheats(pairs: Sequence[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.raw is None]


def _rejected(pair: Pair, tolerance: float, code_tolerance: float) -> bool:
    """By a referee, or by a replica's sketch, which would send the claim to a referee."""
    return pair.least_raw > tolerance or max(pair.code, pair.sketched) > code_tolerance


def _panels(precision: str, pairs: Sequence[Pair], tolerance: float, code_tolerance: float) -> Iterator[Thresholds]:
    different = [pair for pair in _honest(pairs) if not pair.same_bits]
    yield Thresholds(
        title=f"{precision}, judged by a referee",
        axis="least raw difference",
        honest=[pair.least_raw for pair in different],
        cheats=[pair.least_raw for pair in _cheats(pairs)],
        default=tolerance,
    )
    yield Thresholds(
        title=f"{precision}, judged by decoded codes",
        axis="D",
        honest=[pair.code for pair in different],
        cheats=[pair.code for pair in _cheats(pairs)],
        default=code_tolerance,
    )


def main() -> int:
    """Run the three measurements; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description="What the tolerances let through.")
    parser.add_argument("--quick", action="store_true", help="a unit of each; writes nothing")
    quick: bool = parser.parse_args().quick
    torch.set_num_threads(1)
    size, cells = (QUICK, Cells(None)) if quick else (FULL, Cells(CELLS))
    reports = [Report(name=name) for name in ("verify", "verify_attacks", "verify_hidden")]
    with tempfile.TemporaryDirectory() as name:
        honest, attacks, hidden = reports
        measure_honest(Path(name), size, cells, honest)
        measure_attacks(Path(name), size.precisions, size.attack_units, cells, attacks)
        measure_hidden(Path(name), size.precisions, size.hidden_units, cells, hidden)
    met = [report.finish(quick=quick) for report in reports]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
