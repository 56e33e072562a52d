"""What a device says of its work: the claim, the sketch, the bytes; and what it gets for each."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.desk import Desk
from coordinator.leasing import release_unit
from coordinator.rounds import RoundState
from coordinator.sessions import Session
from coordinator.units import (
    Attempt,
    AttemptState,
    Claimed,
    Judged,
    OfferToUnit,
    Outcome,
    PublishVerdict,
    Received,
    ReleaseUnit,
    Sketched,
    Unit,
    UnitAccepted,
    UnitState,
    advance,
)
from coordinator.units import Instruction as Instruct
from protocol.calls import Instruction
from protocol.canonical import sha256_hex
from protocol.documents import (
    Artifact,
    BytesReceipt,
    Claim,
    ClaimReceipt,
    Digest,
    LeaseId,
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
    bytes and unit; 4 artifacts; 5 no other claim; 6 the lease still takes claims; 7 the round is not too old.
    """
    claim = verify(Claim, raw, session.device_key, max_bytes=MAX_PEER_DOCUMENT_BYTES)  # 0
    payload = open_envelope(raw, Claim.TYPE, session.device_key)
    if claim.run != desk.run or claim.device != session.device:  # 1
        raise WrongRun("The claim names another run or another device than this session.")
    attempt = desk.store.attempt(LeaseId(claim.lease))
    if attempt is None or attempt.device != session.device:  # 2, stops claims for units that others train
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
        return ClaimAnswer(conflict=ClaimConflict())
    if attempt.state not in {AttemptState.LEASED, AttemptState.EXPIRED}:  # 6
        raise LeaseEnded
    _check_age(desk, attempt.round)  # 7
    return ClaimAnswer(receipt=_accept_claim(desk, attempt, claim, raw, digest), next=Instruction.SKETCH)


def _check_artifacts(desk: Desk, claim: Claim) -> None:
    roles = [artifact.role for artifact in claim.artifacts]
    if roles != ["delta"]:
        raise ClaimMismatch(f"The lease asks for one artifact, delta; the claim has {', '.join(roles)}.")
    size = claim.artifacts[0].size
    if size != desk.delta_bytes:
        raise ClaimMismatch(f"A delta of this run has exactly {desk.delta_bytes} bytes; the claim says {size}.")
    samples = desk.config.training.steps * desk.config.training.batch
    if claim.samples != samples:
        raise ClaimMismatch(f"A unit of this run has {samples} samples; the claim says {claim.samples}.")


def _check_age(desk: Desk, round_number: int) -> None:
    """Raise `RoundTooOld` if the next merge may not take work of this round any more."""
    current = desk.store.latest_round()
    assert current is not None  # a lease was given, so a round was opened
    # The merge set of a round that no longer collects is fixed: what comes now is for the one after it.
    next_merge = current.round if current.state is RoundState.COLLECTING else current.round + 1
    bound = desk.config.rounds.staleness_bound
    if next_merge - round_number > bound and current.round < desk.config.rounds.planned:
        raise RoundTooOld(
            f"The unit is of round {round_number}; the next merge is round {next_merge}'s, which takes work that is at "
            f"most {bound} rounds late."
        )


def _accept_claim(desk: Desk, attempt: Attempt, claim: Claim, raw: bytes, digest: Digest) -> bytes:
    current = desk.store.latest_round()
    assert current is not None  # a lease was given, so a round was opened
    entry = desk.log("claim", {"claim": digest})  # the claim's own salt keeps its digest from being guessed
    receipt = sign(
        ClaimReceipt(
            run=desk.run,
            claim=digest,
            epoch=current.round,
            log_position=entry.position,
            sketch_seed=desk.sketch_seed(current.round, digest),
        ),
        desk.key,
    )
    event = Claimed(
        claim_sha256=digest,
        claim_envelope=raw,
        artifacts=claim.artifacts,
        receipt=receipt,
        deadline_ms=desk.clock.now_ms() + desk.config.rounds.upload_ms,
    )
    claimed, _ = advance(attempt, event)
    desk.store.save_attempt(attempt, claimed)
    return receipt


def _attempt_of(desk: Desk, session: Session, claim: bytes) -> Attempt:
    attempt = desk.store.attempt_of_claim(Digest(claim.hex())) if len(claim) == 32 else None
    if attempt is None or attempt.device != session.device:
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
        return _NEXT[sketched.state]
    if attempt.sketch is not None and attempt.sketch != sketch:
        raise SketchInvalid("Another sketch was sent for this claim before; the first one stands.")
    return _NEXT[attempt.state]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """An artifact that may be uploaded now."""

    claim: Digest
    artifact: Artifact
    attempt: Attempt


def expected_artifact(desk: Desk, session: Session, claim: bytes, role: str) -> Expected | bytes:
    """Return the artifact that an upload must bring, or the bytes receipt if everything has arrived.

    Raises `ClaimUnknown`, `StepOutOfOrder`, `ClaimMismatch`, `RoundTooOld`, or the refusal that the bytes met before.
    """
    attempt = _attempt_of(desk, session, claim)
    if attempt.bytes_receipt is not None:
        return attempt.bytes_receipt
    if attempt.state is AttemptState.JUDGED:
        assert attempt.verdict_envelope is not None
        verdict = parse_payload(Verdict, parse_envelope(attempt.verdict_envelope).payload)
        raise BytesRefused(f"This claim was {verdict.outcome} already: {verdict.sentence}")
    if attempt.state is not AttemptState.SKETCHED:
        raise StepOutOfOrder
    _check_age(desk, attempt.round)
    for artifact in attempt.artifacts:
        if artifact.role == role:
            return Expected(claim=Digest(claim.hex()), artifact=artifact, attempt=attempt)
    raise ClaimMismatch(f"The claim has no artifact called {role[:32]!r}.")


