"""What an audit that passed means for its claim and for the owner's record."""

from dataclasses import replace

from coordinator import verdicts
from coordinator.auditing import attempt_of
from coordinator.audits import Audit, AuditReason, AuditState, Overturned, Scrutiny, advance
from coordinator.desk import Desk
from coordinator.owners import AuditPassed, Cleared, OwnerState
from coordinator.records import as_long_ms, owner_of, tell
from coordinator.units import AttemptState, Unit


def accept_subject(desk: Desk, audit: Audit, *, by_referee: bool) -> None:
    """Carry out that a claim was found to be honest work; on appeal, take its rejection back."""
    subject = attempt_of(desk, audit.lease)
    owner = owner_of(desk, subject.owner)
    if audit.appealed:
        for other in desk.store.audits_of_subject(subject.lease):
            if other.state is AuditState.FAILED:  # one appeal answers for all findings on the same claim
                overturned, _ = advance(other, Overturned())
                desk.store.save_audit(other, overturned)
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
    if not by_referee and not counts(desk, audit):
        return
    counted = subject.scrutiny is Scrutiny.CONFIRMED  # by another audit of the same claim
    if audit.reason is not AuditReason.RECHECK and owner.state is not OwnerState.BANNED and not counted:
        tell(desk, owner.owner, AuditPassed(trained_ms=as_long_ms(desk, subject.unit, subject.trained_ms or 0)))
    if subject.state is AttemptState.RECEIVED:
        desk.store.save_attempt(subject, replace(subject, scrutiny=Scrutiny.CONFIRMED))


def _is_being_taken_out(desk: Desk, unit: Unit) -> bool:
    current = desk.store.latest_round()
    unpublished = current is not None and current.manifest_sha256 is None
    return unpublished and current is not None and any(out.unit == unit.unit for out in current.unmerge)


def counts(desk: Desk, audit: Audit) -> bool:
    """Agreement counts only with an established other owner whom we chose; that of newcomers proves nothing.

    Whoever comes late chose itself: a partner could let a lease run out for that.
    """
    if audit.reason is AuditReason.LATE:
        return False
    assert audit.replica is not None
    other = owner_of(desk, attempt_of(desk, audit.replica).owner)
    return other.owner != audit.owner and other.state is OwnerState.ESTABLISHED
