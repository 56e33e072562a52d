from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from coordinator.audits import AuditReason, Scrutiny
from coordinator.units import (
    ATTEMPT_TRANSITIONS,
    NEVER_MS,
    UNIT_TRANSITIONS,
    Attempt,
    AttemptState,
    BytesWanted,
    Claimed,
    Excused,
    Expired,
    HandedBack,
    Judged,
    OfferToUnit,
    Outcome,
    PublishVerdict,
    Received,
    Rejudged,
    ReleaseUnit,
    Sketched,
    UnitAbandoned,
    UnitAccepted,
    UnitAssigned,
    UnitRejected,
    UnitReleased,
    UnitState,
    advance,
    needs_release,
)
from protocol.errors import IllegalTransition
from tests.coordinator import examples
from tests.coordinator.lifecycles import assert_every_state_is_reached_and_reaches_an_end, ends

UNIT_EVENTS: dict[type[Any], Any] = {
    UnitAssigned: UnitAssigned(),
    UnitReleased: UnitReleased(),
    UnitAccepted: UnitAccepted(lease=examples.lease_id("a")),
    UnitRejected: UnitRejected(),
    UnitAbandoned: UnitAbandoned(),
}
ATTEMPT_EVENTS: dict[type[Any], Any] = {
    Claimed: examples.claim_event("a"),
    Sketched: Sketched(sketch=examples.SKETCH),
    Received: Received(receipt=b"receipt", late=1),
    Excused: Excused(),
    BytesWanted: BytesWanted(deadline_ms=777),
    Judged: Judged(verdict_envelope=b"verdict"),
    Rejudged: Rejudged(verdict_envelope=b"another verdict"),
    Expired: Expired(),
    HandedBack: HandedBack(),
}


def an_attempt(state: AttemptState) -> Attempt:
    start = examples.leased()
    return {
        AttemptState.LEASED: start,
        AttemptState.CLAIMED: examples.claimed(start),
        AttemptState.SKETCHED: examples.sketched(start),
        AttemptState.RECEIVED: examples.received(start),
        AttemptState.EXCUSED: advance(examples.sketched(start), Excused())[0],
        AttemptState.EXPIRED: advance(start, Expired())[0],
        AttemptState.JUDGED: advance(examples.received(start), Judged(verdict_envelope=b"verdict"))[0],
        AttemptState.HANDED_BACK: advance(start, HandedBack())[0],
    }[state]


@pytest.mark.parametrize(("state", "event"), list(product(UnitState, UNIT_EVENTS)))
def test_a_unit_moves_as_its_table_says_or_not_at_all(state: UnitState, event: type[Any]) -> None:
    unit = replace(examples.unit(), state=state)

    if (state, event) in UNIT_TRANSITIONS:
        moved, _ = advance(unit, UNIT_EVENTS[event])
        assert moved.state is UNIT_TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{unit.unit} is {state.value}; {event.__name__}"):
            advance(unit, UNIT_EVENTS[event])


@pytest.mark.parametrize(("state", "event"), list(product(AttemptState, ATTEMPT_EVENTS)))
def test_an_attempt_moves_as_its_table_says_or_not_at_all(state: AttemptState, event: type[Any]) -> None:
    attempt = an_attempt(state)
    given = ATTEMPT_EVENTS[event]
    if attempt.claim_sha256 is None and event is Judged:
        given = Judged(verdict_envelope=None)

    if (state, event) in ATTEMPT_TRANSITIONS:
        moved, _ = advance(attempt, given)
        assert moved.state is ATTEMPT_TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{attempt.lease} is {state.value}; {event.__name__}"):
            advance(attempt, given)


def test_units_and_attempts_end_where_the_protocol_says_and_always_can() -> None:
    assert ends(UNIT_TRANSITIONS) == {UnitState.SETTLED}
    assert ends(ATTEMPT_TRANSITIONS) == {AttemptState.JUDGED, AttemptState.HANDED_BACK}
    assert_every_state_is_reached_and_reaches_an_end(UNIT_TRANSITIONS)
    assert_every_state_is_reached_and_reaches_an_end(ATTEMPT_TRANSITIONS)


def test_a_unit_refuses_the_event_of_an_attempt() -> None:
    with pytest.raises(IllegalTransition):
        advance(examples.unit(), Expired())  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (UNIT_EVENTS[UnitAccepted], Outcome.ACCEPTED),
        (UnitRejected(), Outcome.REJECTED),
        (UnitAbandoned(), Outcome.ABANDONED),
    ],
)
def test_a_settled_unit_says_how_it_ended(event: Any, outcome: Outcome) -> None:
    unit, _ = advance(examples.unit(), event)
    assert unit.outcome is outcome
    assert (unit.chosen is not None) == (outcome is Outcome.ACCEPTED)


