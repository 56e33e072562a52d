"""Loss against samples, against bytes and against time, of this project's way of training and of others'.

Every method trains the same model of 0.08 million parameters on the same pictures, none of which it sees twice, with a
learning rate and an outer momentum of its own, tried out on the first seed. Each run is one file in
`benchmarks/results/cells/convergence`, so that a long measurement can be broken off and taken up again. `--table star`
varies the inner steps of a round and the number of volunteers around 30 and 8; `long` is 200 rounds of 100 steps, one
seed; `states`, `outer` and `inner` are the choices behind this project's way.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from benchmarks.links import DOWN_BIT_S, UP_BIT_S
from benchmarks.optimisation.bench import Bench, Outcome, final, mean, spread
from benchmarks.optimisation.choices import INNER, OUTER, STATES, lowest, measure_choices
from benchmarks.optimisation.pictures import Curve, plot_curves
from benchmarks.optimisation.runs import Course, Name
from benchmarks.optimisation.samples import Shape
from benchmarks.plots import PICTURES
from benchmarks.report import RESULTS, Report

PARAMETERS: Final = 2e9
"""Of the model for which bits become bytes and seconds."""
STEP_SECONDS: Final = 4.0
"""Of an inner step of such a model on a card at home; batches of some tens."""
STEPS: Final = 1200
"""Inner steps of each volunteer in the star: the rounds follow from the steps of a round."""
BATCH: Final = 4
PEERS: Final = 20
"""Whose deltas a member of Covenant-72B fetched each round (arXiv 2603.08163)."""


_MOMENTA: Final[Mapping[int, tuple[float, ...]]] = {
    10: (0.9, 0.8, 0.6),
    30: (0.8,),
    100: (0.6, 0.8, 0.3),
    300: (0.3, 0.6, 0.0),
}
"""Outer momenta that are tried in the star by inner steps; at 30 the one that was best of three in
`convergence_states` and `_outer`."""
_NO_MOMENTUM: Final = (0.0,)
_RATES: Final[Mapping[Name, tuple[float, ...]]] = {
    "data-parallel": (0.004, 0.006),
    "diloco-fp32": (0.006,),
    "diloco-int8": (0.006,),
    "sparseloco": (0.004, 0.008),
    "ours": (0.006,),
    "ours-fp32": (0.006,),
    "ours-codec": (0.006,),
    "ours-patch": (0.006,),
}
"""Learning rates that are tried in the star; where it is one, it is the best of `convergence_states` and `_outer`."""
_AS: Final[Mapping[Name, Name]] = {
    "diloco-int8": "diloco-fp32", "ours-fp32": "ours", "ours-codec": "ours", "ours-patch": "ours"
}  # fmt: skip
"""Methods that take the momentum that suits another."""
LONG_MOMENTA: Final = (0.8, 0.9)
"""Outer momenta among which the long run of a method is the one that ends lowest."""
LONG_SHARE: Final = 0.05
"""The share of itself to which the learning rate of the long run falls instead, if that ends lower."""
LABELS: Final[Mapping[str, str]] = {
    "data-parallel": "data-parallel, bf16 gradients",
    "diloco-fp32": "DiLoCo, fp32, private state",
    "diloco-int8": "INTELLECT-1-like, int8",
    "sparseloco": "SparseLoCo-like, top 1.6 %",
    "ours": "this project",
    "ours-fp32": "this project, without codecs",
    "ours-codec": "this project, only deltas coded",
    "ours-patch": "this project, only steps coded",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured."""

    seeds: int
    steps: int
    inner: tuple[int, ...]
    volunteers: tuple[int, ...]
    long_rounds: int

    @property
    def middle(self) -> int:
        """Inner steps of a round in the middle of the star."""
        return 30 if 30 in self.inner else self.inner[0]


FULL: Final = Size(seeds=3, steps=STEPS, inner=(10, 30, 100, 300), volunteers=(1, 4, 16), long_rounds=200)
QUICK: Final = Size(seeds=1, steps=4, inner=(2,), volunteers=(1,), long_rounds=2)


Place = tuple[Name, int, int]
"""A method, the inner steps of a round, and the volunteers."""


def _places(size: Size) -> list[Place]:
    places: list[Place] = [("data-parallel", size.middle, 8)]
    places += [
        (method, inner, 8) for method in ("diloco-fp32", "diloco-int8", "sparseloco", "ours") for inner in size.inner
    ]
    places += [
        (method, size.middle, volunteers) for method in ("diloco-fp32", "ours") for volunteers in size.volunteers
    ]
    places += [(method, size.middle, 8) for method in ("ours-fp32", "ours-codec", "ours-patch")]
    return places


