"""Loss against samples, against bytes and against time, of this project's way of training and of others'.

Every method trains the same model of 0.08 million parameters on the same pictures, none of which it sees twice, with a
learning rate and an outer momentum of its own. Each run is one file in `benchmarks/results/cells/convergence`, so that
a long measurement can be broken off and taken up again. `--table star` varies the inner steps of a round and the number
of volunteers around 30 and 8; `--table long` is 200 rounds of 100 steps.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from benchmarks.cells import Cells, say
from benchmarks.links import DOWN_BIT_S, UP_BIT_S
from benchmarks.optimisation.pictures import Curve, plot_curves
from benchmarks.optimisation.runs import CODEC, PATCH, Course, Name, play
from benchmarks.optimisation.samples import Shape
from benchmarks.plots import PICTURES
from benchmarks.report import RESULTS, Report

VERSION: Final = 1
"""Raise it to have everything measured again."""
PARAMETERS: Final = 2e9
"""Of the model for which bits become bytes and seconds."""
STEP_SECONDS: Final = 4.0
"""Of an inner step of such a model on a card at home; batches of some tens."""
STEPS: Final = 1200
"""Inner steps of each volunteer in the star: the rounds follow from the steps of a round."""
BATCH: Final = 4
PEERS: Final = 20
"""Whose deltas a member of Covenant-72B fetched each round (arXiv 2603.08163)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A method's learning rate and outer momentum, by the inner steps of a round.

    At 30 steps they are the best of a few trials on one seed, but for SparseLoCo's; elsewhere they are guesses from
    those.
    """

    lr: float
    momentum: Mapping[int, float]


TUNED: Final[Mapping[Name, Tuned]] = {
    "data-parallel": Tuned(lr=0.004, momentum={}),
    "diloco-fp32": Tuned(lr=0.008, momentum={10: 0.9, 30: 0.8, 100: 0.6, 300: 0.3}),
    "diloco-int8": Tuned(lr=0.008, momentum={10: 0.9, 30: 0.8, 100: 0.6, 300: 0.3}),
    "sparseloco": Tuned(lr=0.004, momentum={}),
    "ours": Tuned(lr=0.006, momentum={10: 0.9, 30: 0.8, 100: 0.6, 300: 0.3}),
    "ours-fp32": Tuned(lr=0.006, momentum={10: 0.9, 30: 0.8, 100: 0.6, 300: 0.3}),
}
LONG_MOMENTUM: Final = 0.9
LABELS: Final[Mapping[str, str]] = {
    "data-parallel": "data-parallel, bf16 gradients",
    "diloco-fp32": "DiLoCo, fp32, private state",
    "diloco-int8": "INTELLECT-1-like, int8",
    "sparseloco": "SparseLoCo-like, top 1.6 %",
    "ours": "this project",
    "ours-fp32": "this project, without codecs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    seeds: int
    steps: int
    inner: tuple[int, ...]
    volunteers: tuple[int, ...]
    long_rounds: int


FULL: Final = Size(seeds=3, steps=STEPS, inner=(10, 30, 100, 300), volunteers=(1, 4, 16), long_rounds=200)
QUICK: Final = Size(seeds=1, steps=4, inner=(2,), volunteers=(1,), long_rounds=2)


class Bench:
    """Plays courses, as many at once as the pool has processes, and keeps what came of each."""

    def __init__(self, pool: ProcessPoolExecutor, folder: Path | None) -> None:
        self._pool = pool
        self._folder = folder

    def play(self, courses: Iterable[Course]) -> dict[Course, Mapping[str, Any]]:
        """Return each course's outcome."""
        running = {course: self._pool.submit(_cell, course, self._folder) for course in dict.fromkeys(courses)}
        return {course: future.result() for course, future in running.items()}


def _cell(course: Course, folder: Path | None) -> Mapping[str, Any]:
    key = hashlib.sha256(repr((VERSION, course, CODEC, PATCH)).encode()).hexdigest()
    found: Mapping[str, Any] = Cells(folder).get(key[:24], key, partial(play, course))
    say(f"{course.method} H={course.shape.steps} V={course.shape.volunteers} seed {course.seed}: {final(found):.4f}")
    return found


def final(found: Mapping[str, Any]) -> float:
    """Return the held-out loss at a run's end."""
    return float(found["losses"][-1][1])


