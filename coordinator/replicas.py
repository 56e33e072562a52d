"""Replicas: who runs a claimed unit again, how the two are compared, and what follows.

Source: PROTOCOL.md section 5.
"""

from dataclasses import dataclass, replace

from coordinator import verdicts
from coordinator.acceptance import accept_subject, counts
from coordinator.auditing import (
    attempt_of,
    hold_back,
    in_closed_merge,
    move,
    open_audit,
    replica_gone,
    standing_beside,
)
from coordinator.audits import (
    Audit,
    AuditReason,
    AuditState,
    FetchReplica,
    ReplicaAgreed,
    ReplicaDoubted,
    ReplicaMissing,
    ReplicaReceived,
    ReplicaSketched,
    Scrutiny,
    advance,
)
from coordinator.bans import distrust
from coordinator.desk import Desk
from coordinator.owners import OwnerState
from coordinator.records import owner_of
from coordinator.units import NEVER_MS, Attempt, AttemptState, BytesWanted, Excused, UnitState
from coordinator.units import advance as advance_attempt
from protocol.documents import Digest
from verify.policy import is_sampled


def take_as_replica(desk: Desk, attempt: Attempt) -> Attempt:
    """Excuse a sketched attempt whose unit has a result already, and have the two compared; else leave it as it is."""
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    audit = _waiting_for(desk, attempt)
    standing = None if audit or unit.state is UnitState.SETTLED else standing_beside(desk, attempt)
    if audit is None and standing is None and unit.state is not UnitState.SETTLED:
        return attempt
    excused, _ = advance_attempt(attempt, Excused())
    desk.store.save_attempt(attempt, excused)
    if audit is not None:
        move(desk, replace(audit, replica=attempt.lease) if audit.replica is None else audit, ReplicaSketched())
    elif standing is not None and _may_doubt(desk, excused, standing):
        open_audit(desk, standing, AuditReason.LATE, excused)
    elif is_forfeit(excused):
        forfeit(desk, excused)
        excused = attempt_of(desk, attempt.lease)
    else:
        # Its unit is merged, or will not be: the result may be public by now, so agreeing with it would prove nothing.
        verdicts.judge(desk, excused, verdicts.unused(desk, excused, unit))
        excused = attempt_of(desk, attempt.lease)
    return excused


def _may_doubt(desk: Desk, late: Attempt, standing: Attempt) -> bool:
    """Say whether a late claim is reason enough to compare: of an established other owner, once for each result.

    Else strangers could hold back the work of others, and have it run again, by claiming rubbish late; and an owner
    could be both sides of an audit.
    """
    if standing.scrutiny is Scrutiny.CONFIRMED or late.owner == standing.owner:
        return False
    asked = any(audit.reason is AuditReason.LATE for audit in desk.store.audits_of_subject(standing.lease))
    return not asked and owner_of(desk, late.owner).state is OwnerState.ESTABLISHED


def _waiting_for(desk: Desk, attempt: Attempt) -> Audit | None:
    for audit in desk.store.audits_of_replica(attempt.lease):
        if audit.state is AuditState.WANTS_REPLICA:
            return audit
    return None


def replica_received(desk: Desk, attempt: Attempt) -> bool:
    """Hand a replica's bytes on to the referee; say whether the attempt was one."""
    found = False
    for audit in desk.store.audits_of_replica(attempt.lease):
        if audit.state is AuditState.WANTS_BYTES:
            move(desk, audit, ReplicaReceived())
            found = True
            hold_back(desk, attempt, audit.reason)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonDue:
    """A stored delta to be sketched under a replica's seed and compared with the replica's sketch."""

    audit: int
    unit: str
    blob_sha256: Digest
    seed: Digest
    sketch: bytes


def comparisons_due(desk: Desk) -> tuple[ComparisonDue, ...]:
    """Return the comparisons that are awaited."""
    due = []
    for audit in desk.store.audits(AuditState.REPLICATED):
        assert audit.replica is not None
        subject, other = attempt_of(desk, audit.lease), attempt_of(desk, audit.replica)
        assert other.claim_sha256 is not None
        assert other.epoch is not None
        assert other.sketch is not None
        due.append(
            ComparisonDue(
                audit=audit.audit,
                unit=audit.unit,
                blob_sha256=Digest(subject.artifacts[0].blob_sha256),
                seed=desk.sketch_seed(other.epoch, other.claim_sha256),
                sketch=other.sketch,
            )
        )
    return tuple(due)


def record_comparison(desk: Desk, number: int, difference: float) -> None:
    """Take a comparison's result: D of the two sketches."""
    audit = desk.store.audit(number)
    assert audit is not None
    if audit.state is not AuditState.REPLICATED:
        return
    assert audit.replica is not None
    other = attempt_of(desk, audit.replica)
    rules = desk.config.verification
    if difference <= rules.code_tolerance:
        desk.log("agreed", {"audit": audit.audit, "claim": audit.claim, "replica": other.claim_sha256})
        if audit.reason is not AuditReason.LATE and not counts(desk, audit):
            # Established when it was leased, and not any more: its word is not enough, and its work is done.
            move(desk, audit, ReplicaMissing())
            verdicts.judge(desk, other, verdicts.agreed(desk, other))
            return
        if not is_sampled(desk.epoch_secret(audit.epoch), audit.claim, rules.referee_share):
            passed = move(desk, audit, ReplicaAgreed())
            accept_subject(desk, passed, by_referee=False)
            verdicts.judge(desk, other, verdicts.agreed(desk, other))
            return
    else:
        desk.log("disagreed", {"audit": audit.audit, "claim": audit.claim, "replica": other.claim_sha256})
        subject = attempt_of(desk, audit.lease)
        if subject.state is AttemptState.RECEIVED and not in_closed_merge(desk, subject):
            hold_back(desk, subject, audit.reason)
    deadline_ms = desk.clock.now_ms() + desk.config.rounds.upload_ms
    doubted, instructions = advance(audit, ReplicaDoubted(deadline_ms=deadline_ms))
    desk.store.save_audit(audit, doubted)
    if any(isinstance(instruction, FetchReplica) for instruction in instructions):
        wanted, _ = advance_attempt(other, BytesWanted(deadline_ms=deadline_ms))
        desk.store.save_attempt(other, wanted)


def expire_audits(desk: Desk) -> int:
    """Let audits go on whose replica did not come in time; return how many."""
    now = desk.clock.now_ms()
    ended = 0
    for audit in (*desk.store.audits(AuditState.WANTS_REPLICA), *desk.store.audits(AuditState.WANTS_BYTES)):
        if now < audit.deadline_ms:
            continue
        ended += 1
        if audit.state is AuditState.WANTS_BYTES:
            assert audit.replica is not None
            forfeit(desk, attempt_of(desk, audit.replica))
        else:
            move(desk, audit, ReplicaMissing())
    return ended


def is_forfeit(attempt: Attempt) -> bool:
    """Say whether a claim was drawn for an audit, its time is over, and it comes now that another result stands.

    Else whoever withholds a drawn claim could have it excused as soon as others have done the unit. A newcomer knows
    that everything of it is audited, and has nothing to gain.
    """
    drawn = attempt.scrutiny is Scrutiny.PENDING and attempt.reason is not AuditReason.PROBATION
    return drawn and attempt.deadline_ms == NEVER_MS


def forfeit(desk: Desk, attempt: Attempt) -> None:
    """Reject a claim that was to be looked at and whose bytes never came."""
    verdicts.judge(desk, attempt, verdicts.forfeited(desk, attempt))
    distrust(desk, attempt.owner)
    replica_gone(desk, attempt.lease)
