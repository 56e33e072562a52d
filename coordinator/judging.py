"""Audits: opened, answered by replicas and referees, concluded; and what a ban leads to.

The rules are in `coordinator.audits` and `coordinator.owners`; here they meet the database. Source: PROTOCOL.md
section 5.
"""

from dataclasses import dataclass, replace

from coordinator import verdicts
from coordinator.audits import (
    OPEN_AUDITS,
    AcceptSubject,
    Appealed,
    Audit,
    AuditEvent,
    AuditReason,
    AuditState,
    BothRefuted,
    Confirmed,
    FetchReplica,
    Refuted,
    RejectSubject,
    ReplicaAgreed,
    ReplicaDoubted,
    ReplicaMissing,
    ReplicaReceived,
    ReplicaSketched,
    Scrutiny,
    SubjectGone,
    advance,
    may_take,
)
from coordinator.desk import Desk
from coordinator.leasing import end_lease
from coordinator.owners import AuditPassed, Banned, Cleared, OwnerState, RecheckMerged
from coordinator.records import fail_if_established, owner_of, tell
from coordinator.rounds import RoundState
from coordinator.sessions import Session
from coordinator.units import Attempt, AttemptState, BytesWanted, Excused, Expired, Unit, UnitState
from coordinator.units import advance as advance_attempt
from protocol.canonical import sha256_hex
from protocol.documents import Artifact, Digest, LeaseId, Opinion, parse_payload, verify
from protocol.envelope import parse_envelope
from protocol.errors import AppealRefused, AuditUnknown, ClaimUnknown, PayloadInvalid
from protocol.keys import KeyId
from protocol.limits import APPEAL_MS, AUDIT_PATIENCE_MS, MAX_OPINIONS, MAX_PEER_DOCUMENT_BYTES, SECOND_MS
from verify.compare import Comparison
from verify.compare import judge as judge_comparison
from verify.policy import is_sampled

REPLICA_SHARE = 4
"""A replica's first asker is awaited for a quarter of a lease; then the referee goes on alone."""
REPLICA_AT_LEAST_MS = 10 * SECOND_MS
_CLAIMED = (AttemptState.CLAIMED, AttemptState.SKETCHED, AttemptState.EXCUSED, AttemptState.RECEIVED)


# --- opening ---------------------------------------------------------------------------------------------------


