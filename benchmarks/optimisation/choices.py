"""What was chosen between: each alternative with the settings that suit it best, found on the first seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from benchmarks.optimisation.bench import Bench, Outcome, final, mean, spread
from benchmarks.optimisation.runs import Course, Name
from benchmarks.optimisation.samples import Shape
from benchmarks.report import Report

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An alternative, and what is tried: each momentum at the first rate, the other rates at the best momentum."""

    words: str
    rates: Sequence[float]
    momenta: Sequence[float]


STATES: Final[Mapping[Name, Choice]] = {
    "diloco-fp32": Choice(words="private, carried", rates=(0.008, 0.006), momenta=(0.8, 0.6, 0.9)),
    "reset": Choice(words="none, reset each unit", rates=(0.008, 0.006), momenta=(0.8, 0.6, 0.9)),
    "v": Choice(words="factored v, m = 0", rates=(0.008, 0.006), momenta=(0.8, 0.6, 0.9)),
    "v-outer-m": Choice(words="factored v, m from the outer step", rates=(0.008, 0.006), momenta=(0.6, 0.3, 0.8)),
    "v-ternary-m": Choice(words="factored v, ternary m", rates=(0.008, 0.006), momenta=(0.8, 0.6, 0.9)),
    "8-bit": Choice(words="m and v in 8 bits", rates=(0.008, 0.006), momenta=(0.8, 0.6, 0.9)),
}
"""The inner optimiser's state, with deltas and steps in fp32; the first is what the others are compared with."""
OUTER: Final[Mapping[Name, Choice]] = {
    "ours": Choice(words="mean, Nesterov", rates=(0.006, 0.008), momenta=(0.8, 0.6, 0.9)),
    "radial": Choice(words="radial-directional averaging", rates=(0.006, 0.004), momenta=(0.6, 0.3, 0.0)),
    "late-1": Choice(words="3 of 8 late, in full", rates=(0.006,), momenta=(0.8, 0.6)),
    "late-0.7": Choice(words="3 of 8 late, 0.7 of the weight", rates=(0.006,), momenta=(0.8, 0.6)),
    "late-0.5": Choice(words="3 of 8 late, half of the weight", rates=(0.006,), momenta=(0.8, 0.6)),
    "late-0": Choice(words="3 of 8 late, thrown away", rates=(0.006,), momenta=(0.8, 0.6)),
    "late-delayed": Choice(words="3 of 8 late, in full, outside the momentum", rates=(0.006,), momenta=(0.8, 0.6)),
    "short-by-samples": Choice(words="half do half a unit, weighed by samples", rates=(0.006,), momenta=(0.8,)),
    "short-equal": Choice(words="half do half a unit, weighed alike", rates=(0.006,), momenta=(0.8,)),
}
"""The outer loop, with this project's codecs; the first is what the others are compared with."""
INNER: Final[Mapping[Name, Choice]] = {
    "ours": Choice(words="AdamW", rates=(0.006, 0.008), momenta=(0.8, 0.6, 0.9)),
    "muon": Choice(words="Muon in the blocks", rates=(0.006, 0.012, 0.004), momenta=(0.8, 0.6, 0.9)),
    "ours-fp32": Choice(words="AdamW, fp32 both ways", rates=(0.006, 0.008), momenta=(0.8,)),
    "muon-fp32": Choice(words="Muon in the blocks, fp32 both ways", rates=(0.006, 0.012), momenta=(0.8,)),
}
"""The inner optimiser, with this project's codecs and without; the first is what the others are compared with."""


def measure_choices(
    bench: Bench, report: Report, choices: Mapping[Name, Choice], shape: Shape, *, rounds: int, seeds: int
) -> None:
    """Fill a table: each choice at its best, beside the first one."""
    best = _tuned(bench, choices, shape, rounds)
    wanted = {name: [replace(course, seed=seed) for seed in range(seeds)] for name, course in best.items()}
    played = bench.play(course for courses in wanted.values() for course in courses)
    runs = {name: [played[course] for course in courses] for name, courses in wanted.items()}
    reference = [final(run) for run in runs[next(iter(choices))]]
    for name, choice in choices.items():
        report.add_row(**_row(choice, best[name], runs[name], reference))


def _row(
    choice: Choice, course: Course, runs: Sequence[Outcome], reference: Sequence[float]
) -> dict[str, str | float | int]:
    losses = [final(run) for run in runs]
    excess = [100.0 * (loss / other - 1.0) for loss, other in zip(losses, reference, strict=True)]
    return {
        "what": choice.words,
        "seeds": len(runs),
        "lr": course.lr,
        "outer_momentum": course.momentum,
        "loss": mean(losses),
        "spread": spread(losses),
        "percent_over_first": mean(excess),
        "its_spread": spread(excess),
        "up_bits_a_round": runs[0]["up"],
        "down_bits_a_round": runs[0]["down"],
        "tried": len(choice.momenta) + len(choice.rates) - 1,
    }


def _tuned(bench: Bench, choices: Mapping[Name, Choice], shape: Shape, rounds: int) -> dict[Name, Course]:
    """Return each choice's best settings on the first seed."""
    first = {
        name: [
            Course(method=name, seed=0, shape=shape, rounds=rounds, lr=choice.rates[0], momentum=momentum)
            for momentum in choice.momenta
        ]
        for name, choice in choices.items()
    }
    best = lowest(bench, first)
    second = {name: [replace(best[name], lr=lr) for lr in choice.rates] for name, choice in choices.items()}
    return lowest(bench, second)


def lowest(bench: Bench, tried: Mapping[Key, Sequence[Course]]) -> dict[Key, Course]:
    """Play all courses; return of each group the one that ended with the lowest loss."""
    played = bench.play(course for courses in tried.values() for course in courses)
    return {key: min(courses, key=lambda course: final(played[course])) for key, courses in tried.items()}
