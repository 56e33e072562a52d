from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from coordinator.owners import (
    TRANSITIONS,
    AuditFailed,
    AuditPassed,
    Banned,
    Cleared,
    OwnerState,
    Promoted,
    RecheckMerged,
    advance,
)
from protocol.errors import IllegalTransition
from tests.coordinator import examples
from tests.coordinator.lifecycles import assert_every_state_is_reached_and_reaches_an_end, ends

EVENTS: tuple[Any, ...] = (AuditPassed(trained_ms=100), AuditFailed(), Promoted(), Banned(), Cleared())


@pytest.mark.parametrize(("state", "event"), list(product(OwnerState, EVENTS)))
def test_an_owner_moves_as_the_table_says_or_not_at_all(state: OwnerState, event: Any) -> None:
    owner = replace(examples.owner(), state=state)

    if (state, type(event)) in TRANSITIONS:
        assert advance(owner, event)[0].state is TRANSITIONS[state, type(event)]
    else:
        with pytest.raises(IllegalTransition, match=f"{owner.owner} is {state.value}; {type(event).__name__}"):
            advance(owner, event)


def test_only_a_ban_is_an_end_it_can_always_come_and_only_another_referee_ends_it() -> None:
    assert ends(TRANSITIONS) == set()
    assert ends(TRANSITIONS, {Cleared}) == {OwnerState.BANNED}
    assert_every_state_is_reached_and_reaches_an_end(TRANSITIONS, {Cleared})
    assert {event for (state, event) in TRANSITIONS if state is OwnerState.BANNED} == {Cleared}


def test_a_failed_audit_bans_nobody_but_trust_is_earned_again_from_the_start() -> None:
    owner = examples.owner()
    for _ in range(3):
        owner, _ = advance(owner, AuditPassed(trained_ms=100))
    owner, _ = advance(owner, Promoted())
    assert (owner.state, owner.valid_in_row) == (OwnerState.ESTABLISHED, 3)

    owner, _ = advance(owner, AuditFailed())
    assert (owner.state, owner.valid_in_row) == (OwnerState.PROBATION, 0)


def test_who_is_cleared_begins_again_on_probation() -> None:
    owner = replace(examples.owner(), state=OwnerState.ESTABLISHED, valid_in_row=50)
    banned, _ = advance(owner, Banned())
    cleared, instructions = advance(banned, Cleared())
    assert (cleared.state, cleared.valid_in_row) == (OwnerState.PROBATION, 0)
    assert instructions == ()


def test_the_audited_time_is_a_short_one_and_one_quick_unit_is_forgotten() -> None:
    owner = examples.owner()
    times = []
    for trained_ms in (800, 80, *[800] * 12):
        owner, _ = advance(owner, AuditPassed(trained_ms=trained_ms))
        times.append(owner.audited_ms)
    assert times[:3] == [800, 80, 170]
    assert times == [800, 80, *sorted(times[2:])]
    assert times[-1] > 600  # so that half of it is more than what a cheat takes


def test_an_established_owner_who_lets_an_audit_go_by_is_looked_back_at_and_a_newcomer_is_not() -> None:
    owner = replace(examples.owner(), state=OwnerState.ESTABLISHED, valid_in_row=50)
    after, instructions = advance(owner, AuditFailed())
    assert instructions == (RecheckMerged(owner=owner.owner, everything=False),)
    assert advance(after, AuditFailed())[1] == ()


def test_a_ban_asks_to_check_what_was_merged_from_the_owner() -> None:
    owner = examples.owner()
    assert advance(owner, Banned())[1] == (RecheckMerged(owner=owner.owner, everything=True),)
