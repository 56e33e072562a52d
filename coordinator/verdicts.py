"""Verdicts: what they say, how they are given, changed and asked for."""

from coordinator.audits import Scrutiny
from coordinator.desk import Desk
from coordinator.leasing import release_unit
from coordinator.sessions import Session
from coordinator.units import Attempt, Judged, Outcome, PublishVerdict, Rejudged, ReleaseUnit, Unit, advance
from coordinator.units import Instruction as Instruct
from protocol.documents import Digest, Opinion, Verdict, sign, verify
from protocol.errors import Refusal
from protocol.verdicts import VerdictCode
from verify.policy import is_taken_out


def accepted(
    desk: Desk, attempt: Attempt, code: VerdictCode, sentence: str, weight: int = 0, checkpoint: int | None = None
) -> Verdict:
    """Return an accepting verdict on an attempt's claim."""
    assert attempt.claim_sha256 is not None
    return Verdict(
        run=desk.run,
        claim=attempt.claim_sha256,
        unit=attempt.unit,
        outcome="accepted",
        code=code.value,
        sentence=sentence,
        weight=weight,
        checkpoint=checkpoint,
    )


def rejected(desk: Desk, attempt: Attempt, code: str, sentence: str) -> Verdict:
    """Return a rejecting verdict on an attempt's claim; `code` is a `VerdictCode` or that of the refusal it met."""
    assert attempt.claim_sha256 is not None
    return Verdict(
        run=desk.run,
        claim=attempt.claim_sha256,
        unit=attempt.unit,
        outcome="rejected",
        code=code,
        sentence=sentence,
        weight=0,
        checkpoint=None,
    )


def refused(desk: Desk, attempt: Attempt, refusal: Refusal) -> Verdict:
    """The verdict on bytes that are no delta of this run."""
    return rejected(desk, attempt, refusal.code, refusal.message)


def unused(desk: Desk, attempt: Attempt, unit: Unit) -> Verdict:
    """The verdict on work that no merge needs: another attempt came first, or the round had moved on."""
    if unit.outcome is not Outcome.ABANDONED and unit.chosen != attempt.lease:
        sentence = "Another volunteer's result for this unit had arrived first; yours is kept as a replica."
        return accepted(desk, attempt, VerdictCode.REPLICA, sentence)
    return too_late(desk, attempt)


def too_late(desk: Desk, attempt: Attempt) -> Verdict:
    """The verdict on work that no later round may merge."""
    sentence = "The unit's round had closed without it, and no later round can merge it any more."
    if attempt.scrutiny is Scrutiny.PENDING and not attempt.late and attempt.bytes_receipt is not None:
        sentence = "It was in time, but its audit had not ended when the last round that could merge it closed."
    return accepted(desk, attempt, VerdictCode.TOO_LATE, sentence)


def agreed(desk: Desk, attempt: Attempt) -> Verdict:
    """The verdict on a replica that agrees."""
    sentence = "It agrees with another volunteer's result for the same unit: a check of the run, and credited as work."
    return accepted(desk, attempt, VerdictCode.REPLICA, sentence)


def uncompared(desk: Desk, attempt: Attempt) -> Verdict:
    """The verdict on a replica of a claim that was judged for another reason."""
    sentence = "It was to check another volunteer's result, which needs no check any more; credited as work."
    return accepted(desk, attempt, VerdictCode.REPLICA, sentence)


def merged(desk: Desk, attempt: Attempt, weight: int, checkpoint: int) -> Verdict:
    """The verdict on work that was merged."""
    share = f"{100 * weight / 2**24:.2f} %"
    sentence = f"Merged into checkpoint {checkpoint}: {share} of that merge is this delta."
    return accepted(desk, attempt, VerdictCode.MERGED, sentence, weight, checkpoint)


def differs(desk: Desk, attempt: Attempt, opinion: Opinion) -> Verdict:
    """The verdict on a claim that a referee refuted."""
    return rejected(desk, attempt, VerdictCode.REPLAY_DIFFERS, _differs(desk, attempt, opinion))


def retracted(desk: Desk, attempt: Attempt, opinion: Opinion) -> Verdict:
    """The verdict on a merged claim that an audit back refuted."""
    follows = " What was merged of it is taken out again."
    if not is_taken_out(desk.config.verification, opinion.raw_difference):
        follows = " It is so near to honest work that it stays in the model, without credit."
    return rejected(desk, attempt, VerdictCode.RETRACTED, _differs(desk, attempt, opinion) + follows)


