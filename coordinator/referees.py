"""Referees: auditors take audits, read the claims, and give signed opinions, which alone refute.

Source: PROTOCOL.md section 5.
"""

from dataclasses import dataclass, replace

from coordinator import verdicts
from coordinator.acceptance import accept_subject
from coordinator.auditing import attempt_of, in_closed_merge, opinions_of, standing_beside
from coordinator.audits import (
    AcceptSubject,
    Audit,
    AuditEvent,
    AuditReason,
    AuditState,
    BothRefuted,
    Confirmed,
    Refuted,
    RejectSubject,
    Scrutiny,
    Unanswered,
    advance,
    may_take,
)
from coordinator.bans import distrust, reject
from coordinator.desk import Desk
from coordinator.owners import AuditPassed, OwnerState
from coordinator.records import as_long_ms, owner_of, tell
from coordinator.sessions import Session
from coordinator.units import Attempt, AttemptState, UnitState
from protocol.canonical import sha256_hex
from protocol.documents import Artifact, Digest, Opinion, verify
from protocol.envelope import parse_envelope
from protocol.errors import AuditUnknown, PayloadInvalid
from protocol.keys import KeyId
from protocol.limits import APPEAL_MS, AUDIT_PATIENCE_MS, MAX_OPINIONS, MAX_PEER_DOCUMENT_BYTES
from verify.compare import Comparison
from verify.compare import judge as judge_comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOrder:
    """What an auditor judges: a unit, and the claims on it with their devices' public keys."""

    audit: int
    round: int
    index: int
    claims: tuple[bytes, ...]
    device_keys: tuple[bytes, ...]
    remaining_ms: int


def take_audit(desk: Desk, session: Session) -> AuditOrder | None:
    """Give an auditor the oldest audit that it may judge; the one it already has first."""
    now = desk.clock.now_ms()
    waiting = (*desk.store.audits(AuditState.WANTS_SECOND), *desk.store.audits(AuditState.WANTS_REFEREE))
    free = [
        audit
        for audit in waiting
        if may_take(audit, session.device, now)
        and not (audit.state is AuditState.WANTS_SECOND and session.device in _judges(desk, audit))
    ]
    if not free:
        return None
    # Newcomers' claims last: keys are free, and a flood of them must not keep the rounds of everybody else waiting.
    audit = min(free, key=lambda it: (it.auditor != session.device, it.reason is AuditReason.PROBATION, it.audit))
    patience_ms = _patience_ms(desk)
    taken = replace(audit, auditor=session.device, deadline_ms=now + patience_ms)
    desk.store.save_audit(audit, taken)
    unit = desk.store.unit(audit.unit)
    assert unit is not None
    attempts = _judged_together(desk, audit)
    devices = [desk.store.device(attempt.device) for attempt in attempts]
    return AuditOrder(
        audit=audit.audit,
        round=unit.round,
        index=unit.index,
        claims=tuple(attempt.claim_envelope or b"" for attempt in attempts),
        device_keys=tuple(bytes.fromhex(device.public_key) for device in devices if device is not None),
        remaining_ms=patience_ms,
    )


def _patience_ms(desk: Desk) -> int:
    """Return how long an auditor is awaited."""
    return max(AUDIT_PATIENCE_MS, 2 * desk.config.rounds.lease_ms)


def _judges(desk: Desk, audit: Audit) -> set[KeyId]:
    """Return who has given an opinion on an audit's claim already."""
    audits = (*desk.store.audits_of_subject(audit.lease), *desk.store.audits_of_replica(audit.lease))
    opinions = [opinion for other in audits for opinion in opinions_of(desk, other)]
    return {KeyId(opinion.auditor) for opinion in opinions if opinion.claim == audit.claim}


def _judged_together(desk: Desk, audit: Audit) -> list[Attempt]:
    """Return the subject, and the replica if its bytes are here."""
    attempts = [attempt_of(desk, audit.lease)]
    if audit.replica is not None:
        other = attempt_of(desk, audit.replica)
        if other.bytes_receipt is not None:
            attempts.append(other)
    return attempts


