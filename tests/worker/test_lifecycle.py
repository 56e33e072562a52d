"""The table of a spooled unit: it moves as written, and in no other way."""

import itertools
import typing

import pytest

from protocol.documents import Digest, LeaseId
from protocol.errors import IllegalTransition
from worker.lifecycle import (
    END_STATES,
    HOLDS_DELTA,
    SPARES_DELTA,
    TRANSITIONS,
    Event,
    Instruction,
    RefusedForGood,
    SpooledUnit,
    SpoolState,
    VerdictAccepts,
    VerdictRejects,
    advance,
    instructions_of,
)

EVENTS: tuple[type[Event], ...] = typing.get_args(Event)


def event_of(kind: type[Event]) -> Event:
    return RefusedForGood(code="CODE", sentence="Why.") if kind is RefusedForGood else kind()  # type: ignore[call-arg]


def unit_in(state: SpoolState) -> SpooledUnit:
    return SpooledUnit(claim=Digest("c1" * 32), lease=LeaseId("1e" * 16), state=state)


@pytest.mark.parametrize(("state", "kind"), list(itertools.product(SpoolState, EVENTS)))
def test_every_pair_of_state_and_event_moves_as_the_table_says_or_is_refused(
    state: SpoolState, kind: type[Event]
) -> None:
    target = TRANSITIONS.get((state, kind))
    if target is None:
        with pytest.raises(IllegalTransition, match=f"{state.value}.*{kind.__name__}"):
            advance(unit_in(state), event_of(kind))
    else:
        moved, instructions = advance(unit_in(state), event_of(kind))
        assert moved.state is target
        assert instructions == instructions_of(target)


def test_from_an_end_state_only_another_verdict_leads_to_an_end_state_and_every_state_can_reach_one() -> None:
    for (state, event), target in TRANSITIONS.items():
        if state in END_STATES:
            assert event in (VerdictAccepts, VerdictRejects)
            assert target in END_STATES
    reaching = set(END_STATES)
    for _ in SpoolState:
        reaching |= {state for (state, _), target in TRANSITIONS.items() if target in reaching}
    assert reaching == set(SpoolState)


def test_no_state_that_may_hold_the_only_copy_lets_the_delta_go() -> None:
    assert not HOLDS_DELTA & SPARES_DELTA
    for state in HOLDS_DELTA | SPARES_DELTA:
        assert Instruction.DROP_DELTA not in instructions_of(state)


def test_a_refusal_is_remembered_with_its_words() -> None:
    moved, _ = advance(unit_in(SpoolState.CLAIMED), RefusedForGood(code="CLAIM_CONFLICT", sentence="Too late."))

    assert (moved.code, moved.sentence) == ("CLAIM_CONFLICT", "Too late.")
