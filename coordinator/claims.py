"""What a device says of its work: the claim, the sketch, the bytes; and what it gets for each."""

import struct
from dataclasses import dataclass, replace

from coordinator import auditing, epochs, replicas, verdicts
from coordinator.audits import AuditReason, Scrutiny
from coordinator.bans import distrust
from coordinator.desk import Desk
from coordinator.leasing import check_admitted
from coordinator.owners import OwnerState
from coordinator.records import as_long_ms, owner_of
from coordinator.rounds import Round, RoundState
from coordinator.sessions import Session
from coordinator.units import (
    Attempt,
    AttemptState,
    Claimed,
    OfferToUnit,
    Received,
    Sketched,
    UnitAssigned,
    UnitState,
    advance,
)
from protocol.assignment import most_samples, unit_samples
from protocol.calls import Instruction
from protocol.canonical import sha256_hex
from protocol.documents import (
    Artifact,
    BytesReceipt,
    Claim,
    ClaimReceipt,
    Digest,
    LeaseId,
    UnitId,
    Verdict,
    parse_payload,
    sign,
    verify,
)
from protocol.envelope import open_envelope, parse_envelope
from protocol.errors import (
    BytesRefused,
    ClaimConflict,
    ClaimMismatch,
    ClaimUnknown,
    LeaseEnded,
    LeaseUnknown,
    Refusal,
    RoundTooOld,
    SketchInvalid,
    StepOutOfOrder,
    WrongRun,
)
from protocol.limits import MAX_PEER_DOCUMENT_BYTES, SKETCH_BYTES, SKETCH_FLOATS
from verify.policy import audit_share, by_size, is_drawn, too_fast