def _differs(desk: Desk, attempt: Attempt, opinion: Opinion) -> str:
    rules = desk.config.verification
    return (
        f"A referee trained this unit again and got another delta: raw difference {opinion.raw_difference:.3g} (at "
        f"most {rules.tolerance:g}), decoded {opinion.code_difference:.3g} (at most {rules.code_tolerance:g}). "
        f"`commonweight verify replay {attempt.unit[:12]}` repeats that on your machine; `commonweight worker appeal "
        f"{attempt.unit[:12]}` asks a second referee, within 14 days."
    )


def upheld(desk: Desk, attempt: Attempt, opinion: Opinion) -> Verdict:
    """The verdict on an appeal that was wrong."""
    unit = desk.store.unit(attempt.unit)
    code = VerdictCode.RETRACTED if unit is not None and unit.retracted else VerdictCode.REPLAY_DIFFERS
    sentence = (
        f"You appealed, and a second referee found the same: raw difference {opinion.raw_difference:.3g}, decoded "
        f"{opinion.code_difference:.3g}. The rejection and the ban stand; there is no further appeal."
    )
    return rejected(desk, attempt, code, sentence)


def restored(desk: Desk, attempt: Attempt, checkpoint: int | None) -> Verdict:
    """The verdict on an appeal that was right; `checkpoint` holds the delta if it was merged and not taken out yet."""
    merge = "It was not merged." if checkpoint is None else f"It stays in checkpoint {checkpoint}."
    sentence = f"A second referee found it honest work; its owner is admitted again, on probation. {merge}"
    return accepted(desk, attempt, VerdictCode.RESTORED, sentence, checkpoint=checkpoint)


def forfeited(desk: Desk, attempt: Attempt) -> Verdict:
    """The verdict on a claim that was to be audited and whose bytes never came."""
    sentence = "It was to be audited, and its bytes did not come in time; established owners begin probation again."
    return rejected(desk, attempt, VerdictCode.FORFEIT, sentence)


def undecided(desk: Desk, attempt: Attempt) -> Verdict:
    """The verdict on a claim that one referee refuted together with its replica, and no second one looked at."""
    sentence = (
        "A referee got another delta than this one and than the one it was compared with, and no second referee came "
        "in time to say who is right. Nobody is banned for it; established owners begin probation again."
    )
    return rejected(desk, attempt, VerdictCode.UNDECIDED, sentence)


def banned(desk: Desk, attempt: Attempt) -> Verdict:
    """The verdict on what was on its way when its owner was banned."""
    sentence = "A referee refuted another claim of this owner, so this one was not judged any more."
    return rejected(desk, attempt, VerdictCode.OWNER_BANNED, sentence)


def judge(desk: Desk, attempt: Attempt, verdict: Verdict) -> None:
    """Sign, store and log a verdict, and open the unit again if nobody else is at it."""
    judged, instructions = advance(attempt, Judged(verdict_envelope=sign(verdict, desk.key)))
    desk.store.save_attempt(attempt, judged)
    _carry_out(desk, instructions)


def rejudge(desk: Desk, attempt: Attempt, verdict: Verdict) -> None:
    """Sign, store and log a verdict that takes the place of an earlier one."""
    judged, instructions = advance(attempt, Rejudged(verdict_envelope=sign(verdict, desk.key)))
    desk.store.save_attempt(attempt, judged)
    _carry_out(desk, instructions)


def _carry_out(desk: Desk, instructions: tuple[Instruct, ...]) -> None:
    for instruction in instructions:
        match instruction:
            case ReleaseUnit():
                release_unit(desk, instruction.unit)
            case PublishVerdict():
                _log(desk, instruction.verdict_envelope)


def _log(desk: Desk, envelope: bytes) -> None:
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


def known(desk: Desk, session: Session, claims: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return the verdicts that are known for this device's claims, the latest of each."""
    found = []
    for claim in claims:
        attempt = desk.store.attempt_of_claim(Digest(claim.hex()))
        if attempt is not None and attempt.device == session.device and attempt.verdict_envelope is not None:
            found.append(attempt.verdict_envelope)
    return tuple(found)
