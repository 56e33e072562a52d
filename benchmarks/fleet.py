"""How busy a fleet of unlike machines is, and whether any honest work is lost, on the real lifecycle code.

    python -m benchmarks.fleet [--quick] [--table NAME]

Volunteers with cards from an RTX 3060 to an RTX 4090 train a model of 2 billion parameters over home lines, leave in
the middle of units, and return hours later; the coordinator takes the time to weigh, merge and publish. *Busy* is the
share of the time in which a machine is there, and willing, that it trains a unit. Two tables. *fleet*: where the time
goes, by seed and by card, with the settings that are recommended. *fleet_settings*: what other settings do. What the
machines are like is assumed (`benchmarks.simulation.machines`); what they are told is not.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Final

from benchmarks.cells import say
from benchmarks.report import Report
from benchmarks.simulation.fleet import SETTLER, Fleet, Settings
from benchmarks.simulation.ledger import Account, Doing, Fate
from benchmarks.simulation.machines import TFLOPS
from benchmarks.simulation.scenes import memory_folder

BUSY: Final = 0.95
RECOMMENDED: Final = Settings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is played: volunteers, rounds, seeds; and rounds and seeds for each of the settings."""

    members: int
    rounds: int
    seeds: int
    setting_rounds: int
    setting_seeds: int
    settings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the second table: what is otherwise."""

    settings: Settings = RECOMMENDED
    more: Mapping[str, Any]


def _case(more: Mapping[str, Any] | None = None, **changes: Any) -> Case:
    return Case(settings=replace(RECOMMENDED, **changes), more=more or {})


CASES: Final[Mapping[str, Case]] = {
    "recommended": _case(),
    "64 units a round": _case(units=64),
    "128 units a round": _case(units=128),
    "min_units 128": _case(min_units=128),
    "window 1 h": _case(window_hours=1.0),
    "window 4 h, 384 units": _case(window_hours=4.0, units=384),
    "staleness bound 0": _case(staleness_bound=0),
    "staleness bound 1": _case(staleness_bound=1),
    "staleness bound 2": _case(staleness_bound=2),
    "staleness discount 0.7": _case(staleness_discount=0.7),
    "leases of 90 min": _case(lease_hours=1.5),
    "units of 20 min": _case(minutes=20.0, units=512),
    "a quarter of the units half as long": _case(short_share=0.25, units=288),
    "half of the units half as long": _case(short_share=0.5, units=344),
    "units of 90 min": _case(minutes=90.0, lease_hours=12.0),
    "settler four times slower": _case({"pace": replace(SETTLER, merge_ms=4 * SETTLER.merge_ms)}),
    "settler five times faster": _case({"pace": replace(SETTLER, merge_ms=SETTLER.merge_ms // 5)}),
    "no checkpoint ahead": _case({"ahead": False}),
    "no patches": _case({"patches": False}),
    "no patches, no checkpoint ahead": _case({"patches": False, "ahead": False}),
}
"""Otherwise as recommended."""

FULL: Final = Size(members=64, rounds=24, seeds=3, setting_rounds=5, setting_seeds=2, settings=tuple(CASES))
QUICK: Final = Size(
    members=28, rounds=4, seeds=1, setting_rounds=3, setting_seeds=1, settings=("recommended", "64 units a round")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A run that was played: its account, that of each kind of card, hours a round, and GB that all fetch an hour."""

    account: Account
    cards: Mapping[str, Account]
    hours_a_round: float
    served_gb_an_hour: float


def play(settings: Settings, seed: int, *, members: int, rounds: int, **more: Any) -> Played:
    """Play a fleet for some rounds."""
    with memory_folder() as folder:
        fleet = Fleet(settings, members=members, folder=folder, seed=f"fleet/{seed}".encode(), **more)
        fleet.play(rounds)
        played = Played(
            account=fleet.account(),
            cards={card: fleet.account(card) for card in TFLOPS},
            hours_a_round=fleet.hours / rounds,
            served_gb_an_hour=fleet.ledger.down_bytes / 1e9 / fleet.hours,
        )
        fleet.close()
    return played


