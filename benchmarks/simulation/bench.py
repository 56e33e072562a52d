"""Cells of the benchmark of attacks: one simulated run each, kept on the disk, several measured at once."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.cells import Cells, say
from benchmarks.report import RESULTS
from benchmarks.simulation import scenes
from benchmarks.simulation.measured import HONEST_ODDS, REFUSED, Odds
from benchmarks.simulation.scenes import Crowd, default_verification, fingerprint

VERSION: Final = 4
"""Of what a cell holds and of the code that it measured; raise it to have everything measured again."""
MEASURED: Final = RESULTS / "verify_attacks.json"
"""Where `benchmarks.verify` leaves what replicas and referees find of each attack."""
HONEST_FLAGGED: Final = 1 / 2000
"""Share of honest deltas that `verify.screen` has audited; at most that was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One cell: its name, which of the functions below measures it, and that function's arguments."""

    name: str
    measure: str
    arguments: Mapping[str, Any]


def trained(memo: str, **arguments: Any) -> dict[str, Any]:
    """Measure a run with training."""
    return scenes.train(memo=Path(memo), **arguments).to_json()


def played(_memo: str, scene: str, seed: int, crowd: Crowd, odds: Mapping[str, Odds]) -> dict[str, Any]:
    """Measure a run of those who play the protocol."""
    return scenes.play(scenes.PROTOCOL[scene](), seed, crowd, odds).to_json()


def poisoned(_memo: str, record: int, count: int, seed: int, odds: Mapping[str, Odds]) -> dict[str, Any]:
    """Measure what poisoners with a record get in until all of them are caught."""
    players = scenes.poisoners(count, record=record)
    # Rounds for some hundred units each: nobody lasts that long.
    crowd = Crowd(honest=max(4, count // 2), units=2 * count, rounds=200, auditors=4)
    return scenes.play(players, seed, crowd, odds, until=scenes.all_caught).to_json()


_MEASURES: Final[Mapping[str, Callable[..., dict[str, Any]]]] = {
    "trained": trained,
    "played": played,
    "poisoned": poisoned,
}


class Bench:
    """Fills cells, as many at once as its pool has processes.

    Args:
        folder: where cells are kept; None keeps nothing.
        memo: where honest deltas are kept while the benchmark runs.
    """

    def __init__(self, pool: ProcessPoolExecutor, folder: Path | None, memo: Path) -> None:
        self._pool = pool
        self._folder = folder
        self._memo = memo

    def fill(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the jobs' cells by name."""
        running = {job.name: self._pool.submit(_fill, job, self._folder, str(self._memo)) for job in jobs}
        return {name: future.result() for name, future in running.items()}


def _fill(job: Job, folder: Path | None, memo: str) -> Any:
    key = fingerprint(VERSION, default_verification(), job.measure, *sorted(job.arguments.items()))
    cell = Cells(folder).get(job.name, key, partial(_MEASURES[job.measure], memo, **job.arguments))
    say(job.name)
    return cell


def measured_odds(path: Path = MEASURED) -> dict[str, Odds]:
    """Return what `benchmarks.verify` measured, as odds; without its results, replays and replicas find everything.

    Nothing is taken to stand out when it is weighed: only runs with training show that.
    """
    odds = {"honest": replace(HONEST_ODDS, stands_out=HONEST_FLAGGED), "nan": REFUSED, "huge": REFUSED}
    if path.exists():
        for row in json.loads(path.read_text())["rows"]:
            if row["precision"] == "fp32":
                odds[row["attack"]] = Odds(refuted=row["caught_by_referee"], disagrees=row["caught_by_replica"])
    return odds
