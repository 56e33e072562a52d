"""Audits on the books: opened, moved, read, and what of a claim may be merged while one is open.

The rules are in `coordinator.audits`; here, and in `replicas`, `referees`, `appeals`, `acceptance` and `bans`, they
meet the database. Source: PROTOCOL.md section 5.
"""

from dataclasses import replace

from coordinator.audits import (
    FOR_A_REFEREE,
    OPEN_AUDITS,
    Audit,
    AuditEvent,
    AuditReason,
    AuditState,
    ReplicaMissing,
    Scrutiny,
    advance,
    replica_wait_ms,
)
from coordinator.desk import Desk
from coordinator.rounds import RoundState
from coordinator.units import Attempt, AttemptState
from protocol.documents import LeaseId, Opinion, parse_payload
from protocol.envelope import parse_envelope


def open_audit(desk: Desk, subject: Attempt, reason: AuditReason, replica: Attempt | None = None) -> Audit:
    """Open an audit of a claim whose bytes are here.

    Args:
        replica: an attempt at the same unit that is claimed and sketched already.
    """
    assert subject.claim_sha256 is not None
    assert subject.epoch is not None
    if replica is not None:
        state = AuditState.REPLICATED
    elif reason in FOR_A_REFEREE or not desk.store.established_others(subject.owner):
        state = AuditState.WANTS_REFEREE
    else:
        state = AuditState.WANTS_REPLICA
    audit = desk.store.add_audit(
        Audit(
            audit=0,
            unit=subject.unit,
            lease=subject.lease,
            owner=subject.owner,
            claim=subject.claim_sha256,
            epoch=subject.epoch,
            reason=reason,
            state=state,
            deadline_ms=desk.clock.now_ms() + replica_wait_ms(desk.config.rounds.lease_ms),
            replica=None if replica is None else replica.lease,
        )
    )
    desk.log("audit", {"audit": audit.audit, "claim": audit.claim, "reason": reason.value})
    return audit


def put_in_doubt(desk: Desk, attempt: Attempt, reason: AuditReason) -> None:
    """Have a claim audited that the draw had let pass; it is not merged before."""
    doubted = replace(attempt, scrutiny=Scrutiny.PENDING, reason=reason)
    desk.store.save_attempt(attempt, doubted)
    if attempt.state is AttemptState.RECEIVED:
        open_audit(desk, doubted, reason)


def move(desk: Desk, audit: Audit, event: AuditEvent) -> Audit:
    """Advance an audit and store it; the caller carries out what follows."""
    moved, _ = advance(audit, event)
    desk.store.save_audit(audit, moved)
    return moved


def is_open(audit: Audit) -> bool:
    """Say whether an audit is not settled."""
    return audit.state in OPEN_AUDITS


def serves(desk: Desk, lease: LeaseId) -> bool:
    """Say whether an attempt is the replica of an audit that is not settled; such work is never too late."""
    return any(is_open(audit) for audit in desk.store.audits_of_replica(lease))


def hold_back(desk: Desk, attempt: Attempt, reason: AuditReason) -> None:
    """Let nothing of a disagreement be merged before a referee has looked."""
    if attempt.scrutiny is Scrutiny.NONE:
        held = replace(attempt, scrutiny=Scrutiny.PENDING, reason=attempt.reason or reason)
        desk.store.save_attempt(attempt, held)


def replica_gone(desk: Desk, lease: LeaseId) -> None:
    """Let the audits that waited for this replica go on without it."""
    for audit in desk.store.audits_of_replica(lease):
        if is_open(audit):
            move(desk, audit, ReplicaMissing())


def in_closed_merge(desk: Desk, attempt: Attempt) -> bool:
    """Say whether the attempt is in a merge set that is fixed and not published yet."""
    current = desk.store.latest_round()
    if current is None or current.state not in (RoundState.CLOSED, RoundState.MERGING):
        return False
    return any(entry.claim == attempt.claim_sha256 for entry in current.merge)


def standing_beside(desk: Desk, attempt: Attempt) -> Attempt | None:
    """Return another attempt at the unit whose bytes are here and that is not judged.

    What waits for a newcomer's audit does not stand for anything yet: else rubbish under a free key, sent a moment
    earlier, would throw away the work of others.
    """
    for other in desk.store.attempts_of_unit(attempt.unit):
        newcomers = other.scrutiny is Scrutiny.PENDING and other.reason is AuditReason.PROBATION
        if other.lease != attempt.lease and other.state is AttemptState.RECEIVED and not newcomers:
            return other
    return None


def attempt_of(desk: Desk, lease: LeaseId) -> Attempt:
    """Return an attempt that an audit or an earlier read names."""
    found = desk.store.attempt(lease)
    assert found is not None  # a foreign key
    return found


def opinions_of(desk: Desk, audit: Audit) -> tuple[Opinion, ...]:
    """Return the opinions given in an audit, which were verified when they came."""
    return tuple(
        parse_payload(Opinion, parse_envelope(envelope).payload) for envelope in desk.store.opinions(audit.audit)
    )
