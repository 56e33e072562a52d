"""What attackers get from a run, and what catching them costs, by the coordinator's own lifecycle code in virtual time.

    python -m benchmarks.attacks [--quick] [--processes N] [--table NAME]

Four tables. *attacks*: runs with real training and 3 of 8 volunteers hostile, for each attack of `verify.attacks` that
shapes deltas, against the same run of the honest alone. *attacks_weighting*: what each weighting rule does by itself,
with no audits. *attacks_protocol*: those who play the protocol, with verdicts drawn from measured odds.
*attacks_policy*: what the policy costs the honest, and whether `verify.policy` predicts what poisoners get in.
Every run is kept in `benchmarks/results/cells/attacks`, so that the benchmark can be broken off and taken up again.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from benchmarks.report import RESULTS, Report
from benchmarks.simulation.bench import Bench, Job, measured_odds
from benchmarks.simulation.measured import Odds
from benchmarks.simulation.scenes import PROTOCOL, Cohort, Crowd, default_verification, memory_folder
from benchmarks.simulation.tally import Interval, interval
from benchmarks.simulation.trials import ERRORS, measure_training, measure_weighting
from verify.attacks import ATTACKS, AttackKind
from verify.policy import Poisoner, assess

CELLS: Final = RESULTS / "cells" / "attacks"
AUDIT_SHARE: Final = 0.06
SHAPING: Final = tuple(name for name, attack in ATTACKS.items() if attack.kind is not AttackKind.MALFORMED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is measured; see the functions that take these."""

    seeds: int
    attacks: tuple[str, ...]
    few: Cohort
    many: Cohort
    rules: tuple[str, ...]
    rule_attacks: tuple[str, ...]
    rule_cohort: Cohort
    protocol: tuple[str, ...]
    crowd: Crowd
    steady: Crowd
    poisoners: int


FULL: Final = Size(
    seeds=3,
    attacks=SHAPING,
    few=Cohort(honest=5, hostile=3, rounds=20),
    many=Cohort(honest=12, hostile=8, rounds=10),
    rules=("mean", "geometric-median", "multi-krum", "nnm-clip"),
    rule_attacks=("sign-flip", "scaling", "noise", "alie", "inner-product", "captions-permuted", "skip-half", "zero"),
    rule_cohort=Cohort(honest=5, hostile=3, rounds=4),
    protocol=tuple(PROTOCOL),
    crowd=Crowd(),
    steady=Crowd(rounds=25),
    poisoners=40,
)
QUICK: Final = Size(
    seeds=1,
    attacks=("sign-flip",),
    few=Cohort(honest=3, hostile=2, rounds=2),
    many=Cohort(honest=4, hostile=2, rounds=1),
    rules=("mean", "nnm-clip"),
    rule_attacks=("sign-flip",),
    rule_cohort=Cohort(honest=3, hostile=2, rounds=1),
    protocol=("colluding-pair", "liar", "stuffing"),
    crowd=Crowd(honest=6, units=24, rounds=3),
    steady=Crowd(honest=6, units=24, rounds=4),
    poisoners=4,
)