def _held_by(desk: Desk, auditor: KeyId, claim: str) -> Audit:
    for state in (AuditState.WANTS_SECOND, AuditState.WANTS_REFEREE):
        for audit in desk.store.audits(state):
            if audit.auditor == auditor and any(
                attempt.claim_sha256 == claim for attempt in _judged_together(desk, audit)
            ):
                return audit
    raise AuditUnknown


def artifact_to_judge(desk: Desk, session: Session, claim: bytes, role: str) -> Artifact:
    """Return the artifact that an auditor may read; raise `AuditUnknown`."""
    audit = _held_by(desk, session.device, claim.hex())
    for attempt in _judged_together(desk, audit):
        for artifact in attempt.artifacts:
            if attempt.claim_sha256 == claim.hex() and artifact.role == role:
                return artifact
    raise AuditUnknown(f"The claim has no artifact called {role[:32]!r}.")


def submit_opinions(desk: Desk, session: Session, envelopes: tuple[bytes, ...]) -> None:
    """Take an auditor's opinions on the claims of one audit, and conclude it.

    Raises:
        AuditUnknown: the auditor holds no such audit (any more).
        PayloadInvalid: an opinion is missing, or does not follow from its own numbers.
        DocumentRefused: a signature or a form does not hold.
    """
    if not 1 <= len(envelopes) <= MAX_OPINIONS:
        raise PayloadInvalid(f"An audit has 1 to {MAX_OPINIONS} opinions, these are {len(envelopes)}.")
    opinions = [_verified(desk, session, envelope) for envelope in envelopes]
    audit = _held_by(desk, session.device, opinions[0].claim)
    attempts = {attempt.claim_sha256: attempt for attempt in _judged_together(desk, audit)}
    right = all(opinion.unit == audit.unit for opinion in opinions)
    if not right or {opinion.claim for opinion in opinions} != set(attempts) or len(opinions) != len(attempts):
        raise AuditUnknown("The opinions are not on the claims of this audit, each once; take the audit again.")
    for opinion, envelope in zip(opinions, envelopes, strict=True):
        claim = Digest(opinion.claim)
        desk.store.add_opinion(audit.audit, claim, session.device, opinion.finding, envelope)
        desk.log(
            "opinion",
            {
                "audit": audit.audit,
                "auditor": opinion.auditor,
                "claim": opinion.claim,
                "code_difference": opinion.code_difference,
                "finding": opinion.finding,
                "opinion_sha256": sha256_hex(parse_envelope(envelope).payload),
                "raw_difference": opinion.raw_difference,
            },
        )
    _conclude(desk, audit, {Digest(opinion.claim): opinion for opinion in opinions}, session.device)


def _verified(desk: Desk, session: Session, envelope: bytes) -> Opinion:
    opinion = verify(Opinion, envelope, session.device_key, max_bytes=MAX_PEER_DOCUMENT_BYTES)
    if opinion.run != desk.run or opinion.auditor != session.device:
        raise PayloadInvalid("The opinion is of another run or of another auditor than this session.")
    numbers = Comparison(raw_difference=opinion.raw_difference, code_difference=opinion.code_difference)
    if judge_comparison(numbers, desk.config.verification) != opinion.finding:
        # Stops an auditor that reads the run's tolerances otherwise than everybody else.
        raise PayloadInvalid(f"The opinion says {opinion.finding}, which does not follow from its numbers.")
    return opinion


