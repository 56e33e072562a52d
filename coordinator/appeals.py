"""Appeals: a volunteer who was refuted asks for another referee."""

from dataclasses import replace

from coordinator.auditing import is_open
from coordinator.audits import Appealed, AuditState, advance
from coordinator.desk import Desk
from coordinator.sessions import Session
from coordinator.units import AttemptState
from protocol.documents import Digest
from protocol.errors import AppealRefused, ClaimUnknown


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