def _owners(cells: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [owner[name] for cell in cells for owner in cell["owners"] if owner["hostile"]]


def _mean(cells: Sequence[Mapping[str, Any]], name: str) -> float:
    return math.fsum(cell[name] for cell in cells) / len(cells)


def _rejected(cells: Sequence[Mapping[str, Any]]) -> int:
    return sum(sum(cell["honest_rejected"].values()) for cell in cells)


# --- playing the protocol ------------------------------------------------------------------------------------


def measure_protocol(
    bench: Bench, report: Report, *, scenes: Sequence[str], crowd: Crowd, odds: Mapping[str, Odds], seeds: int
) -> None:
    """Fill the table of those who play the protocol."""
    jobs = {
        scene: [
            Job(
                name=f"play-{scene.replace(' ', '-').replace(',', '')}-{seed}",
                measure="played",
                arguments={"scene": scene, "seed": seed, "crowd": crowd, "odds": odds},
            )
            for seed in range(seeds)
        ]
        for scene in scenes
    }
    cells = bench.fill([job for row in jobs.values() for job in row])
    found = {scene: [cells[job.name] for job in row] for scene, row in jobs.items()}
    for scene, runs in found.items():
        report.add_row(**_protocol_row(scene, runs))
    everything = [cell for runs in found.values() for cell in runs]
    rejected, banned = _rejected(everything), sum(cell["honest_banned"] for cell in everything)
    report.add_target("claims of honest volunteers rejected", target="0", value=rejected, met=rejected == 0)
    report.add_target("honest volunteers banned", target="0", value=banned, met=banned == 0)


def _protocol_row(scene: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    merged = _owners(runs, "merged")
    bans = [count for count in _owners(runs, "poisons_until_ban") if count is not None]
    per_identity = interval(merged) if merged else Interval(mean=0.0, error=0.0, n=0)
    return {
        "attack": scene,
        "seeds": len(runs),
        "units": sum(cell["units"] for cell in runs),
        "identities": len(merged),
        "poisons_merged": per_identity.mean,
        "error": per_identity.error,
        "most": max(merged, default=0),
        "their_weight": math.fsum(_owners(runs, "merged_weight")) / max(1, len(merged)),
        "taken_out": sum(_owners(runs, "unmerged")),
        "banned": len(bans),
        "poisons_until_ban": sum(bans) / len(bans) if bans else None,
        "accepted_unworked": sum(_owners(runs, "unworked")),
        "honest_rejected": _rejected(runs),
        "honest_banned": sum(cell["honest_banned"] for cell in runs),
        "hours_a_round": math.fsum(cell["hours"] / cell["rounds"] for cell in runs) / len(runs),
        "audit_compute": _mean(runs, "compute_share"),
        "audit_bytes": _mean(runs, "byte_share"),
    }


# --- the policy ----------------------------------------------------------------------------------------------


def measure_policy(
    bench: Bench, report: Report, *, steady: Crowd, poisoners: int, odds: Mapping[str, Odds], seeds: int
) -> None:
    """Fill the table of what the policy costs the honest and lets poisoners do, beside what `verify.policy` says."""
    rules = default_verification()
    newcomers = Crowd(
        honest=steady.honest, units=steady.units, rounds=2 * steady.rounds, auditors=4 * steady.auditors, record=0
    )
    predicted = assess(rules, units=(newcomers.rounds * newcomers.units // newcomers.honest,))
    soon, late = predicted.at_once.starts_at, predicted.sleeper.starts_at
    jobs = {
        **_jobs("steady", "played", seeds, scene="nobody hostile", crowd=steady, odds=odds),
        **_jobs("life", "played", seeds, scene="nobody hostile", crowd=newcomers, odds=odds),
        **_jobs("sleeper", "poisoned", seeds, record=late, count=poisoners, odds=odds),
        **_jobs("at-once", "poisoned", seeds, first=seeds, record=soon, count=poisoners, odds=odds),
    }
    cells = bench.fill(list(jobs.values()))
    group = {
        name: [cells[job] for job in jobs if job.startswith(f"policy-{name}-")]
        for name in ("steady", "life", "sleeper", "at-once")
    }
    life, for_ever = predicted.overhead
    for words, runs, share in (
        ("established owners", group["steady"], for_ever.share_of_compute),
        (f"the first {life.units} units of newcomers", group["life"], life.share_of_compute),
    ):
        _add_cost(report, words, runs, share)
    _add_poisoners(report, "sleeper", group["sleeper"], predicted.sleeper)
    _add_poisoners(report, "as soon as probation ends", group["at-once"], predicted.at_once)
    share = _mean(group["steady"], "compute_share")
    report.add_target(
        "share of compute that audits take, established owners, nobody hostile",
        target=f"at most {AUDIT_SHARE:.0%}",
        value=share,
        met=share <= AUDIT_SHARE,
    )


def _jobs(name: str, measure: str, seeds: int, *, first: int = 0, **arguments: Any) -> dict[str, Job]:
    jobs = [
        Job(name=f"policy-{name}-{seed}", measure=measure, arguments={"seed": seed + first, **arguments})
        for seed in range(seeds)
    ]
    return {job.name: job for job in jobs}


_COLUMNS: Final = (
    "who", "identities", "units", "audit_compute", "audit_bytes", "shards_for_replicas", "predicted_compute",
    "poisons_merged", "error", "predicted_merged", "most", "predicted_99", "merged_in_flight", "their_influence",
    "predicted_influence", "honest_rejected",
)  # fmt: skip


def _add_row(report: Report, **cells: Any) -> None:
    report.add_row(**{column: cells.get(column) for column in _COLUMNS})


def _add_cost(report: Report, words: str, runs: Sequence[Mapping[str, Any]], predicted: float) -> None:
    _add_row(
        report,
        who=f"honest: {words}",
        identities=sum(len(cell["owners"]) for cell in runs),
        units=sum(cell["units"] for cell in runs),
        audit_compute=_mean(runs, "compute_share"),
        audit_bytes=_mean(runs, "byte_share"),
        shards_for_replicas=sum(cell["trained"].get("replica", 0) for cell in runs),
        predicted_compute=predicted,
        honest_rejected=_rejected(runs),
    )


def _add_poisoners(report: Report, words: str, runs: Sequence[Mapping[str, Any]], predicted: Poisoner) -> None:
    # The prediction ends with the claim that is drawn; what came in while its audit was on its way is told beside it.
    merged = interval(_owners(runs, "before_drawn"))
    _add_row(
        report,
        who=f"poisoner: {words}",
        identities=merged.n,
        units=sum(cell["units"] for cell in runs),
        poisons_merged=merged.mean,
        error=merged.error,
        predicted_merged=predicted.merged,
        most=max(_owners(runs, "before_drawn")),
        predicted_99=predicted.merged_99,
        merged_in_flight=interval(_owners(runs, "merged")).mean - merged.mean,
        their_influence=interval(_owners(runs, "merged_influence")).mean,
        predicted_influence=predicted.influence_merged,
        honest_rejected=_rejected(runs),
    )
    report.add_target(
        f"poisons merged per identity ({words}): simulated less predicted, in standard errors",
        target=f"at most {ERRORS:g} to either side",
        value=(merged.mean - predicted.merged) / merged.error,
        met=abs(merged.mean - predicted.merged) <= ERRORS * merged.error,
    )


TABLES: Final = ("attacks", "attacks_weighting", "attacks_policy", "attacks_protocol")


def measure(name: str, bench: Bench, size: Size, odds: Mapping[str, Odds], *, draw: bool) -> Report:
    """Fill one of the tables."""
    report = Report(name=name)
    if name == "attacks":
        measure_training(
            bench,
            report,
            attacks=size.attacks,
            few=size.few,
            many=size.many,
            seeds=size.seeds,
            draw=draw,
        )
    elif name == "attacks_weighting":
        measure_weighting(
            bench,
            report,
            rules=size.rules,
            attacks=size.rule_attacks,
            cohort=size.rule_cohort,
            seeds=size.seeds,
        )
    elif name == "attacks_policy":
        measure_policy(bench, report, steady=size.steady, poisoners=size.poisoners, odds=odds, seeds=size.seeds)
    else:
        measure_protocol(bench, report, scenes=size.protocol, crowd=size.crowd, odds=odds, seeds=size.seeds)
    return report


def main() -> int:
    """Run the benchmark; the exit status says whether the targets were met."""
    parser = argparse.ArgumentParser(description="What attackers get from a run, and what catching them costs.")
    parser.add_argument("--quick", action="store_true", help="a few small runs; writes nothing")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--table", choices=TABLES, action="append", help="only this one; may be given several times")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    size, odds = QUICK if quick else FULL, measured_odds()
    pool = ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn"))
    with memory_folder() as memo, pool:
        bench = Bench(pool, None if quick else CELLS, Path(memo))
        # Each is recorded as soon as it is complete: all of them together take hours.
        names = arguments.table or TABLES
        met = [measure(name, bench, size, odds, draw=not quick).finish(quick=quick) for name in names]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