def _conclude(desk: Desk, audit: Audit, opinions: dict[Digest, Opinion], auditor: KeyId) -> None:
    other = None if audit.replica is None else attempt_of(desk, audit.replica)
    on_other = None if other is None or other.claim_sha256 is None else opinions.get(other.claim_sha256)
    event: AuditEvent
    if opinions[audit.claim].finding == "confirmed":
        event = Confirmed()
    elif on_other is not None and on_other.finding == "refuted":
        event = BothRefuted(auditor=auditor, deadline_ms=desk.clock.now_ms() + _patience_ms(desk))
    else:
        event = Refuted(auditor=auditor)
    moved, instructions = advance(audit, event)
    if moved.state is AuditState.FAILED:
        moved = replace(moved, deadline_ms=desk.clock.now_ms() + APPEAL_MS)
    desk.store.save_audit(audit, moved)
    for instruction in instructions:
        if isinstance(instruction, AcceptSubject):
            accept_subject(desk, moved, by_referee=True)
        elif isinstance(instruction, RejectSubject) and moved.appealed:
            subject = attempt_of(desk, audit.lease)
            verdicts.rejudge(desk, subject, verdicts.upheld(desk, subject, opinions[audit.claim]))
        elif isinstance(instruction, RejectSubject):
            reject(desk, attempt_of(desk, audit.lease), opinions[audit.claim])
    if instructions and on_other is not None and other is not None:
        _settle_replica(desk, attempt_of(desk, other.lease), on_other, auditor)
    elif instructions and other is not None and other.state is AttemptState.EXCUSED:
        verdicts.judge(desk, other, verdicts.agreed(desk, other))


def _settle_replica(desk: Desk, other: Attempt, opinion: Opinion, auditor: KeyId) -> None:
    """Judge a replica that a referee looked at; one that is confirmed stands for its unit if nothing else does."""
    if other.state is not AttemptState.RECEIVED:
        return
    if opinion.finding == "refuted":
        _record_refuted(desk, other, auditor)
        reject(desk, other, opinion)
        return
    if owner_of(desk, other.owner).state is not OwnerState.BANNED:
        tell(desk, other.owner, AuditPassed(trained_ms=as_long_ms(desk, other.unit, other.trained_ms or 0)))
    unit = desk.store.unit(other.unit)
    assert unit is not None
    too_old = other.late > desk.config.rounds.staleness_bound
    if unit.state is UnitState.SETTLED or too_old or standing_beside(desk, other) is not None:
        verdicts.judge(desk, other, verdicts.agreed(desk, other))
    else:
        desk.store.save_attempt(other, replace(other, scrutiny=Scrutiny.CONFIRMED))


def _record_refuted(desk: Desk, other: Attempt, auditor: KeyId) -> None:
    """Give a refuted replica an audit of its own, which its volunteer can appeal against."""
    assert other.claim_sha256 is not None
    assert other.epoch is not None
    audit = desk.store.add_audit(
        Audit(
            audit=0,
            unit=other.unit,
            lease=other.lease,
            owner=other.owner,
            claim=other.claim_sha256,
            epoch=other.epoch,
            reason=AuditReason.REPLICA,
            state=AuditState.FAILED,
            deadline_ms=desk.clock.now_ms() + APPEAL_MS,
            refuted_by=auditor,
        )
    )
    desk.log("audit", {"audit": audit.audit, "claim": audit.claim, "reason": audit.reason.value})


def expire_second_opinions(desk: Desk) -> int:
    """End the audits whose second referee did not come in time, without banning anybody; return how many.

    What each side had claimed is rejected, both owners begin probation again, and their newest merged units are audited
    back: they lied, or the referee computes wrongly, and nobody is here who could say which.
    """
    due = [
        audit
        for audit in desk.store.audits(AuditState.WANTS_SECOND)
        if not audit.appealed and audit.deadline_ms <= desk.clock.now_ms()
    ]
    for audit in due:
        ended, _ = advance(audit, Unanswered())
        desk.store.save_audit(audit, ended)
        for lease in (audit.lease, audit.replica):
            attempt = None if lease is None else attempt_of(desk, lease)
            if attempt is not None and attempt.state is not AttemptState.JUDGED and not in_closed_merge(desk, attempt):
                verdicts.judge(desk, attempt, verdicts.undecided(desk, attempt))
                distrust(desk, attempt.owner)
    return len(due)