def course_of(method: Name, seed: int, inner: int, volunteers: int, steps: int) -> Course:
    """Return a course of the star."""
    tuned = TUNED[method]
    nearest = min(tuned.momentum, key=lambda known: abs(math.log(known / inner)), default=None)
    return Course(
        method=method,
        seed=seed,
        shape=Shape(volunteers=volunteers, steps=inner, batch=BATCH),
        rounds=max(1, steps // inner),
        lr=tuned.lr,
        momentum=0.0 if nearest is None else tuned.momentum[nearest],
    )


def measure_star(bench: Bench, report: Report, size: Size) -> dict[tuple[Name, int, int], list[Mapping[str, Any]]]:
    """Fill the table of the star; return every run by method, inner steps and volunteers."""
    middle = 30 if 30 in size.inner else size.inner[0]
    places: list[tuple[Name, int, int]] = [("data-parallel", middle, 8)]
    places += [
        (method, inner, 8) for method in ("diloco-fp32", "diloco-int8", "sparseloco", "ours") for inner in size.inner
    ]
    places += [(method, middle, volunteers) for method in ("diloco-fp32", "ours") for volunteers in size.volunteers]
    places += [("ours-fp32", middle, 8)]
    wanted = {
        place: [course_of(place[0], seed, place[1], place[2], size.steps) for seed in range(size.seeds)]
        for place in places
    }
    played = bench.play(course for courses in wanted.values() for course in courses)
    runs = {place: [played[course] for course in courses] for place, courses in wanted.items()}
    for (method, inner, volunteers), found in runs.items():
        losses = [final(run) for run in found]
        up, down, hours = _traffic(method, found[0], inner, size.steps // inner)
        report.add_row(
            method=LABELS[method],
            seeds=size.seeds,
            inner_steps=inner,
            volunteers=volunteers,
            rounds=size.steps // inner,
            outer_momentum=course_of(method, 0, inner, volunteers, size.steps).momentum,
            loss=_mean(losses),
            spread=_spread(losses),
            up_bits_a_round=found[0]["up"],
            down_bits_a_round=found[0]["down"],
            GB_in_all=(up + down) / 1e9,
            hours=hours,
        )
    return runs


def _traffic(method: Name, run: Mapping[str, Any], inner: int, rounds: int) -> tuple[float, float, float]:
    """Return bytes up and down of a run of 2 billion parameters, and its hours when nothing overlaps."""
    up, down = (run[way] * PARAMETERS * rounds / 8 for way in ("up", "down"))
    if method == "sparseloco":
        down = run["up"] * PEERS * PARAMETERS * rounds / 8
    seconds = inner * rounds * STEP_SECONDS + 8 * up / UP_BIT_S + 8 * down / DOWN_BIT_S
    return up, down, seconds / 3600


def judge_star(report: Report, runs: Mapping[tuple[Name, int, int], Sequence[Mapping[str, Any]]], size: Size) -> None:
    """Hold the star to what is claimed of it."""
    middle = 30 if 30 in size.inner else size.inner[0]
    ours, theirs, peers = (
        runs[place] for place in (("ours", middle, 8), ("diloco-fp32", middle, 8), ("sparseloco", middle, 8))
    )
    excess = _mean([final(a) / final(b) - 1.0 for a, b in zip(ours, theirs, strict=True)])
    report.add_target(
        f"loss over fp32 DiLoCo with private AdamW state at equal samples, H={middle}, 8 volunteers",
        target="at most 0 %",
        value=100 * excess,
        met=excess <= 0.0,
    )
    ratio = peers[0]["up"] * (1 + PEERS) / (ours[0]["up"] + ours[0]["down"])
    report.add_target(
        f"total bytes of SparseLoCo with {PEERS} peers over ours, at equal H",
        target="at least 1.9",
        value=ratio,
        met=ratio >= 1.9,
    )
    better = _share_of_bytes_where_ours_is_lowest(runs)
    report.add_target(
        "share of total bytes, over two decades, at which no other method has a lower loss at its best H",
        target="1",
        value=better,
        met=better >= 1.0,
    )


def _share_of_bytes_where_ours_is_lowest(
    runs: Mapping[tuple[Name, int, int], Sequence[Mapping[str, Any]]],
) -> float:
    """Walk over two decades of total bytes, up to what our finest H spends, and compare the lowest losses there."""
    points = {method: _points(method, runs) for method in ("diloco-fp32", "diloco-int8", "sparseloco", "ours")}
    points["data-parallel"] = _points("data-parallel", runs)
    most = max(spent for spent, _ in points["ours"])
    won = []
    for place in range(21):
        budget = most * 10 ** (-2 * place / 20)
        lowest = {
            method: min((loss for spent, loss in found if spent <= budget), default=math.inf)
            for method, found in points.items()
        }
        if lowest["ours"] < math.inf:
            won.append(lowest["ours"] <= min(lowest.values()))
    return sum(won) / len(won) if won else 0.0


def _points(
    method: str, runs: Mapping[tuple[Name, int, int], Sequence[Mapping[str, Any]]]
) -> list[tuple[float, float]]:
    """Return (total bytes, mean loss) at every measured moment of a method's runs with 8 volunteers, whatever its H."""
    found = []
    for (name, inner, volunteers), seeds in runs.items():
        if name == method and volunteers == 8:
            for moment, (number, _) in enumerate(seeds[0]["losses"]):
                up, down, _ = _traffic(name, seeds[0], inner, number)
                found.append((up + down, _mean([run["losses"][moment][1] for run in seeds])))
    return found


def draw_star(runs: Mapping[tuple[Name, int, int], Sequence[Mapping[str, Any]]], size: Size, path: Path) -> None:
    """Draw loss against samples, bytes and time."""
    middle = 30 if 30 in size.inner else size.inner[0]
    panels: dict[str, list[Curve]] = {"samples": [], "gigabytes": [], "hours": []}
    for name in ("data-parallel", "diloco-fp32", "diloco-int8", "sparseloco", "ours"):
        method: Name = name
        seeds = runs[(method, middle, 8)]
        rounds = [number for number, _ in seeds[0]["losses"]]
        losses = [_mean([run["losses"][place][1] for run in seeds]) for place in range(len(rounds))]
        spreads = [_spread([run["losses"][place][1] for run in seeds]) for place in range(len(rounds))]
        traffic = [_traffic(method, seeds[0], middle, number) for number in rounds]
        across = {
            "samples": [float(number * middle * 8 * BATCH) for number in rounds],
            "gigabytes": [(up + down) / 1e9 for up, down, _ in traffic],
            "hours": [hours for _, _, hours in traffic],
        }
        for axis, values in across.items():
            panels[axis].append(Curve(label=LABELS[method], x=values, loss=losses, spread=spreads))
    plot_curves(panels, path)


def measure_long(bench: Bench, report: Report, size: Size) -> None:
    """Fill the table of the long run: 100 inner steps, 8 volunteers, 200 rounds, one seed."""
    shape = Shape(volunteers=8, steps=100 if size.long_rounds > 2 else 2, batch=BATCH)
    methods: tuple[Name, ...] = ("data-parallel", "diloco-fp32", "ours")
    courses = {
        method: replace(
            course_of(method, 0, shape.steps, 8, shape.steps),
            shape=shape,
            rounds=size.long_rounds,
            momentum=0.0 if method == "data-parallel" else LONG_MOMENTUM,
        )
        for method in methods
    }
    played = bench.play(courses.values())
    for method, course in courses.items():
        run = played[course]
        up, down, hours = _traffic(method, run, shape.steps, size.long_rounds)
        report.add_row(
            method=LABELS[method],
            loss=final(run),
            half_way=float(run["losses"][len(run["losses"]) // 2][1]),
            over_data_parallel=final(run) / final(played[courses["data-parallel"]]) - 1.0,
            GB_in_all=(up + down) / 1e9,
            hours=hours,
        )
    ours, parallel, private = (final(played[courses[m]]) for m in ("ours", "data-parallel", "diloco-fp32"))
    report.add_target(
        "loss over data-parallel at equal samples, long run",
        target="at most 2 %",
        value=100 * (ours / parallel - 1),
        met=ours <= 1.02 * parallel,
    )
    report.add_target(
        "loss over fp32 DiLoCo with private AdamW state at equal samples, long run",
        target="at most 0 %",
        value=100 * (ours / private - 1),
        met=ours <= private,
    )


def _size(arguments: argparse.Namespace) -> Size:
    return replace(FULL, seeds=arguments.seeds, inner=tuple(arguments.inner), volunteers=tuple(arguments.volunteers))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; 0 of one value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def main() -> int:
    """Run the benchmark; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds of everything; write nothing")
    parser.add_argument("--table", choices=("star", "long"), action="append", help="only these")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--seeds", type=int, default=FULL.seeds, help="of each run of the star")
    parser.add_argument("--inner", type=int, nargs="*", default=FULL.inner, help="inner steps of the star")
    parser.add_argument("--volunteers", type=int, nargs="*", default=FULL.volunteers, help="beside 8")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else _size(arguments)
    folder = None if arguments.quick else RESULTS / "cells" / "convergence"
    met = True
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        bench = Bench(pool, folder)
        for table in arguments.table or ("star", "long"):
            report = Report(name=f"convergence_{table}")
            if table == "star":
                runs = measure_star(bench, report, size)
                judge_star(report, runs, size)
                if not arguments.quick:
                    draw_star(runs, size, PICTURES / "convergence.png")
            else:
                measure_long(bench, report, size)
            met = report.finish(quick=arguments.quick) and met
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
