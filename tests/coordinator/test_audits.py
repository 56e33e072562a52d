from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from coordinator.audits import (
    OPEN_AUDITS,
    TRANSITIONS,
    AcceptSubject,
    Appealed,
    Audit,
    AuditState,
    BothRefuted,
    Confirmed,
    FetchReplica,
    Overturned,
    Refuted,
    RejectSubject,
    ReplicaAgreed,
    ReplicaDoubted,
    ReplicaMissing,
    ReplicaReceived,
    ReplicaSketched,
    SubjectGone,
    Unanswered,
    advance,
    may_take,
)
from protocol.errors import IllegalTransition
from protocol.keys import KeyId
from tests.coordinator import examples
from tests.coordinator.lifecycles import assert_every_state_is_reached_and_reaches_an_end, ends

FIRST, SECOND = KeyId(examples.digest("first auditor")), KeyId(examples.digest("second auditor"))
EVENTS: tuple[Any, ...] = (
    ReplicaSketched(),
    ReplicaAgreed(),
    ReplicaDoubted(deadline_ms=5_000),
    ReplicaMissing(),
    ReplicaReceived(),
    Confirmed(),
    Refuted(auditor=FIRST),
    BothRefuted(auditor=FIRST, deadline_ms=9_000),
    Appealed(),
    Unanswered(),
    Overturned(),
    SubjectGone(),
)
WAITING_FOR_AN_AUDITOR = {AuditState.WANTS_REFEREE, AuditState.WANTS_SECOND}


def an_audit(state: AuditState) -> Audit:
    subject = examples.received(examples.leased("subject"))
    return replace(examples.audit(subject, state, replica="replica"), audit=7)


@pytest.mark.parametrize(("state", "event"), list(product(AuditState, EVENTS)))
def test_an_audit_moves_as_the_table_says_or_not_at_all(state: AuditState, event: Any) -> None:
    audit = an_audit(state)

    if (state, type(event)) in TRANSITIONS:
        assert advance(audit, event)[0].state is TRANSITIONS[state, type(event)]
    else:
        with pytest.raises(IllegalTransition, match=f"Audit 7 is {state.value}; {type(event).__name__}"):
            advance(audit, event)


def test_every_event_has_its_place_in_the_table() -> None:
    assert {event for _, event in TRANSITIONS} == {type(event) for event in EVENTS}


def test_an_audit_ends_and_always_can_and_only_an_appeal_goes_on_after_an_end() -> None:
    assert ends(TRANSITIONS) == {AuditState.PASSED, AuditState.DROPPED}
    assert ends(TRANSITIONS, {Appealed, Overturned}) == set(AuditState) - OPEN_AUDITS
    assert_every_state_is_reached_and_reaches_an_end(TRANSITIONS)


def test_only_a_referee_fails_a_claim() -> None:
    failing = {event for (_, event), after in TRANSITIONS.items() if after is AuditState.FAILED}
    assert failing == {Refuted, BothRefuted}
    assert {state for state, event in TRANSITIONS if event in failing} == WAITING_FOR_AN_AUDITOR


@pytest.mark.parametrize("state", [state for state in AuditState if state in OPEN_AUDITS])
def test_an_open_audit_ends_when_its_subject_is_judged_for_another_reason(state: AuditState) -> None:
    dropped, instructions = advance(an_audit(state), SubjectGone())
    assert (dropped.state, instructions) == (AuditState.DROPPED, ())


def test_a_replica_that_agrees_lets_the_claim_pass_without_an_auditor() -> None:
    passed, instructions = advance(an_audit(AuditState.REPLICATED), ReplicaAgreed())
    assert (passed.state, instructions) == (AuditState.PASSED, (AcceptSubject(),))


def test_a_replica_that_disagrees_has_its_bytes_fetched_and_refutes_nothing() -> None:
    doubted, instructions = advance(an_audit(AuditState.REPLICATED), ReplicaDoubted(deadline_ms=5_000))
    assert (doubted.state, doubted.deadline_ms) == (AuditState.WANTS_BYTES, 5_000)
    assert instructions == (FetchReplica(),)


