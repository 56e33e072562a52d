"""What every lifecycle table must hold; the tests of each table call these, so they grow with it.

An end that a later finding can reopen (an appeal, a second referee) is an end all the same: `reopened_by` names such
events. A move that leads back to where it began is no way out either.
"""

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, TypeVar

S = TypeVar("S", bound=Enum)
Transitions = Mapping[tuple[S, type[Any]], S]


def ends(transitions: Transitions[S], reopened_by: Collection[type[Any]] = ()) -> set[S]:
    """Return the states that have no way out but by the events of `reopened_by`."""
    states = set(type(next(iter(transitions.values()))))
    return states - {
        before for (before, event), after in transitions.items() if after is not before and event not in reopened_by
    }


def assert_every_state_is_reached_and_reaches_an_end(
    transitions: Transitions[S], reopened_by: Collection[type[Any]] = ()
) -> None:
    states = list(type(next(iter(transitions.values()))))
    moves = {(before, after) for (before, _), after in transitions.items()}
    assert _closure({states[0]}, moves) == set(states)
    assert _closure(ends(transitions, reopened_by), {(after, before) for before, after in moves}) == set(states)


def _closure(start: set[S], moves: set[tuple[S, S]]) -> set[S]:
    reached = set(start)
    while True:
        more = {after for before, after in moves if before in reached} - reached
        if not more:
            return reached
        reached |= more
