"""The lifecycle of an owner (a person with one or more devices), and the devices themselves.

Caps, reputation and bans attach to owners, never to devices, which cost nothing to make. Pure rules. Source:
DESIGN.md "The life of a unit, a round and a volunteer"; PROTOCOL.md sections 5 and 7.
"""

from dataclasses import dataclass, replace
from enum import Enum, unique
from typing import Final, TypeAlias

from protocol.documents import Digest
from protocol.errors import IllegalTransition
from protocol.keys import KeyId


@unique
class OwnerState(Enum):
    """How far an owner is trusted."""

    PROBATION = "probation"  # everything is audited
    ESTABLISHED = "established"  # audited at random, never below a floor
    BANNED = "banned"  # by a referee's finding; ends only if another referee finds otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """An owner in this run. `public_key` is 64 hex digits, whose SHA-256 `owner` is.

    `member` is the owner's pseudonym in the public log, 64 hex digits. `valid_in_row` counts audits passed since the
    last failed one; `audited_ms` a short time from lease to claim of an audited unit, 0 before the first.
    `terms_sha256` is the digest of the terms that the owner accepted last.
    """

    owner: KeyId
    public_key: str
    member: str
    terms_sha256: Digest
    state: OwnerState = OwnerState.PROBATION
    valid_in_row: int = 0
    audited_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that an owner delegated, as it was when it last opened a session. `public_key` is 64 hex digits."""

    device: KeyId
    public_key: str
    owner: KeyId
    delegation_envelope: bytes
    device_class: str
    trainer_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPassed:
    """A claim of the owner's agreed with a referee or an established owner.

    `trained_ms`: from its lease to the claim, or as long as that would have been with a long unit.
    """

    trained_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFailed:
    """A claim of the owner's was not confirmed; on its own this bans nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """The owner's probation is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Banned:
    """A referee found that a claim of the owner's was not honest work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """A second referee found that it was honest work after all."""


OwnerEvent: TypeAlias = AuditPassed | AuditFailed | Promoted | Banned | Cleared

TRANSITIONS: Final[dict[tuple[OwnerState, type[OwnerEvent]], OwnerState]] = {
    (OwnerState.PROBATION, AuditPassed): OwnerState.PROBATION,
    (OwnerState.PROBATION, AuditFailed): OwnerState.PROBATION,
    (OwnerState.PROBATION, Promoted): OwnerState.ESTABLISHED,
    (OwnerState.PROBATION, Banned): OwnerState.BANNED,
    (OwnerState.ESTABLISHED, AuditPassed): OwnerState.ESTABLISHED,
    # Trust is earned again from the start: everything of this owner's is audited until then.
    (OwnerState.ESTABLISHED, AuditFailed): OwnerState.PROBATION,
    (OwnerState.ESTABLISHED, Banned): OwnerState.BANNED,
    (OwnerState.BANNED, Cleared): OwnerState.PROBATION,
}
"""Every legal move of an owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecheckMerged:
    """Audit back through what was merged from this owner: all of it, or the newest units."""

    owner: KeyId
    everything: bool


Instruction: TypeAlias = RecheckMerged


def advance(thing: Owner, event: OwnerEvent) -> tuple[Owner, tuple[Instruction, ...]]:
    """Return the owner after `event`, and what the caller must do now; raise `IllegalTransition`."""
    state = TRANSITIONS.get((thing.state, type(event)))
    if state is None:
        raise IllegalTransition(f"Owner {thing.owner} is {thing.state.value}; {type(event).__name__} does not fit.")
    moved = replace(thing, state=state)
    match event:
        case AuditPassed():
            audited_ms = _typical_ms(event.trained_ms, thing.audited_ms)
            return replace(moved, valid_in_row=thing.valid_in_row + 1, audited_ms=audited_ms), ()
        case AuditFailed():
            # Whoever lets an audit go by may have more to hide; else forfeiting would be the cheap way out of a ban.
            trusted = thing.state is OwnerState.ESTABLISHED
            recheck = (RecheckMerged(owner=thing.owner, everything=False),) if trusted else ()
            return replace(moved, valid_in_row=0), recheck
        case Cleared():
            return replace(moved, valid_in_row=0), ()
        case Banned():
            return moved, (RecheckMerged(owner=thing.owner, everything=True),)
        case Promoted():
            return moved, ()


def _typical_ms(trained_ms: int, audited_ms: int) -> int:
    """Return the time that later units are compared with, after one more audited unit.

    The shortest, not the mean: a machine that its owner needs by day may be twice as quick at night. But an eighth of
    it is forgotten with each audit: one unit of a borrowed, quicker machine does not end the comparison for good.
    """
    if audited_ms == 0 or trained_ms < audited_ms:
        return trained_ms
    return audited_ms + (trained_ms - audited_ms) // _FORGETS


_FORGETS: Final = 8
