"""Bans and distrust: what ends with an owner's standing, and the audits back of what it had merged."""

from dataclasses import replace
from typing import Final

from coordinator import verdicts
from coordinator.auditing import (
    attempt_of,
    in_closed_merge,
    is_open,
    move,
    open_audit,
    opinions_of,
    put_in_doubt,
    replica_gone,
    serves,
)
from coordinator.audits import Audit, AuditReason, AuditState, Scrutiny, SubjectGone
from coordinator.desk import Desk
from coordinator.leasing import end_lease
from coordinator.owners import AuditFailed, Banned, OwnerState, RecheckMerged
from coordinator.records import owner_of, tell
from coordinator.units import Attempt, AttemptState, Expired
from protocol.documents import Digest, LeaseId, Opinion
from protocol.keys import KeyId

_PRUNED_KEY: Final = "pruned"
_CLAIMED = (AttemptState.CLAIMED, AttemptState.SKETCHED, AttemptState.EXCUSED, AttemptState.RECEIVED)


def ban(desk: Desk, owner: KeyId) -> None:
    """Ban an owner: nothing of it is merged any more, and what was merged unaudited is audited now."""
    if owner_of(desk, owner).state is OwnerState.BANNED:
        return
    instructions = tell(desk, owner, Banned())
    for listed in desk.store.unmerged_of_owner(owner):
        attempt = attempt_of(desk, listed.lease)  # an audit that was dropped a moment ago may have judged it
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
    _carry_out(desk, instructions)


def distrust(desk: Desk, owner: KeyId) -> None:
    """Count an unanswered audit against an established owner, who could not know that it was drawn; look back at it.

    On probation everything is audited and everybody knows it: whoever does not deliver there gains nothing by it.
    """
    if owner_of(desk, owner).state is not OwnerState.ESTABLISHED:
        return
    _carry_out(desk, tell(desk, owner, AuditFailed()))
    for listed in desk.store.unmerged_of_owner(owner):
        # What it has on its way was to be merged on the strength of a record that is gone.
        unaudited = listed.claim_sha256 is not None and listed.scrutiny is Scrutiny.NONE
        if unaudited and not serves(desk, listed.lease) and not in_closed_merge(desk, listed):
            put_in_doubt(desk, listed, AuditReason.DISTRUSTED)


def _carry_out(desk: Desk, instructions: tuple[RecheckMerged, ...]) -> None:
    for instruction in instructions:
        # As many as the new probation asks for: about what a poisoner gets in between two audits.
        newest = None if instruction.everything else desk.config.verification.probation
        audit_back(desk, instruction.owner, newest)


def audit_back(desk: Desk, owner: KeyId, newest: int | None = None) -> None:
    """Have what was merged unaudited of an owner looked at by an auditor, as far back as deltas are kept.

    Args:
        newest: only so many, the newest ones; None for all.
    """
    current = desk.store.latest_round()
    assert current is not None  # something was leased
    oldest = newest_pruned(desk, current.round)
    merged = desk.store.merged_unaudited_of_owner(owner)
    # After a ban, also what others got past an audit on this owner's word alone.
    looked_at = (*merged, *desk.store.merged_on_word_of(owner)) if newest is None else merged[-newest:]
    for attempt in looked_at:
        if any(audit.reason is AuditReason.RECHECK for audit in desk.store.audits_of_subject(attempt.lease)):
            continue  # looked at already, or about to be
        unit = desk.store.unit(attempt.unit)
        assert unit is not None
        if unit.merged_in is None or unit.merged_in > oldest:
            open_audit(desk, attempt, AuditReason.RECHECK)


def drop(desk: Desk, audit: Audit) -> None:
    """End an audit whose subject was judged for another reason; its replica keeps its credit if nobody refuted it."""
    move(desk, audit, SubjectGone())
    if audit.replica is None:
        return
    other = attempt_of(desk, audit.replica)
    if other.state not in _CLAIMED or other.scrutiny is Scrutiny.CONFIRMED:
        return
    said = [opinion.finding for opinion in opinions_of(desk, audit) if opinion.claim == other.claim_sha256]
    if "refuted" in said:
        verdicts.judge(desk, other, verdicts.undecided(desk, other))
        distrust(desk, other.owner)
    else:
        verdicts.judge(desk, other, verdicts.uncompared(desk, other))


def newest_pruned(desk: Desk, published: int) -> int:
    """Return the newest checkpoint whose deltas are kept no longer once that one is published; 0 if all are.

    What was thrown away once stays so when the operator decides later to keep more.
    """
    gone = int(desk.store.meta(_PRUNED_KEY) or 0)
    return max(gone, published - desk.retain_rounds) if desk.retain_rounds else gone


def drop_pruned(desk: Desk, published: int) -> None:
    """End audits back whose deltas are kept no longer: nobody can judge them, and they must not keep auditors busy.

    But for appeals: who was refuted must be heard, and until then the delta is kept (`appealed_blobs`).
    """
    oldest = newest_pruned(desk, published)
    desk.store.put_meta(_PRUNED_KEY, str(oldest))
    for state in (AuditState.WANTS_REFEREE, AuditState.WANTS_SECOND):
        for audit in desk.store.audits(state):
            unit = desk.store.unit(audit.unit)
            assert unit is not None
            merged = unit.merged_in is not None and unit.merged_in <= oldest and unit.chosen == audit.lease
            if merged and not audit.appealed:
                drop(desk, audit)


def appealed_blobs(desk: Desk) -> frozenset[Digest]:
    """Return the deltas of claims whose appeals wait: a second referee has to look at them."""
    waiting = (
        audit for state in (AuditState.WANTS_REFEREE, AuditState.WANTS_SECOND) for audit in desk.store.audits(state)
    )
    attempts = [attempt_of(desk, audit.lease) for audit in waiting if audit.appealed]
    return frozenset(Digest(artifact.blob_sha256) for attempt in attempts for artifact in attempt.artifacts)


def reject(desk: Desk, attempt: Attempt, opinion: Opinion) -> None:
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
    attempt = attempt_of(desk, lease)
    opinion = refutation(desk, attempt)
    if opinion is not None:
        verdicts.rejudge(desk, attempt, verdicts.retracted(desk, attempt, opinion))


def refutation(desk: Desk, attempt: Attempt, *, appealed: bool = False) -> Opinion | None:
    """Return the opinion by which a claim was refuted, if it was and that stands.

    Args:
        appealed: whether an opinion counts that an appeal is pending against.
    """
    for audit in desk.store.audits_of_subject(attempt.lease):
        counts = audit.state is AuditState.FAILED or (appealed and audit.appealed and is_open(audit))
        for opinion in opinions_of(desk, audit) if counts else ():
            if opinion.claim == attempt.claim_sha256 and opinion.auditor == audit.refuted_by:
                return opinion
    return None
