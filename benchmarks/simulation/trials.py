"""Runs with training beside those of the honest alone: excess losses, tables and pictures of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.plots import PICTURES
from benchmarks.report import Report
from benchmarks.simulation.bench import Bench, Job
from benchmarks.simulation.pictures import Excess, plot_curves, plot_excess
from benchmarks.simulation.scenes import Cohort, default_verification
from benchmarks.simulation.tally import Interval, interval

EXCESS: Final = 0.01
ERRORS: Final = 2.0
WORST: Final = 3
NOBODY: Final = "nobody"
"""The honest alone once more, with other chances: what a difference between two runs means at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """An attack's runs beside those of the honest alone, seed by seed."""

    attack: str
    honest: Sequence[Mapping[str, Any]]
    runs: Sequence[Mapping[str, Any]]

    @property
    def excess(self) -> Interval:
        """Of the last checkpoint's held-out loss, as a share of that of the honest alone."""
        pairs = zip(self.runs, self.honest, strict=True)
        return interval([run["losses"][-1] / honest["losses"][-1] - 1.0 for run, honest in pairs])

    @property
    def worst(self) -> float:
        """Return the largest excess at any checkpoint, averaged over the seeds."""
        pairs = zip(self.runs, self.honest, strict=True)
        most = [max(a / b for a, b in zip(run["losses"], honest["losses"], strict=True)) - 1 for run, honest in pairs]
        return math.fsum(most) / len(most)

    @property
    def passes(self) -> bool:
        """Return whether the mean excess is small enough, or not to be told from none."""
        return self.excess.mean <= EXCESS or self.excess.mean <= ERRORS * self.excess.error

    def outcomes(self, name: str) -> list[Any]:
        """Return a number of every run."""
        return [run["outcome"][name] for run in self.runs]

    def hostile(self, name: str) -> list[Any]:
        """Return a number of every attacker of every run."""
        return [owner[name] for run in self.runs for owner in run["outcome"]["owners"] if owner["hostile"]]

    def rejected(self) -> int:
        """Return how many claims of honest volunteers were rejected."""
        return sum(sum(codes.values()) for codes in self.outcomes("honest_rejected"))


