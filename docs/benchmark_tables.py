"""Tables of the benchmarks' results, from `benchmarks/results/*.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from docs.markdown import table

RESULTS: Final = Path(__file__).parent.parent / "benchmarks" / "results"


_CONVERGENCE: Final = "convergence_"


def benchmarks(results: Path = RESULTS) -> str:
    """Return every result but those of convergence: where and when it was measured, its targets, its rows."""
    return _results([path for path in sorted(results.glob("*.json")) if not path.name.startswith(_CONVERGENCE)])


def convergence(results: Path = RESULTS) -> str:
    """Return the results of `benchmarks.convergence`, which have a page of their own."""
    return _results(sorted(results.glob(f"{_CONVERGENCE}*.json")))


def _results(files: Sequence[Path]) -> str:
    if not files:
        return "\nNo results are recorded yet; `make bench` measures and records them.\n\n"
    return "".join(_result(json.loads(path.read_text(encoding="utf-8"))) for path in files)


def _result(result: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {_shown(value)}" for name, value in result["machine"].items() if value is not None)
    text = (
        f"\n### {result['name']}\n\n"
        f"Measured on {result['date']} at commit `{result['commit'][:12]}` (or with changes on top of it). "
        f"Machine: {machine}.\n"
    )
    if result["targets"]:
        text += table(
            ("target", "wanted", "measured", "met"),
            [(row["what"], row["target"], _shown(row["value"]), _shown(row["met"])) for row in result["targets"]],
        )
    if result["rows"]:
        columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
        text += table(columns, [[_shown(row.get(name)) for name in columns] for row in result["rows"]])
    return text.replace("\n\n\n", "\n\n")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)
