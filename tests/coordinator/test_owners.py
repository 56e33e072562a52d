from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from coordinator.owners import (
    TRANSITIONS,
    AuditFailed,
    AuditPassed,
    Banned,
    OwnerState,
    Promoted,
    RecheckMerged,
    advance,
)
from protocol.errors import IllegalTransition
from tests.coordinator import examples
from tests.coordinator.lifecycles import assert_every_state_is_reached_and_reaches_an_end, ends

EVENTS: tuple[Any, ...] = (AuditPassed(), AuditFailed(), Promoted(), Banned())


@pytest.mark.parametrize(("state", "event"), list(product(OwnerState, EVENTS)))
def test_an_owner_moves_as_the_table_says_or_not_at_all(state: OwnerState, event: Any) -> None:
    owner = replace(examples.owner(), state=state)

    if (state, type(event)) in TRANSITIONS:
        assert advance(owner, event)[0].state is TRANSITIONS[state, type(event)]
    else:
        with pytest.raises(IllegalTransition, match=f"{owner.owner} is {state.value}; {type(event).__name__}"):
            advance(owner, event)


def test_only_a_ban_is_an_end_and_it_can_always_come() -> None:
    assert ends(TRANSITIONS) == {OwnerState.BANNED}
    assert_every_state_is_reached_and_reaches_an_end(TRANSITIONS)


def test_a_failed_audit_bans_nobody_but_trust_is_earned_again_from_the_start() -> None:
    owner = examples.owner()
    for _ in range(3):
        owner, _ = advance(owner, AuditPassed())
    owner, _ = advance(owner, Promoted())
    assert (owner.state, owner.valid_in_row) == (OwnerState.ESTABLISHED, 3)

    owner, _ = advance(owner, AuditFailed())
    assert (owner.state, owner.valid_in_row) == (OwnerState.PROBATION, 0)


def test_a_ban_asks_to_check_what_was_merged_from_the_owner() -> None:
    owner = examples.owner()
    assert advance(owner, Banned())[1] == (RecheckMerged(owner=owner.owner),)