def _tries(place: Place, steps: int) -> list[Course]:
    """Return the runs among which the first seed chooses the settings of a place."""
    method, inner, _ = place
    known = min(_MOMENTA, key=lambda number: abs(math.log(number / inner)))
    momenta = _NO_MOMENTUM if method in ("data-parallel", "sparseloco") else _MOMENTA[known]
    shape = Shape(volunteers=8, steps=inner, batch=BATCH)
    return [
        Course(method=method, seed=0, shape=shape, rounds=max(1, steps // inner), lr=lr, momentum=momentum)
        for lr in _RATES[method]
        for momentum in momenta
    ]


def _settled(bench: Bench, places: Sequence[Place], steps: int) -> dict[Place, Course]:
    """Return each place's course on the first seed, with the settings that suit its method and inner steps best."""
    tuned_at = {place: (_AS.get(place[0], place[0]), place[1]) for place in places}
    tries = {key: _tries((*key, 8), steps) for key in tuned_at.values()}
    best = lowest(bench, tries)
    return {
        place: replace(
            best[tuned_at[place]],
            method=place[0],
            shape=Shape(volunteers=place[2], steps=place[1], batch=BATCH),
        )
        for place in places
    }


def measure_star(bench: Bench, report: Report, size: Size) -> dict[Place, list[Outcome]]:
    """Fill the table of the star; return every run by method, inner steps and volunteers."""
    settled = _settled(bench, _places(size), size.steps)
    wanted = {place: [replace(course, seed=seed) for seed in range(size.seeds)] for place, course in settled.items()}
    played = bench.play(course for courses in wanted.values() for course in courses)
    runs = {place: [played[course] for course in courses] for place, courses in wanted.items()}
    for (method, inner, volunteers), found in runs.items():
        course = settled[(method, inner, volunteers)]
        losses = [final(run) for run in found]
        up, down, hours = _traffic(method, found[0], inner, course.rounds)
        report.add_row(
            method=LABELS[method],
            seeds=size.seeds,
            inner_steps=inner,
            volunteers=volunteers,
            rounds=course.rounds,
            lr=course.lr,
            outer_momentum=course.momentum,
            loss=mean(losses),
            spread=spread(losses),
            up_bits_a_round=found[0]["up"],
            down_bits_a_round=found[0]["down"],
            GB_in_all=(up + down) / 1e9,
            hours=hours,
        )
    return runs


def _traffic(method: Name, run: Outcome, inner: int, rounds: int) -> tuple[float, float, float]:
    """Return bytes up and down of a run of 2 billion parameters, and its hours when nothing overlaps."""
    up, down = (run[way] * PARAMETERS * rounds / 8 for way in ("up", "down"))
    if method == "sparseloco":
        down = run["up"] * PEERS * PARAMETERS * rounds / 8
    seconds = inner * rounds * STEP_SECONDS + 8 * up / UP_BIT_S + 8 * down / DOWN_BIT_S
    return up, down, seconds / 3600


def judge_star(report: Report, runs: Mapping[Place, Sequence[Outcome]], size: Size) -> None:
    """Hold the star to what is claimed of it."""
    middle = size.middle
    ours, theirs, peers = (
        runs[place] for place in (("ours", middle, 8), ("diloco-fp32", middle, 8), ("sparseloco", middle, 8))
    )
    excess = mean([final(a) / final(b) - 1.0 for a, b in zip(ours, theirs, strict=True)])
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
    runs: Mapping[Place, Sequence[Outcome]],
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


def _points(method: str, runs: Mapping[Place, Sequence[Outcome]]) -> list[tuple[float, float]]:
    """Return (total bytes, mean loss) at every measured moment of a method's runs with 8 volunteers, whatever its H."""
    found = []
    for (name, inner, volunteers), seeds in runs.items():
        if name == method and volunteers == 8:
            for moment, (number, _) in enumerate(seeds[0]["losses"]):
                up, down, _ = _traffic(name, seeds[0], inner, number)
                found.append((up + down, mean([run["losses"][moment][1] for run in seeds])))
    return found


def draw_star(runs: Mapping[Place, Sequence[Outcome]], size: Size, path: Path) -> None:
    """Draw loss against samples, bytes and time."""
    middle = size.middle
    panels: dict[str, list[Curve]] = {"samples": [], "gigabytes": [], "hours": []}
    for name in ("data-parallel", "diloco-fp32", "diloco-int8", "sparseloco", "ours"):
        method: Name = name
        seeds = runs[(method, middle, 8)]
        rounds = [number for number, _ in seeds[0]["losses"]]
        losses = [mean([run["losses"][place][1] for run in seeds]) for place in range(len(rounds))]
        spreads = [spread([run["losses"][place][1] for run in seeds]) for place in range(len(rounds))]
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
    tries = {
        method: [
            Course(
                method=method,
                seed=0,
                shape=shape,
                rounds=size.long_rounds,
                lr=_RATES[method][0],
                momentum=momentum,
            )
            for momentum in (_NO_MOMENTUM if method == "data-parallel" else LONG_MOMENTA)
        ]
        for method in methods
    }
    flat = lowest(bench, tries)
    courses = lowest(bench, {m: [course, replace(course, final_share=LONG_SHARE)] for m, course in flat.items()})
    played = bench.play(courses.values())
    for method, course in courses.items():
        run = played[course]
        up, down, hours = _traffic(method, run, shape.steps, size.long_rounds)
        report.add_row(
            method=LABELS[method],
            lr=course.lr,
            lr_final_share=course.final_share,
            outer_momentum=course.momentum,
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


_CHOICES: Final = {"states": STATES, "outer": OUTER, "inner": INNER}
TABLES: Final = (*_CHOICES, "star", "long")


def measure(table: str, bench: Bench, report: Report, size: Size, *, draw: bool) -> None:
    """Fill one of the tables."""
    if table == "star":
        runs = measure_star(bench, report, size)
        judge_star(report, runs, size)
        if draw:
            draw_star(runs, size, PICTURES / "convergence.png")
    elif table == "long":
        measure_long(bench, report, size)
    else:
        shape = Shape(volunteers=8, steps=size.middle, batch=BATCH)
        rounds = max(1, size.steps // size.middle)
        measure_choices(bench, report, _CHOICES[table], shape, rounds=rounds, seeds=size.seeds)


def _size(arguments: argparse.Namespace) -> Size:
    return replace(FULL, seeds=arguments.seeds, inner=tuple(arguments.inner), volunteers=tuple(arguments.volunteers))


def main() -> int:
    """Run the benchmark; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds of everything; write nothing")
    parser.add_argument("--table", choices=TABLES, action="append", help="only these")
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
        for table in arguments.table or TABLES:
            report = Report(name=f"convergence_{table}")
            measure(table, bench, report, size, draw=not arguments.quick)
            met = report.finish(quick=arguments.quick) and met
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