def mean_losses(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the loss of each checkpoint, averaged over runs."""
    return [math.fsum(at) / len(at) for at in zip(*(run["losses"] for run in runs), strict=True)]


def trials(bench: Bench, attacks: Sequence[str], cohort: Cohort, seeds: int, **changes: Any) -> dict[str, Trial]:
    """Play attacks and the honest alone, each once for every seed.

    Args:
        changes: arguments of `scenes.train` for the attacks; those of the honest alone are always the same.
    """
    blind = {"weighting": "mean"} if "weighting" in changes else {}
    alone = [_job(None, seed, cohort, **blind) for seed in range(seeds)]
    jobs = {attack: [_job(attack, seed, cohort, **changes) for seed in range(seeds)] for attack in attacks}
    several = {job.name: job for job in (*alone, *(job for row in jobs.values() for job in row))}
    cells = bench.fill(list(several.values()))
    honest = [cells[job.name] for job in alone]
    return {
        attack: Trial(attack=attack, honest=honest, runs=[cells[job.name] for job in row])
        for attack, row in jobs.items()
    }


def _job(attack: str | None, seed: int, cohort: Cohort, **changes: Any) -> Job:
    if attack == NOBODY:
        attack = None
        changes = changes if "weighting" in changes else {**changes, "chance": 1}
    words = "-".join([attack or "honest", *(f"{name}={value}" for name, value in changes.items())])
    return Job(
        name=f"train-{cohort.volunteers}x{cohort.rounds}-{words}-{seed}",
        measure="trained",
        arguments={"attack": attack, "seed": seed, "cohort": cohort, **changes},
    )


# --- the whole policy ----------------------------------------------------------------------------------------


def measure_training(
    bench: Bench,
    report: Report,
    *,
    attacks: Sequence[str],
    few: Cohort,
    many: Cohort,
    seeds: int,
    draw: bool,
) -> None:
    """Fill the table of runs under attack and its targets, and draw.

    Args:
        few: the cohort that meets every attack. many: the one that meets the three that did most harm there.
        draw: whether to write the pictures.
    """
    found = trials(bench, [NOBODY, *attacks], few, seeds)
    chance = found.pop(NOBODY)
    worst = sorted(found, key=lambda attack: -found[attack].excess.mean)[:WORST]
    more = trials(bench, worst, many, seeds)
    for trial in (chance, *found.values()):
        _add_row(report, trial, few)
    for trial in more.values():
        _add_row(report, trial, many)
    for cohort, group in ((few, found), (many, more)):
        missed = [attack for attack, trial in group.items() if not trial.passes]
        report.add_target(
            f"attacks by {cohort.hostile} of {cohort.volunteers} whose mean excess loss is over 1 % and over two "
            f"standard errors{': ' if missed else ''}{', '.join(missed)}",
            target="0",
            value=len(missed),
            met=not missed,
        )
    rejected = sum(trial.rejected() for trial in (chance, *found.values(), *more.values()))
    report.add_target("claims of honest volunteers rejected", target="0", value=rejected, met=rejected == 0)
    if draw:
        _draw(chance, found, more, few, many, worst)


def _add_row(report: Report, trial: Trial, cohort: Cohort) -> None:
    merged, bans = trial.hostile("merged"), [count for count in trial.hostile("poisons_until_ban") if count is not None]
    runs = len(trial.runs)
    report.add_row(
        attack=trial.attack,
        volunteers=cohort.volunteers,
        hostile=0 if trial.attack == NOBODY else cohort.hostile,
        seeds=runs,
        excess_mean=trial.excess.mean,
        excess_error=trial.excess.error,
        excess_at_worst=trial.worst,
        poisons_merged=sum(merged) / runs,
        their_weight=math.fsum(trial.hostile("merged_weight")) / runs,
        taken_out=sum(trial.hostile("unmerged")) / runs,
        banned=f"{len(bans)} of {len(merged)}",
        units_until_ban=sum(bans) / len(bans) if bans else None,
        honest_rejected=trial.rejected(),
        audit_compute=math.fsum(trial.outcomes("compute_share")) / runs,
        audit_bytes=math.fsum(trial.outcomes("byte_share")) / runs,
        target_met=trial.passes,
    )


def _draw(
    chance: Trial, found: Mapping[str, Trial], more: Mapping[str, Trial], few: Cohort, many: Cohort, worst: list[str]
) -> None:
    groups = [(few, [chance, *found.values()]), (many, list(more.values()))]
    excesses = [
        Excess(attack=trial.attack, volunteers=cohort.volunteers, excess=trial.excess)
        for cohort, group in groups
        for trial in group
    ]
    plot_excess(excesses, PICTURES / "attacks-excess.png", target=EXCESS)
    curves = {attack: mean_losses(found[attack].runs) for attack in worst}
    plot_curves(mean_losses(chance.honest), curves, PICTURES / "attacks-curves.png")


# --- weighting rules alone -----------------------------------------------------------------------------------


def measure_weighting(
    bench: Bench, report: Report, *, rules: Sequence[str], attacks: Sequence[str], cohort: Cohort, seeds: int
) -> None:
    """Fill the table of weighting rules without audits, and say which does least harm at its worst."""
    worst: dict[str, float] = {}
    found = {rule: trials(bench, [NOBODY, *attacks], cohort, seeds, weighting=rule) for rule in rules}
    for attack in (NOBODY, *attacks):
        report.add_row(
            attack=attack,
            volunteers=cohort.volunteers,
            hostile=0 if attack == NOBODY else cohort.hostile,
            seeds=seeds,
            **{f"{rule}{suffix}": value for rule in rules for suffix, value in _columns(found[rule][attack]).items()},
        )
    for rule in rules:
        worst[rule] = max(trial.excess.mean for trial in found[rule].values())
    best, default = min(worst, key=lambda rule: worst[rule]), default_verification().weighting
    if default in worst:
        report.add_target(
            f"largest mean excess loss under the default weighting, {default}, without any audit; least is {best}'s",
            target=f"at most that of every other rule, {worst[best]:.4g}",
            value=worst[default],
            met=worst[default] <= worst[best],
        )


def _columns(trial: Trial) -> dict[str, float]:
    weight = trial.hostile("merged_weight")
    # Every round's weights sum to about one.
    rounds = sum(len(run["losses"]) - 1 for run in trial.runs)
    return {"": trial.excess.mean, "_error": trial.excess.error, "_hostile_weight": math.fsum(weight) / rounds}