_NEXT = {
    AttemptState.CLAIMED: Instruction.SKETCH,
    AttemptState.SKETCHED: Instruction.UPLOAD,
    AttemptState.EXCUSED: Instruction.KEEP,
    AttemptState.RECEIVED: Instruction.DONE,
    AttemptState.JUDGED: Instruction.DONE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimAnswer:
    """The receipt of a claim and what must follow; or the refusal of a second claim, kept as evidence."""

    receipt: bytes = b""
    next: Instruction = Instruction.DONE
    conflict: Refusal | None = None


def submit_claim(desk: Desk, session: Session, raw: bytes) -> ClaimAnswer:
    """Take a claim. The same claim again gives the same receipt; another one for the lease is evidence.

    Checks: 0 signature by the session's device; 1 run and device; 2 the lease is this device's; 3 the lease's own
    bytes and unit; 4 artifacts; 5 no other claim; 6 the lease still takes claims; 7 the run goes on, and the round is
    not too old. A banned owner's claims are not taken at all.
    """
    check_admitted(desk, session)
    claim = verify(Claim, raw, session.device_key, max_bytes=MAX_PEER_DOCUMENT_BYTES)  # 0
    payload = open_envelope(raw, Claim.TYPE, session.device_key)
    if claim.run != desk.run or claim.device != session.device:  # 1
        raise WrongRun("The claim names another run or another device than this session.")
    attempt = desk.store.attempt(LeaseId(claim.lease))
    if (
        attempt is None or attempt.device != session.device or attempt.owner != session.owner
    ):  # 2, stops claims for units that others train
        raise LeaseUnknown
    if claim.lease_sha256 != attempt.lease_sha256 or claim.unit != attempt.unit:  # 3
        raise ClaimMismatch("The claim does not bind the lease that was given.")
    _check_artifacts(desk, claim)  # 4
    digest = Digest(sha256_hex(payload))
    if attempt.claim_sha256 is not None:  # 5
        if attempt.claim_sha256 == digest:
            assert attempt.claim_receipt is not None  # stored with the claim
            return ClaimAnswer(receipt=attempt.claim_receipt, next=_NEXT[attempt.state])
        desk.store.add_evidence(attempt.lease, raw)
        _doubt_conflict(desk, attempt)
        return ClaimAnswer(conflict=ClaimConflict())
    if attempt.state not in {AttemptState.LEASED, AttemptState.EXPIRED}:  # 6
        raise LeaseEnded
    if not auditing.serves(desk, attempt.lease):  # 7; a replica is not for the merge
        _check_running(desk)
        _check_age(desk, attempt.round)
    return ClaimAnswer(receipt=_accept_claim(desk, attempt, claim, raw, digest), next=Instruction.SKETCH)


def _check_artifacts(desk: Desk, claim: Claim) -> None:
    roles = [artifact.role for artifact in claim.artifacts]
    if roles != ["delta"]:
        raise ClaimMismatch(f"The lease asks for one artifact, delta; the claim has {', '.join(roles)}.")
    size = claim.artifacts[0].size
    if not 0 < size <= desk.delta_bytes:
        raise ClaimMismatch(f"A delta of this run has at most {desk.delta_bytes} bytes; the claim says {size}.")
    samples = unit_samples(desk.config, UnitId(claim.unit))
    if claim.samples != samples:
        raise ClaimMismatch(f"This unit has {samples} samples; the claim says {claim.samples}.")


def _doubt_conflict(desk: Desk, attempt: Attempt) -> None:
    """Two signed claims for one lease: the first one stands, and is looked at."""
    waiting = attempt.state in (AttemptState.CLAIMED, AttemptState.SKETCHED, AttemptState.RECEIVED)
    audited = desk.config.verification.mode == "replay" and not auditing.in_closed_merge(desk, attempt)
    if audited and waiting and attempt.scrutiny is Scrutiny.NONE:
        auditing.put_in_doubt(desk, attempt, AuditReason.CONFLICT)


def _check_running(desk: Desk) -> None:
    """Raise `RoundTooOld` if the run has ended: a draw under a secret that everybody may know would be none."""
    current = _current(desk)
    if current.state is RoundState.PUBLISHED and current.round >= desk.config.rounds.planned:
        raise RoundTooOld(f"The run has ended with checkpoint {current.round}; nothing is merged any more.")


def _check_age(desk: Desk, round_number: int) -> None:
    """Raise `RoundTooOld` if the next merge may not take work of this round any more."""
    late = _late(desk, round_number)
    bound = desk.config.rounds.staleness_bound
    if late > bound and _current(desk).round < desk.config.rounds.planned:
        raise RoundTooOld(
            f"The unit is of round {round_number}; the next merge is round {round_number + late}'s, which takes work "
            f"that is at most {bound} rounds late."
        )


def _late(desk: Desk, round_number: int) -> int:
    """Return by how many rounds work of a round that comes now is late."""
    current = _current(desk)
    # The merge set of a round that no longer collects is fixed: what comes now is for the one after it.
    next_merge = current.round if current.state is RoundState.COLLECTING else current.round + 1
    return max(0, next_merge - round_number)


def _current(desk: Desk) -> Round:
    current = desk.store.latest_round()
    assert current is not None  # a lease was given, so a round was opened
    return current


def _scrutiny(desk: Desk, attempt: Attempt, epoch: int, claim: Digest) -> tuple[int, AuditReason | None, int]:
    """Return the probability of an audit, why there is one if there is, and the time from lease to claim."""
    rules = desk.config.verification
    owner = owner_of(desk, attempt.owner)
    established = owner.state is OwnerState.ESTABLISHED
    share = by_size(
        audit_share(rules, established=established, valid_in_row=owner.valid_in_row),
        samples=unit_samples(desk.config, attempt.unit),
        most=most_samples(desk.config),
    )
    trained_ms = max(0, desk.clock.now_ms() - attempt.leased_ms)
    if rules.mode == "none":
        return share, None, trained_ms
    if not established:
        return share, AuditReason.PROBATION, trained_ms
    if is_drawn(desk.epoch_secret(epoch), claim, share):
        return share, AuditReason.DRAWN, trained_ms
    return (
        share,
        AuditReason.TOO_FAST if too_fast(as_long_ms(desk, attempt.unit, trained_ms), owner.audited_ms) else None,
        trained_ms,
    )


def _accept_claim(desk: Desk, attempt: Attempt, claim: Claim, raw: bytes, digest: Digest) -> bytes:
    epoch = _current(desk).round
    share, reason, trained_ms = _scrutiny(desk, attempt, epoch, digest)
    # The claim's own salt keeps its digest from being guessed.
    body = {
        "audit_share": share,
        "claim": digest,
        "epoch": epoch,
        "member": desk.member(attempt.owner),
        "samples": claim.samples,
    }
    entry = desk.log("claim", body)
    receipt = sign(
        ClaimReceipt(
            run=desk.run,
            claim=digest,
            epoch=epoch,
            log_position=entry.position,
            sketch_seed=desk.sketch_seed(epoch, digest),
            audit_share=share,
            secret_sha256=sha256_hex(desk.epoch_secret(epoch)),
        ),
        desk.key,
    )
    event = Claimed(
        claim_sha256=digest,
        claim_envelope=raw,
        artifacts=claim.artifacts,
        receipt=receipt,
        deadline_ms=desk.clock.now_ms() + desk.config.rounds.upload_ms,
        trained_ms=trained_ms,
        epoch=epoch,
        audit_share=share,
        reason=reason,
    )
    claimed, _ = advance(attempt, event)
    desk.store.save_attempt(attempt, claimed)
    return receipt


def _attempt_of(desk: Desk, session: Session, claim: bytes) -> Attempt:
    attempt = desk.store.attempt_of_claim(Digest(claim.hex())) if len(claim) == 32 else None
    if attempt is None or attempt.device != session.device or attempt.owner != session.owner:
        raise ClaimUnknown
    return attempt


def submit_sketch(desk: Desk, session: Session, claim: bytes, sketch: bytes) -> Instruction:
    """Store the sketch that follows a claim; once stored it stays what it is."""
    attempt = _attempt_of(desk, session, claim)
    if len(sketch) != SKETCH_BYTES:
        raise SketchInvalid(f"A sketch has {SKETCH_BYTES} bytes, this one has {len(sketch)}.")
    for value in struct.unpack(f"<{SKETCH_FLOATS}f", sketch):
        if value != value or value in (float("inf"), float("-inf")):
            raise SketchInvalid
    if attempt.state is AttemptState.CLAIMED:
        sketched, _ = advance(attempt, Sketched(sketch=sketch))
        desk.store.save_attempt(attempt, sketched)
        if desk.config.verification.mode == "replay":
            sketched = replicas.take_as_replica(desk, sketched)
        return _NEXT[sketched.state]
    if attempt.sketch is not None and attempt.sketch != sketch:
        raise SketchInvalid("Another sketch was sent for this claim before; the first one stands.")
    return _NEXT[attempt.state]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """An artifact that may be uploaded now. `sketch`: (seed, sketch) of what a replica's bytes must turn out to be."""

    claim: Digest
    artifact: Artifact
    attempt: Attempt
    sketch: tuple[Digest, bytes] | None = None


def expected_artifact(desk: Desk, session: Session, claim: bytes, role: str) -> Expected | bytes:
    """Return the artifact that an upload must bring, or the bytes receipt if everything has arrived.

    Raises `ClaimUnknown`, `StepOutOfOrder`, `ClaimMismatch`, `RoundTooOld`, or the refusal that the bytes met before.
    """
    attempt = _attempt_of(desk, session, claim)
    if attempt.bytes_receipt is not None:
        return attempt.bytes_receipt
    _check_unjudged(attempt)
    if attempt.state is not AttemptState.SKETCHED:
        raise StepOutOfOrder
    sketch = None
    if auditing.serves(desk, attempt.lease):
        assert attempt.epoch is not None
        assert attempt.sketch is not None
        sketch = (desk.sketch_seed(attempt.epoch, Digest(claim.hex())), attempt.sketch)
    else:
        _check_age(desk, attempt.round)
    for artifact in attempt.artifacts:
        if artifact.role == role:
            return Expected(claim=Digest(claim.hex()), artifact=artifact, attempt=attempt, sketch=sketch)
    raise ClaimMismatch(f"The claim has no artifact called {role[:32]!r}.")


def _check_unjudged(attempt: Attempt) -> None:
    if attempt.state is AttemptState.JUDGED:
        assert attempt.verdict_envelope is not None
        verdict = parse_payload(Verdict, parse_envelope(attempt.verdict_envelope).payload)
        raise BytesRefused(f"This claim was {verdict.outcome} already: {verdict.sentence}")


def has_receipt_for(desk: Desk, unit: UnitId, artifact: Artifact) -> bool:
    """Say whether somebody was given a receipt for these very bytes of a unit."""
    attempts = desk.store.attempts_of_unit(unit)
    return any(attempt.bytes_receipt is not None and artifact in attempt.artifacts for attempt in attempts)


def record_received(desk: Desk, lease: LeaseId) -> bytes:
    """The artifact is stored and checked: give the receipt, and offer the attempt to its unit."""
    store = desk.store
    attempt = store.attempt(lease)
    assert attempt is not None
    if attempt.bytes_receipt is not None:
        return attempt.bytes_receipt
    _check_unjudged(attempt)
    if not auditing.serves(desk, lease):
        _check_age(desk, attempt.round)  # the round may have moved on while the bytes travelled: no receipt then
    assert attempt.claim_sha256 is not None
    entry = desk.log("bytes", {"claim": attempt.claim_sha256})
    receipt = sign(
        BytesReceipt(
            run=desk.run, claim=attempt.claim_sha256, artifacts=attempt.artifacts, log_position=entry.position
        ),
        desk.key,
    )
    received, instructions = advance(attempt, Received(receipt=receipt, late=_late(desk, attempt.round)))
    store.save_attempt(attempt, received)
    for instruction in instructions:
        if isinstance(instruction, OfferToUnit):
            _offer(desk, received)
    return receipt


def _offer(desk: Desk, attempt: Attempt) -> None:
    """Let the attempt stand for its unit, audited if it must be; judge it at once if no merge will need it."""
    if replicas.replica_received(desk, attempt):
        return
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    if unit.state is UnitState.SETTLED or auditing.standing_beside(desk, attempt) is not None:
        if replicas.is_forfeit(attempt):
            replicas.forfeit(desk, attempt)
        else:
            verdicts.judge(desk, attempt, verdicts.unused(desk, attempt, unit))
        return
    if attempt.late > desk.config.rounds.staleness_bound:  # in the last round, which refuses no work for its age
        verdicts.judge(desk, attempt, verdicts.too_late(desk, attempt))
        return
    if unit.state is UnitState.OPEN:  # put back meanwhile: nobody else need train it now
        assigned, _ = advance(unit, UnitAssigned())
        desk.store.save_unit(unit, assigned)
    if attempt.scrutiny is Scrutiny.PENDING:
        assert attempt.reason is not None
        auditing.open_audit(desk, attempt, attempt.reason)
    elif desk.config.verification.mode == "replay" and epochs.is_revealed(desk, attempt.epoch or 0):
        # Its volunteer could wait to learn that it was not drawn, and send only then.
        auditing.put_in_doubt(desk, attempt, AuditReason.OVERDUE)


def record_refused(desk: Desk, lease: LeaseId, refusal: Refusal) -> None:
    """The bytes that a claim committed to are not a delta of this run: the claim is rejected, the unit open again."""
    attempt = desk.store.attempt(lease)
    assert attempt is not None
    if attempt.state is not AttemptState.SKETCHED:
        return
    marked = replace(attempt, refused=True)
    desk.store.save_attempt(attempt, marked)
    verdicts.judge(desk, marked, verdicts.refused(desk, marked, refusal))
    if desk.config.verification.mode == "replay":
        distrust(desk, attempt.owner)
        auditing.replica_gone(desk, lease)