@pytest.mark.parametrize("state", [state for state, event in TRANSITIONS if event is ReplicaMissing])
def test_without_a_replica_an_auditor_goes_on_alone(state: AuditState) -> None:
    alone, instructions = advance(an_audit(state), ReplicaMissing())
    assert alone.replica is None
    assert alone.state in WAITING_FOR_AN_AUDITOR
    assert instructions == ()


def test_a_refutation_rejects_the_claim_and_remembers_whose_it_was() -> None:
    failed, instructions = advance(an_audit(AuditState.WANTS_REFEREE), Refuted(auditor=FIRST))
    assert (failed.state, failed.refuted_by) == (AuditState.FAILED, FIRST)
    assert instructions == (RejectSubject(),)


def test_an_auditor_that_refutes_both_is_doubted_before_anybody_is_rejected() -> None:
    doubted, instructions = advance(an_audit(AuditState.WANTS_REFEREE), BothRefuted(auditor=FIRST, deadline_ms=9_000))
    assert (doubted.state, doubted.refuted_by, instructions) == (AuditState.WANTS_SECOND, FIRST, ())
    believed, instructions = advance(doubted, BothRefuted(auditor=SECOND, deadline_ms=9_000))
    assert (believed.state, believed.refuted_by, instructions) == (AuditState.FAILED, SECOND, (RejectSubject(),))
    cleared, instructions = advance(doubted, Confirmed())
    assert (cleared.state, instructions) == (AuditState.PASSED, (AcceptSubject(),))


def test_without_a_second_auditor_a_doubt_ends_undecided() -> None:
    doubted, _ = advance(an_audit(AuditState.WANTS_REFEREE), BothRefuted(auditor=FIRST, deadline_ms=9_000))
    assert doubted.deadline_ms == 9_000
    ended, instructions = advance(doubted, Unanswered())
    assert (ended.state, instructions) == (AuditState.DROPPED, ())


def test_an_appeal_wants_another_auditor() -> None:
    failed, _ = advance(an_audit(AuditState.WANTS_REFEREE), Refuted(auditor=FIRST))
    appealed, instructions = advance(failed, Appealed())
    assert (appealed.state, appealed.appealed, appealed.refuted_by) == (AuditState.WANTS_SECOND, True, FIRST)
    assert instructions == ()


@pytest.mark.parametrize("event", EVENTS)
def test_whoever_had_the_claims_has_them_no_longer_after_any_move(event: Any) -> None:
    for state in (state for state, kind in TRANSITIONS if kind is type(event)):
        held = replace(an_audit(state), auditor=SECOND)
        assert advance(held, event)[0].auditor is None


# --- who may judge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", AuditState)
def test_an_auditor_may_take_what_waits_for_an_auditor_and_nothing_else(state: AuditState) -> None:
    assert may_take(an_audit(state), SECOND, now_ms=0) == (state in WAITING_FOR_AN_AUDITOR)


def test_nobody_judges_twice() -> None:
    doubted, _ = advance(an_audit(AuditState.WANTS_REFEREE), BothRefuted(auditor=FIRST, deadline_ms=9_000))
    failed, _ = advance(an_audit(AuditState.WANTS_REFEREE), Refuted(auditor=FIRST))
    appealed, _ = advance(failed, Appealed())
    for audit in (doubted, appealed):
        assert not may_take(audit, FIRST, now_ms=0)
        assert may_take(audit, SECOND, now_ms=0)


def test_claims_that_an_auditor_has_go_to_another_one_only_when_its_time_is_over() -> None:
    held = replace(an_audit(AuditState.WANTS_REFEREE), auditor=FIRST, deadline_ms=5_000)
    assert may_take(held, FIRST, now_ms=0)
    assert not may_take(held, SECOND, now_ms=4_999)
    assert may_take(held, SECOND, now_ms=5_000)