def record_received(desk: Desk, lease: LeaseId) -> bytes:
    """The artifact is stored and checked: give the receipt, and offer the attempt to its unit."""
    store = desk.store
    attempt = store.attempt(lease)
    assert attempt is not None
    if attempt.bytes_receipt is not None:
        return attempt.bytes_receipt
    _check_age(desk, attempt.round)  # the round may have moved on while the bytes travelled: no receipt then
    assert attempt.claim_sha256 is not None
    entry = desk.log("bytes", {"claim": attempt.claim_sha256})
    receipt = sign(
        BytesReceipt(
            run=desk.run, claim=attempt.claim_sha256, artifacts=attempt.artifacts, log_position=entry.position
        ),
        desk.key,
    )
    received, instructions = advance(attempt, Received(receipt=receipt))
    store.save_attempt(attempt, received)
    _carry_out(desk, received, instructions)
    return receipt


def _carry_out(desk: Desk, attempt: Attempt, instructions: Sequence[Instruct]) -> None:
    """Do what the attempt's lifecycle says must follow."""
    for instruction in instructions:
        match instruction:
            case OfferToUnit():
                _offer(desk, attempt)
            case ReleaseUnit():
                release_unit(desk, instruction.unit)
            case PublishVerdict():
                _log_verdict(desk, instruction.verdict_envelope)


def _offer(desk: Desk, attempt: Attempt) -> None:
    """Settle the unit with this attempt; judge the attempt at once if no merge will need it."""
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    if unit.state is UnitState.SETTLED:
        judge(desk, attempt, unused_verdict(desk, attempt, unit))
        return
    accepted, _ = advance(unit, UnitAccepted(lease=attempt.lease))
    desk.store.save_unit(unit, accepted)


def record_refused(desk: Desk, lease: LeaseId, refusal: Refusal) -> None:
    """The bytes that a claim committed to are not a delta of this run: the claim is rejected, the unit open again."""
    attempt = desk.store.attempt(lease)
    assert attempt is not None
    if attempt.state is not AttemptState.SKETCHED:
        return
    judge(desk, attempt, _verdict(desk, attempt, "rejected", refusal.code, refusal.message, 0, None))


def _verdict(
    desk: Desk, attempt: Attempt, outcome: str, code: str, sentence: str, weight: int, checkpoint: int | None
) -> Verdict:
    assert attempt.claim_sha256 is not None
    assert outcome in ("accepted", "rejected")
    return Verdict(
        run=desk.run,
        claim=attempt.claim_sha256,
        unit=attempt.unit,
        outcome="accepted" if outcome == "accepted" else "rejected",
        code=code,
        sentence=sentence,
        weight=weight,
        checkpoint=checkpoint,
    )


def unused_verdict(desk: Desk, attempt: Attempt, unit: Unit) -> Verdict:
    """The verdict on good work that no merge needs: another attempt came first, or the round had moved on."""
    if unit.outcome is Outcome.ACCEPTED and unit.chosen != attempt.lease:
        sentence = "Another volunteer's result for this unit had arrived first; yours is kept as a replica."
        return _verdict(desk, attempt, "accepted", "REPLICA", sentence, 0, None)
    sentence = "The unit's round had closed without it, and no later round can merge it any more."
    return _verdict(desk, attempt, "accepted", "TOO_LATE", sentence, 0, None)


def merged_verdict(desk: Desk, attempt: Attempt, weight: int, checkpoint: int) -> Verdict:
    """The verdict on work that was merged."""
    share = f"{100 * weight / 2**24:.2f} %"
    sentence = f"Merged into checkpoint {checkpoint}: {share} of that merge is this delta."
    return _verdict(desk, attempt, "accepted", "MERGED", sentence, weight, checkpoint)


def stale_verdict(desk: Desk, attempt: Attempt) -> Verdict:
    """The verdict on work that came in time to be stored but too late to be merged."""
    sentence = f"The unit's round {attempt.round} is too many rounds behind to be merged."
    return _verdict(desk, attempt, "rejected", RoundTooOld.code, sentence, 0, None)


def judge(desk: Desk, attempt: Attempt, verdict: Verdict) -> None:
    """Sign, store and log a verdict, and do what follows from it."""
    judged, instructions = advance(attempt, Judged(verdict_envelope=sign(verdict, desk.key)))
    desk.store.save_attempt(attempt, judged)
    _carry_out(desk, judged, instructions)


def _log_verdict(desk: Desk, envelope: bytes) -> None:
    verdict = verify(Verdict, envelope, desk.key.public)
    desk.log(
        "verdict",
        {
            "checkpoint": verdict.checkpoint,
            "claim": verdict.claim,
            "code": verdict.code,
            "outcome": verdict.outcome,
            "weight": verdict.weight,
        },
    )


def verdicts(desk: Desk, session: Session, claims: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return the verdicts that are known for this device's claims."""
    found = []
    for claim in claims:
        attempt = desk.store.attempt_of_claim(Digest(claim.hex()))
        if attempt is not None and attempt.device == session.device and attempt.verdict_envelope is not None:
            found.append(attempt.verdict_envelope)
    return tuple(found)
