"""What every lifecycle table must hold; the tests of each table call these, so they grow with it."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar

S = TypeVar("S", bound=Enum)


def ends(transitions: Mapping[tuple[S, type[Any]], S]) -> set[S]:
    """Return the states that have no way out."""
    states = set(type(next(iter(transitions.values()))))
    return states - {state for state, _ in transitions}


def assert_every_state_is_reached_and_reaches_an_end(transitions: Mapping[tuple[S, type[Any]], S]) -> None:
    states = list(type(next(iter(transitions.values()))))
    moves = {(before, after) for (before, _), after in transitions.items()}
    assert _closure({states[0]}, moves) == set(states)
    assert _closure(ends(transitions), {(after, before) for before, after in moves}) == set(states)


def _closure(start: set[S], moves: set[tuple[S, S]]) -> set[S]:
    reached = set(start)
    while True:
        more = {after for before, after in moves if before in reached} - reached
        if not more:
            return reached
        reached |= more