def _where_it_went(account: Account) -> dict[str, float]:
    return {
        "busy": account.share(Doing.TRAINING),
        "starting": account.share(Doing.STARTING),
        "base": account.share(Doing.BASE),
        "shards": account.share(Doing.SHARDS),
        "changing_units": account.share(Doing.CHANGING),
        "no_unit": account.share(Doing.NO_UNIT, Doing.MERGING),
        "upload": account.share(Doing.UPLOAD),
        "limited": account.share(Doing.LIMITED),
    }


def _what_came_of_it(account: Account) -> dict[str, float | int]:
    return {
        "replicas": account.training(Fate.REPLICA),
        "lost_by_leaving": account.training(Fate.LEFT),
        "repeated": account.training(Fate.REPEATED),
        "units": account.units,
        "thrown_away": account.thrown_away,
    }


def measure_fleet(report: Report, size: Size) -> None:
    """Fill the table of where the time goes."""
    runs = []
    for seed in range(size.seeds):
        runs.append(play(RECOMMENDED, seed, members=size.members, rounds=size.rounds))
        say(f"seed {seed}")
    accounts = [run.account for run in runs]
    together: Account = reduce(add, accounts)
    who = {f"all, seed {seed}": account for seed, account in enumerate(accounts)}
    who |= {card: reduce(add, (run.cards[card] for run in runs)) for card in TFLOPS}
    for name, account in who.items():
        report.add_row(
            who=name, machine_hours=round(account.hours), **_where_it_went(account), **_what_came_of_it(account)
        )
    busy = min(account.share(Doing.TRAINING) for account in accounts)
    power = min(account.power for account in accounts)
    report.add_target(
        "share of their time that volunteers' machines train, the least of the seeds",
        target=f"at least {BUSY:.2f}",
        value=busy,
        met=busy >= BUSY,
    )
    report.add_target(
        "the same, each machine counted by its speed", target=f"at least {BUSY:.2f}", value=power, met=power >= BUSY
    )
    report.add_target(
        f"finished units of the honest that were thrown away, of {together.units:,}",
        target="0",
        value=together.thrown_away,
        met=together.thrown_away == 0,
    )


def measure_settings(report: Report, size: Size) -> None:
    """Fill the table of what other settings do."""
    for name in size.settings:
        case = CASES[name]
        runs = [
            play(case.settings, seed, members=size.members, rounds=size.setting_rounds, **case.more)
            for seed in range(size.setting_seeds)
        ]
        say(name)
        _add_setting(report, name, case.settings, runs)


def _add_setting(report: Report, name: str, settings: Settings, runs: Sequence[Played]) -> None:
    account: Account = reduce(add, (run.account for run in runs))
    where, came = _where_it_went(account), _what_came_of_it(account)
    discount = settings.staleness_discount
    report.add_row(
        settings=name,
        hours_a_round=sum(run.hours_a_round for run in runs) / len(runs),
        busy=where["busy"],
        by_speed=account.power,
        base=where["base"],
        no_unit=where["no_unit"],
        upload=where["upload"],
        in_time=account.late_share(0, 0),
        one_late=account.late_share(1, 1),
        later=account.late_share(2),
        units_an_hour=account.late.total() / 1000 / account.hours,
        by_discount=sum(count * discount**late for late, count in account.late.items()) / 1000 / account.hours,
        **came,
        why=", ".join(sorted(account.codes)) or None,
        served_gb_an_hour=sum(run.served_gb_an_hour for run in runs) / len(runs),
    )


TABLES: Final = ("fleet", "fleet_settings")


def main() -> int:
    """Run the benchmark; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(
        description="How busy a fleet of unlike machines is, and what of its work is lost."
    )
    parser.add_argument("--quick", action="store_true", help="a few short runs; writes nothing")
    parser.add_argument("--table", choices=TABLES, action="append", help="only this one; may be given several times")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    met = []
    for name in arguments.table or TABLES:
        report = Report(name=name)
        (measure_fleet if name == "fleet" else measure_settings)(report, QUICK if quick else FULL)
        met.append(report.finish(quick=quick))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