def open_audit(desk: Desk, subject: Attempt, reason: AuditReason, replica: Attempt | None = None) -> Audit:
    """Open an audit of a claim whose bytes are here.

    Args:
        replica: an attempt at the same unit that is claimed and sketched already.
    """
    assert subject.claim_sha256 is not None
    assert subject.epoch is not None
    if replica is not None:
        state = AuditState.REPLICATED
    elif reason is AuditReason.RECHECK or not desk.store.established_others(subject.owner):
        state = AuditState.WANTS_REFEREE
    else:
        state = AuditState.WANTS_REPLICA
    wait_ms = max(REPLICA_AT_LEAST_MS, desk.config.rounds.lease_ms // REPLICA_SHARE)
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
            deadline_ms=desk.clock.now_ms() + wait_ms,
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


def _move(desk: Desk, audit: Audit, event: AuditEvent) -> Audit:
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


# --- replicas --------------------------------------------------------------------------------------------------


def take_as_replica(desk: Desk, attempt: Attempt) -> Attempt:
    """Excuse a sketched attempt whose unit has a result already, and have the two compared; else leave it as it is."""
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    audit = _waiting_for(desk, attempt)
    standing = None if audit or unit.state is UnitState.SETTLED else _standing(desk, attempt)
    if audit is None and standing is None and unit.state is not UnitState.SETTLED:
        return attempt
    excused, _ = advance_attempt(attempt, Excused())
    desk.store.save_attempt(attempt, excused)
    if audit is not None:
        _move(desk, replace(audit, replica=attempt.lease) if audit.replica is None else audit, ReplicaSketched())
    elif standing is not None and _may_doubt(desk, excused, standing):
        open_audit(desk, standing, AuditReason.LATE, excused)
    else:
        # Its unit is merged, or will not be: the result may be public by now, so agreeing with it would prove nothing.
        verdicts.judge(desk, excused, verdicts.unused(desk, excused, unit))
        excused = _attempt(desk, attempt.lease)
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


def _standing(desk: Desk, attempt: Attempt) -> Attempt | None:
    """Return another attempt at the unit whose bytes are here and that is not judged."""
    for other in desk.store.attempts_of_unit(attempt.unit):
        if other.lease != attempt.lease and other.state is AttemptState.RECEIVED:
            return other
    return None


def replica_received(desk: Desk, attempt: Attempt) -> bool:
    """Hand a replica's bytes on to the referee; say whether the attempt was one."""
    found = False
    for audit in desk.store.audits_of_replica(attempt.lease):
        if audit.state is AuditState.WANTS_BYTES:
            _move(desk, audit, ReplicaReceived())
            found = True
            _hold_back(desk, attempt, audit.reason)
    return found


def _hold_back(desk: Desk, attempt: Attempt, reason: AuditReason) -> None:
    """Let nothing of a disagreement be merged before a referee has looked."""
    if attempt.scrutiny is Scrutiny.NONE:
        held = replace(attempt, scrutiny=Scrutiny.PENDING, reason=attempt.reason or reason)
        desk.store.save_attempt(attempt, held)


def replica_gone(desk: Desk, lease: LeaseId) -> None:
    """Let the audits that waited for this replica go on without it."""
    for audit in desk.store.audits_of_replica(lease):
        if is_open(audit):
            _move(desk, audit, ReplicaMissing())


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
        subject, other = _attempt(desk, audit.lease), _attempt(desk, audit.replica)
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
    other = _attempt(desk, audit.replica)
    rules = desk.config.verification
    if difference <= rules.code_tolerance:
        desk.log("agreed", {"audit": audit.audit, "claim": audit.claim, "replica": other.claim_sha256})
        if audit.reason is not AuditReason.LATE and not _counts(desk, audit):
            # Established when it was leased, and not any more: its word is not enough, and its work is done.
            _move(desk, audit, ReplicaMissing())
            verdicts.judge(desk, other, verdicts.agreed(desk, other))
            return
        if not is_sampled(desk.epoch_secret(audit.epoch), audit.claim, rules.referee_share):
            passed = _move(desk, audit, ReplicaAgreed())
            _accept_subject(desk, passed, by_referee=False)
            verdicts.judge(desk, other, verdicts.agreed(desk, other))
            return
    else:
        desk.log("disagreed", {"audit": audit.audit, "claim": audit.claim, "replica": other.claim_sha256})
        subject = _attempt(desk, audit.lease)
        if subject.state is AttemptState.RECEIVED and not in_closed_merge(desk, subject):
            _hold_back(desk, subject, audit.reason)
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
            forfeit(desk, _attempt(desk, audit.replica))
        else:
            _move(desk, audit, ReplicaMissing())
    return ended


def forfeit(desk: Desk, attempt: Attempt) -> None:
    """Reject a claim that was to be looked at and whose bytes never came."""
    verdicts.judge(desk, attempt, verdicts.forfeited(desk, attempt))
    fail_if_established(desk, attempt.owner)
    replica_gone(desk, attempt.lease)


# --- referees --------------------------------------------------------------------------------------------------


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
    audit = min(free, key=lambda audit: (audit.auditor != session.device, audit.audit))
    patience_ms = max(AUDIT_PATIENCE_MS, 2 * desk.config.rounds.lease_ms)
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


def _judges(desk: Desk, audit: Audit) -> set[KeyId]:
    """Return who has given an opinion on an audit's claim already."""
    audits = (*desk.store.audits_of_subject(audit.lease), *desk.store.audits_of_replica(audit.lease))
    envelopes = [envelope for other in audits for envelope in desk.store.opinions(other.audit)]
    opinions = [parse_payload(Opinion, parse_envelope(envelope).payload) for envelope in envelopes]
    return {KeyId(opinion.auditor) for opinion in opinions if opinion.claim == audit.claim}


def _judged_together(desk: Desk, audit: Audit) -> list[Attempt]:
    """Return the subject, and the replica if its bytes are here."""
    attempts = [_attempt(desk, audit.lease)]
    if audit.replica is not None:
        other = _attempt(desk, audit.replica)
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
    other = None if audit.replica is None else _attempt(desk, audit.replica)
    on_other = None if other is None or other.claim_sha256 is None else opinions.get(other.claim_sha256)
    event: AuditEvent
    if opinions[audit.claim].finding == "confirmed":
        event = Confirmed()
    elif on_other is not None and on_other.finding == "refuted":
        event = BothRefuted(auditor=auditor)
    else:
        event = Refuted(auditor=auditor)
    moved, instructions = advance(audit, event)
    if moved.state is AuditState.FAILED:
        moved = replace(moved, deadline_ms=desk.clock.now_ms() + APPEAL_MS)
    desk.store.save_audit(audit, moved)
    for instruction in instructions:
        if isinstance(instruction, AcceptSubject):
            _accept_subject(desk, moved, by_referee=True)
        elif isinstance(instruction, RejectSubject):
            _reject(desk, _attempt(desk, audit.lease), opinions[audit.claim])
    if instructions and on_other is not None and other is not None:
        _settle_replica(desk, _attempt(desk, other.lease), on_other, auditor)
    elif instructions and other is not None and other.state is AttemptState.EXCUSED:
        verdicts.judge(desk, other, verdicts.agreed(desk, other))


def _accept_subject(desk: Desk, audit: Audit, *, by_referee: bool) -> None:
    subject = _attempt(desk, audit.lease)
    owner = owner_of(desk, subject.owner)
    if audit.appealed:
        unit = desk.store.unit(subject.unit)
        assert unit is not None
        taken_out = unit.unmerged_in is not None or _is_being_taken_out(desk, unit)
        still_merged = unit.chosen == subject.lease and not taken_out
        if still_merged and unit.retracted:
            desk.store.save_unit(unit, replace(unit, retracted=False))
        verdicts.rejudge(desk, subject, verdicts.restored(desk, subject, unit.merged_in if still_merged else None))
        if owner.state is OwnerState.BANNED and not desk.store.failed_count(owner.owner):
            tell(desk, owner.owner, Cleared())
        return
    if not by_referee and not _counts(desk, audit):
        return
    counted = subject.scrutiny is Scrutiny.CONFIRMED  # by another audit of the same claim
    if audit.reason is not AuditReason.RECHECK and owner.state is not OwnerState.BANNED and not counted:
        tell(desk, owner.owner, AuditPassed(trained_ms=subject.trained_ms or 0))
    if subject.state is AttemptState.RECEIVED:
        desk.store.save_attempt(subject, replace(subject, scrutiny=Scrutiny.CONFIRMED))


def _is_being_taken_out(desk: Desk, unit: Unit) -> bool:
    current = desk.store.latest_round()
    unpublished = current is not None and current.manifest_sha256 is None
    return unpublished and current is not None and any(out.unit == unit.unit for out in current.unmerge)


def _counts(desk: Desk, audit: Audit) -> bool:
    """Agreement counts only with an established other owner whom we chose; that of newcomers proves nothing.

    Whoever comes late chose itself: a partner could let a lease run out for that.
    """
    if audit.reason is AuditReason.LATE:
        return False
    assert audit.replica is not None
    other = owner_of(desk, _attempt(desk, audit.replica).owner)
    return other.owner != audit.owner and other.state is OwnerState.ESTABLISHED


def _settle_replica(desk: Desk, other: Attempt, opinion: Opinion, auditor: KeyId) -> None:
    """Judge a replica that a referee looked at; one that is confirmed stands for its unit if nothing else does."""
    if other.state is not AttemptState.RECEIVED:
        return
    if opinion.finding == "refuted":
        _record_refuted(desk, other, auditor)
        _reject(desk, other, opinion)
        return
    if owner_of(desk, other.owner).state is not OwnerState.BANNED:
        tell(desk, other.owner, AuditPassed(trained_ms=other.trained_ms or 0))
    unit = desk.store.unit(other.unit)
    assert unit is not None
    too_old = other.late > desk.config.rounds.staleness_bound
    if unit.state is UnitState.SETTLED or too_old or _standing(desk, other) is not None:
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


def _reject(desk: Desk, attempt: Attempt, opinion: Opinion) -> None:
    """Reject a refuted claim, or take it back if it was merged; and ban its owner."""
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    if attempt.state is AttemptState.JUDGED:
        if unit.chosen == attempt.lease and not unit.retracted:
            desk.store.save_unit(unit, replace(unit, retracted=True))
            verdicts.rejudge(desk, attempt, verdicts.retracted(desk, attempt, opinion))
    elif in_closed_merge(desk, attempt):
        # It will be merged in a moment, and taken out with the next checkpoint; `tell_retracted` says so then.
        desk.store.save_unit(unit, replace(unit, retracted=True))
    else:
        verdicts.judge(desk, attempt, verdicts.differs(desk, attempt, opinion))
    for audit in desk.store.audits_of_subject(attempt.lease):
        if is_open(audit) and not audit.appealed:
            drop(desk, audit)  # there is nothing to find out any more
    ban(desk, attempt.owner)


def tell_retracted(desk: Desk, lease: LeaseId) -> None:
    """Give the verdict on a merged claim that was refuted while its merge was under way."""
    attempt = _attempt(desk, lease)
    for audit in desk.store.audits_of_subject(lease):
        for envelope in desk.store.opinions(audit.audit) if audit.state is AuditState.FAILED else ():
            opinion = parse_payload(Opinion, parse_envelope(envelope).payload)
            if opinion.claim == attempt.claim_sha256 and opinion.auditor == audit.refuted_by:
                verdicts.rejudge(desk, attempt, verdicts.retracted(desk, attempt, opinion))
                return


# --- bans ------------------------------------------------------------------------------------------------------


def ban(desk: Desk, owner: KeyId) -> None:
    """Ban an owner: nothing of it is merged any more, and what was merged unaudited is audited now."""
    if owner_of(desk, owner).state is OwnerState.BANNED:
        return
    instructions = tell(desk, owner, Banned())
    for listed in desk.store.unmerged_of_owner(owner):
        attempt = _attempt(desk, listed.lease)  # an audit that was dropped a moment ago may have judged it
        if attempt.state is AttemptState.JUDGED:
            continue
        if attempt.state is AttemptState.LEASED:
            end_lease(desk, attempt, Expired())
        elif not in_closed_merge(desk, attempt):
            verdicts.judge(desk, attempt, verdicts.banned(desk, attempt))
            for audit in desk.store.audits_of_subject(attempt.lease):
                if is_open(audit):
                    drop(desk, audit)
        replica_gone(desk, attempt.lease)
    for instruction in instructions:
        if isinstance(instruction, RecheckMerged):
            _audit_back(desk, instruction.owner)


def drop(desk: Desk, audit: Audit) -> None:
    """End an audit whose subject was judged for another reason; its replica keeps its credit."""
    _move(desk, audit, SubjectGone())
    if audit.replica is not None:
        other = _attempt(desk, audit.replica)
        if other.state in _CLAIMED and other.scrutiny is not Scrutiny.CONFIRMED:
            verdicts.judge(desk, other, verdicts.uncompared(desk, other))


def _audit_back(desk: Desk, owner: KeyId) -> None:
    current = desk.store.latest_round()
    assert current is not None  # something was merged
    oldest = current.round - desk.retain_rounds if desk.retain_rounds else 0
    for attempt in desk.store.merged_unaudited_of_owner(owner):
        unit = desk.store.unit(attempt.unit)
        assert unit is not None
        if unit.merged_in is None or unit.merged_in > oldest:
            open_audit(desk, attempt, AuditReason.RECHECK)


def drop_pruned(desk: Desk, published: int) -> None:
    """End audits back whose deltas are kept no longer: nobody can judge them, and they must not keep auditors busy."""
    oldest = published - desk.retain_rounds if desk.retain_rounds else 0
    for state in (AuditState.WANTS_REFEREE, AuditState.WANTS_SECOND):
        for audit in desk.store.audits(state):
            unit = desk.store.unit(audit.unit)
            assert unit is not None
            if unit.merged_in is not None and unit.merged_in <= oldest and unit.chosen == audit.lease:
                drop(desk, audit)


def in_closed_merge(desk: Desk, attempt: Attempt) -> bool:
    """Say whether the attempt is in a merge set that is fixed and not published yet."""
    current = desk.store.latest_round()
    if current is None or current.state not in (RoundState.CLOSED, RoundState.MERGING):
        return False
    return any(entry.claim == attempt.claim_sha256 for entry in current.merge)


# --- appeals ---------------------------------------------------------------------------------------------------


def appeal(desk: Desk, session: Session, claim: bytes) -> None:
    """Send a claim that a referee refuted to another one.

    Raises:
        ClaimUnknown: it is no claim of this device.
        AppealRefused: no referee refuted it, it was appealed before, or the time for it is over.
    """
    attempt = desk.store.attempt_of_claim(Digest(claim.hex())) if len(claim) == 32 else None
    if attempt is None or attempt.device != session.device:
        raise ClaimUnknown
    if attempt.state is not AttemptState.JUDGED:
        raise AppealRefused  # there is no verdict yet
    for audit in reversed(desk.store.audits_of_subject(attempt.lease)):
        if audit.appealed and is_open(audit):
            return  # asked again
        if audit.state is AuditState.FAILED and not audit.appealed and desk.clock.now_ms() < audit.deadline_ms:
            desk.log("appeal", {"audit": audit.audit, "claim": audit.claim})
            # The replica, if there was one, has its verdict; the second referee judges this claim alone.
            moved, _ = advance(audit, Appealed())
            desk.store.save_audit(audit, replace(moved, replica=None))
            return
    raise AppealRefused


# --- epochs ----------------------------------------------------------------------------------------------------


def reveal_epochs(desk: Desk, published: int) -> int:
    """Reveal the secret of each epoch up to `published` whose drawn claims are settled; return how many."""
    first = int(desk.store.meta(_REVEALED) or 0) + 1
    revealed = 0
    for epoch in range(first, published + 1):
        if desk.store.in_doubt_count(epoch):
            break  # in their order: whoever reads the log need not search for a gap
        desk.log("epoch-revealed", {"epoch": epoch, "secret": desk.epoch_secret(epoch).hex()})
        desk.store.put_meta(_REVEALED, str(epoch))
        revealed += 1
    return revealed


def is_revealed(desk: Desk, epoch: int) -> bool:
    """Say whether an epoch's secret is public, so that everybody knows which of its claims were drawn."""
    return epoch <= int(desk.store.meta(_REVEALED) or 0)


_REVEALED = "epochs_revealed"


def _attempt(desk: Desk, lease: LeaseId) -> Attempt:
    found = desk.store.attempt(lease)
    assert found is not None  # a foreign key
    return found