def test_a_late_claim_keeps_the_work_of_an_expired_lease() -> None:
    expired = an_attempt(AttemptState.EXPIRED)
    late, _ = advance(expired, examples.claim_event("late", deadline_ms=999))
    assert late.state is AttemptState.CLAIMED
    assert late.deadline_ms == 999
    assert late.artifacts == (examples.artifact("late"),)


@pytest.mark.parametrize("event", [Expired(), HandedBack()])
def test_a_lease_that_ends_asks_to_release_its_unit(event: Any) -> None:
    attempt = examples.leased()
    assert advance(attempt, event)[1] == (ReleaseUnit(unit=attempt.unit),)


def test_received_bytes_are_offered_to_the_unit() -> None:
    attempt = an_attempt(AttemptState.SKETCHED)
    moved, instructions = advance(attempt, Received(receipt=b"receipt", late=2))
    assert (moved.bytes_receipt, moved.late) == (b"receipt", 2)
    assert instructions == (OfferToUnit(unit=attempt.unit, lease=attempt.lease),)


@pytest.mark.parametrize("reason", [None, *AuditReason])
def test_a_claim_that_is_to_be_audited_must_not_be_merged_before(reason: AuditReason | None) -> None:
    claimed, _ = advance(examples.leased(), examples.claim_event("a", reason=reason))
    assert claimed.scrutiny is (Scrutiny.PENDING if reason else Scrutiny.NONE)
    assert (claimed.reason, claimed.trained_ms, claimed.epoch, claimed.audit_share) == (reason, 9_000, 1, 838_861)


def test_an_excused_replica_shows_its_bytes_when_they_are_wanted_after_all() -> None:
    excused = an_attempt(AttemptState.EXCUSED)
    wanted, instructions = advance(excused, BytesWanted(deadline_ms=777))
    assert (wanted.state, wanted.deadline_ms, wanted.sketch) == (AttemptState.SKETCHED, 777, excused.sketch)
    assert instructions == ()


@pytest.mark.parametrize(
    "state", [AttemptState.CLAIMED, AttemptState.SKETCHED, AttemptState.RECEIVED, AttemptState.EXCUSED]
)
def test_a_verdict_is_published_and_frees_the_unit(state: AttemptState) -> None:
    attempt = an_attempt(state)
    judged, instructions = advance(attempt, Judged(verdict_envelope=b"verdict"))
    assert judged.verdict_envelope == b"verdict"
    assert PublishVerdict(lease=attempt.lease, verdict_envelope=b"verdict") in instructions
    assert ReleaseUnit(unit=attempt.unit) in instructions


def test_a_verdict_that_changes_is_published_again_and_frees_nothing() -> None:
    judged = an_attempt(AttemptState.JUDGED)
    again, instructions = advance(judged, Rejudged(verdict_envelope=b"restored"))
    assert again == replace(judged, verdict_envelope=b"restored")
    assert instructions == (PublishVerdict(lease=judged.lease, verdict_envelope=b"restored"),)


def test_a_verdict_belongs_to_a_claim_and_every_judged_claim_has_one() -> None:
    with pytest.raises(IllegalTransition):
        advance(an_attempt(AttemptState.EXPIRED), Judged(verdict_envelope=b"verdict"))
    with pytest.raises(IllegalTransition):
        advance(an_attempt(AttemptState.RECEIVED), Judged(verdict_envelope=None))


def test_an_assigned_unit_is_released_only_when_nobody_is_at_it_any_more() -> None:
    open_unit = examples.unit()
    assigned, _ = advance(open_unit, UnitAssigned())
    gone = [an_attempt(AttemptState.EXPIRED), an_attempt(AttemptState.HANDED_BACK), an_attempt(AttemptState.JUDGED)]

    claimed = an_attempt(AttemptState.CLAIMED)
    assert needs_release(assigned, gone, now_ms=0)
    assert not needs_release(assigned, [*gone, claimed], now_ms=claimed.deadline_ms - 1)
    assert not needs_release(open_unit, gone, now_ms=0)


def test_a_claim_whose_bytes_are_overdue_holds_its_unit_no_longer() -> None:
    assigned, _ = advance(examples.unit(), UnitAssigned())
    claimed = an_attempt(AttemptState.CLAIMED)
    assert needs_release(assigned, [claimed], now_ms=claimed.deadline_ms)
    assert needs_release(assigned, [replace(claimed, deadline_ms=NEVER_MS)], now_ms=0)
    assert not needs_release(assigned, [an_attempt(AttemptState.EXCUSED)], now_ms=NEVER_MS)
