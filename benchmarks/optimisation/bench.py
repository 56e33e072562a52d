"""Courses, as many at once as there are processes, and what came of each kept on the disk."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.cells import Cells, say
from benchmarks.optimisation.runs import CODEC, FINAL_SHARE, PATCH, Course, play

VERSION: Final = 2
"""Raise it to have everything measured again."""

Outcome = Mapping[str, Any]
"""What `play` returns."""


class Bench:
    """Plays courses; a course that was played before is read.

    Args:
        folder: where outcomes are kept; None keeps nothing.
    """

    def __init__(self, pool: ProcessPoolExecutor, folder: Path | None) -> None:
        self._pool = pool
        self._folder = folder

    def play(self, courses: Iterable[Course]) -> dict[Course, Outcome]:
        """Return each course's outcome."""
        running = {course: self._pool.submit(_cell, course, self._folder) for course in dict.fromkeys(courses)}
        return {course: future.result() for course, future in running.items()}


def _cell(course: Course, folder: Path | None) -> Outcome:
    other = () if course.final_share == FINAL_SHARE else (course.final_share,)
    key = hashlib.sha256(repr((VERSION, course, CODEC, PATCH, *other)).encode()).hexdigest()
    found: Outcome = Cells(folder).get(key[:24], key, partial(play, course))
    shape = course.shape
    say(
        f"{course.method} H={shape.steps} V={shape.volunteers} rounds {course.rounds} lr {course.lr} "
        f"to {course.final_share} momentum {course.momentum} seed {course.seed}: {final(found):.4f}"
    )
    return found


def final(found: Outcome) -> float:
    """Return the held-out loss at a run's end."""
    return float(found["losses"][-1][1])


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; 0 of one value."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))
