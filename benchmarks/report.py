"""What every benchmark shares: rows and targets, a table on the screen, and one result file.

A benchmark module makes a `Report`, adds rows and targets, and ends with `report.finish(quick=...)`. A full run writes
`benchmarks/results/NAME.json`; a quick one writes nothing.
"""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"

Cell = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A claim and what was measured: `what` is claimed, `target` says how much in words, `value` was measured."""

    what: str
    target: str
    value: float
    met: bool


@dataclass(slots=True, kw_only=True)
class Report:
    """The outcome of one benchmark.

    Args:
        name: the module's name; the result file is named after it.
        rows: one dict per measurement, all with the same keys.
        targets: what is claimed of them.
    """

    name: str
    rows: list[dict[str, Cell]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def add_row(self, **cells: Cell) -> None:
        """Add one measurement; the keywords are the columns."""
        self.rows.append(cells)

    def add_target(self, what: str, *, target: str, value: float, met: bool) -> None:
        """Add one claim with its measured value."""
        self.targets.append(Target(what=what, target=target, value=value, met=met))

    def finish(self, *, quick: bool) -> bool:
        """Print the tables, write the result file unless `quick`, and say whether every target was met."""
        console = Console()
        if self.rows:
            console.print(_table(self.name, self.rows))
        if self.targets:
            console.print(_table("targets", [asdict(target) for target in self.targets]))
        if quick:
            console.print("A quick run: nothing was written.")
        else:
            path = self._write()
            console.print(f"Written to {path.relative_to(RESULTS.parent.parent)}.")
        # A quick run says that a benchmark works, not how fast anything is: its few samples judge nothing.
        return quick or all(target.met for target in self.targets)

    def _write(self) -> Path:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        content = {
            "name": self.name,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit(),
            "machine": machine(),
            "rows": self.rows,
            "targets": [asdict(target) for target in self.targets],
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
        return path


def commit() -> str:
    """The commit that was measured, or "unknown" outside a repository with one."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def machine() -> dict[str, Cell]:
    """What the numbers depend on; nothing that names the machine or its owner."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table(title: str, rows: Sequence[dict[str, Cell]]) -> Table:
    table = Table(title=title)
    for column, cell in rows[0].items():
        table.add_column(column, justify="left" if isinstance(cell, str) else "right")
    for row in rows:
        table.add_row(*(_shown(cell) for cell in row.values()))
    return table


def _shown(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else str(cell)
