"""An owner's record: what audits found, as the run's log tells it to everybody."""

from coordinator.desk import Desk
from coordinator.owners import (
    AuditFailed,
    AuditPassed,
    Banned,
    Cleared,
    Instruction,
    Owner,
    OwnerEvent,
    OwnerState,
    Promoted,
    advance,
)
from protocol.assignment import unit_steps
from protocol.documents import UnitId
from protocol.keys import KeyId

_NAMES: dict[type[OwnerEvent], str] = {
    AuditPassed: "audit-passed",
    AuditFailed: "audit-failed",
    Promoted: "promoted",
    Banned: "banned",
    Cleared: "cleared",
}


def owner_of(desk: Desk, owner: KeyId) -> Owner:
    """Return an owner who has had a lease."""
    found = desk.store.owner(owner)
    assert found is not None  # stored with the first lease
    return found


def as_long_ms(desk: Desk, unit: UnitId, trained_ms: int) -> int:
    """Return how long a unit would have taken if it were a long one."""
    return trained_ms * desk.config.training.steps // unit_steps(desk.config, unit)


def tell(desk: Desk, owner: KeyId, event: OwnerEvent) -> tuple[Instruction, ...]:
    """Record what happened to an owner, and log it; probation ends here when enough audits were passed in a row."""
    after, instructions = advance(owner_of(desk, owner), event)
    _log(desk, after, event)
    if after.state is OwnerState.PROBATION and after.valid_in_row >= desk.config.verification.probation:
        after, more = advance(after, Promoted())
        _log(desk, after, Promoted())
        instructions += more
    desk.store.put_owner(after)
    return instructions


def _log(desk: Desk, owner: Owner, event: OwnerEvent) -> None:
    desk.log(
        "owner",
        {
            "event": _NAMES[type(event)],
            "member": owner.member,
            "state": owner.state.value,
            "valid_in_row": owner.valid_in_row,
        },
    )
