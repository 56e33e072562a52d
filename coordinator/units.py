"""The lifecycle of a work unit and of its attempts: two tables, and the one function that moves along them.

A unit is a piece of training that the run wants done once; an attempt is one device's lease of it and everything that
became of that lease. A unit can have several attempts (an expired lease, a late claim, later a replica), but at most
one of them is chosen for the merge. Pure rules: no clock, no database, no randomness. Source: PROTOCOL.md section 5.

    unit, instructions = advance(unit, UnitAssigned())
    attempt, instructions = advance(attempt, Expired())  # instructions: (ReleaseUnit(unit=...),)

A repeated or late message is the caller's to recognise (compare ids, then decide); the tables allow no extra moves.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, unique
from typing import Final, TypeAlias, overload

from coordinator.audits import AuditReason, Scrutiny
from protocol.documents import Artifact, Digest, LeaseId, UnitId
from protocol.errors import IllegalTransition
from protocol.keys import KeyId

# --- units ---------------------------------------------------------------------------------------------------


@unique
class UnitState(Enum):
    """Where a unit stands."""

    OPEN = "open"  # can be leased
    ASSIGNED = "assigned"  # at least one device works on it, or has claimed it
    SETTLED = "settled"  # end: its outcome says how


@unique
class Outcome(Enum):
    """How a settled unit ended."""

    ACCEPTED = "accepted"  # one attempt was chosen for the merge
    REJECTED = "rejected"  # what came back must not be merged
    ABANDONED = "abandoned"  # nothing came back in time for any merge


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A work unit: the `index`-th of `round`. `merged_in` is the checkpoint that holds its chosen attempt.

    `retracted`: an audit back refuted what was merged; `unmerged_in` is the checkpoint that takes it out again. These
    three are plain data: set by `dataclasses.replace`, no event moves them.
    """

    unit: UnitId
    round: int
    index: int
    state: UnitState = UnitState.OPEN
    outcome: Outcome | None = None
    chosen: LeaseId | None = None
    merged_in: int | None = None
    retracted: bool = False
    unmerged_in: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitAssigned:
    """A device got a lease of the unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReleased:
    """No attempt of the unit can deliver any more; it can be leased again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitAccepted:
    """The attempt under `lease` is the one to merge."""

    lease: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRejected:
    """What came back for the unit must not be merged, and it will not be tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitAbandoned:
    """The unit is too far behind to be merged; nobody needs to train it any more."""


UnitEvent: TypeAlias = UnitAssigned | UnitReleased | UnitAccepted | UnitRejected | UnitAbandoned

UNIT_TRANSITIONS: Final[dict[tuple[UnitState, type[UnitEvent]], UnitState]] = {
    (UnitState.OPEN, UnitAssigned): UnitState.ASSIGNED,
    (UnitState.ASSIGNED, UnitReleased): UnitState.OPEN,
    (UnitState.ASSIGNED, UnitAccepted): UnitState.SETTLED,
    # An earlier holder's late claim may settle a unit that was put back.
    (UnitState.OPEN, UnitAccepted): UnitState.SETTLED,
    (UnitState.OPEN, UnitRejected): UnitState.SETTLED,
    (UnitState.ASSIGNED, UnitRejected): UnitState.SETTLED,
    (UnitState.OPEN, UnitAbandoned): UnitState.SETTLED,
    (UnitState.ASSIGNED, UnitAbandoned): UnitState.SETTLED,
}
"""Every legal move of a unit."""

# --- attempts ------------------------------------------------------------------------------------------------


@unique
class AttemptState(Enum):
    """Where an attempt stands."""

    LEASED = "leased"  # its device trains
    CLAIMED = "claimed"  # the device committed to a result; the sketch is awaited
    SKETCHED = "sketched"  # the sketch is here; the bytes, or an excuse, are awaited
    RECEIVED = "received"  # the bytes are stored and checked; a verdict is awaited
    EXCUSED = "excused"  # a replica whose bytes are not needed; a verdict is awaited
    EXPIRED = "expired"  # the lease ran out; its own holder may still claim late
    JUDGED = "judged"  # end: a verdict was given, or there will be nothing to judge
    HANDED_BACK = "handed_back"  # end: the device gave the unit back


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One device's attempt at a unit.

    `deadline_ms` (UTC milliseconds) is that of the current step: the lease's while LEASED, the upload's after a claim.
    `lease_sha256` and `claim_sha256` are digests of the signed payloads; the envelopes are the signed bytes as they
    were sent or received. `sketch` is 1,024 little-endian fp32 numbers. `trained_ms` is the time from lease to claim;
    `audit_share` (in 2^-24) the probability of an audit that the claim's receipt names; `late` the rounds by which the
    bytes came late; `refused` says that they were no delta of the run. `scrutiny` and `reason` change by
    `dataclasses.replace` when an audit is asked for or passes.
    """

    lease: LeaseId
    unit: UnitId
    round: int
    device: KeyId
    owner: KeyId
    deadline_ms: int
    lease_envelope: bytes
    lease_sha256: Digest
    leased_ms: int
    state: AttemptState = AttemptState.LEASED
    claim_sha256: Digest | None = None
    claim_envelope: bytes | None = None
    artifacts: tuple[Artifact, ...] = ()
    claim_receipt: bytes | None = None
    sketch: bytes | None = None
    bytes_receipt: bytes | None = None
    verdict_envelope: bytes | None = None
    trained_ms: int | None = None
    epoch: int | None = None
    audit_share: int = 0
    scrutiny: Scrutiny = Scrutiny.NONE
    reason: AuditReason | None = None
    late: int = 0
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """The device committed to a result; `deadline_ms` is when its bytes must have arrived."""

    claim_sha256: Digest
    claim_envelope: bytes
    artifacts: tuple[Artifact, ...]
    receipt: bytes
    deadline_ms: int
    trained_ms: int
    epoch: int
    audit_share: int
    reason: AuditReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketched:
    """The sketch of the claimed delta arrived."""

    sketch: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """Every artifact is stored, checked and receipted; it came so many rounds late."""

    receipt: bytes
    late: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Excused:
    """The coordinator does not need this attempt's bytes; the device keeps them until the verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BytesWanted:
    """The bytes of an excused attempt are needed after all, by `deadline_ms`."""

    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejudged:
    """A later finding changes the verdict on a judged claim."""

    verdict_envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The attempt came to its end. `verdict_envelope` is None for an attempt that never claimed, and only then."""

    verdict_envelope: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """The lease's time is over and no claim has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedBack:
    """The device gave the unit back."""


AttemptEvent: TypeAlias = (
    Claimed | Sketched | Received | Excused | BytesWanted | Judged | Rejudged | Expired | HandedBack
)

ATTEMPT_TRANSITIONS: Final[dict[tuple[AttemptState, type[AttemptEvent]], AttemptState]] = {
    (AttemptState.LEASED, Claimed): AttemptState.CLAIMED,
    (AttemptState.LEASED, Expired): AttemptState.EXPIRED,
    (AttemptState.LEASED, HandedBack): AttemptState.HANDED_BACK,
    # A late claim by the attempt's own holder: work that was done is not thrown away, it is a free replica.
    (AttemptState.EXPIRED, Claimed): AttemptState.CLAIMED,
    (AttemptState.EXPIRED, Judged): AttemptState.JUDGED,
    (AttemptState.CLAIMED, Sketched): AttemptState.SKETCHED,
    (AttemptState.CLAIMED, Judged): AttemptState.JUDGED,
    (AttemptState.SKETCHED, Received): AttemptState.RECEIVED,
    (AttemptState.SKETCHED, Excused): AttemptState.EXCUSED,
    (AttemptState.SKETCHED, Judged): AttemptState.JUDGED,
    (AttemptState.RECEIVED, Judged): AttemptState.JUDGED,
    # A replica that disagrees must show its bytes.
    (AttemptState.EXCUSED, BytesWanted): AttemptState.SKETCHED,
    # A verdict can be taken back, by an audit of what was merged or by an appeal; the attempt is over all the same.
    (AttemptState.JUDGED, Rejudged): AttemptState.JUDGED,
    (AttemptState.EXCUSED, Judged): AttemptState.JUDGED,
}
"""Every legal move of an attempt."""

NEVER_MS: Final = 2**53 - 1
"""A deadline that never comes: the claim is late, its unit may go to others, its bytes may still arrive."""

LIVE_ATTEMPTS: Final = frozenset(
    {
        AttemptState.LEASED,
        AttemptState.CLAIMED,
        AttemptState.SKETCHED,
        AttemptState.RECEIVED,
        AttemptState.EXCUSED,
    }
)
"""States of an attempt that can still deliver, or has delivered, something to settle its unit with."""

# --- instructions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseUnit:
    """Put the unit back, if `needs_release` says that nobody else is at it."""

    unit: UnitId


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferToUnit:
    """The attempt's bytes are here: let it stand for its unit, unless another attempt does already."""

    unit: UnitId
    lease: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishVerdict:
    """Log the verdict, so that its device can fetch it."""

    lease: LeaseId
    verdict_envelope: bytes


Instruction: TypeAlias = ReleaseUnit | OfferToUnit | PublishVerdict

# --- moving --------------------------------------------------------------------------------------------------


@overload
def advance(thing: Unit, event: UnitEvent) -> tuple[Unit, tuple[Instruction, ...]]: ...


@overload
def advance(thing: Attempt, event: AttemptEvent) -> tuple[Attempt, tuple[Instruction, ...]]: ...


def advance(thing: Unit | Attempt, event: UnitEvent | AttemptEvent) -> tuple[Unit | Attempt, tuple[Instruction, ...]]:
    """Return the unit or attempt after `event`, and what the caller must do now; raise `IllegalTransition`."""
    if isinstance(thing, Unit):
        return _advance_unit(thing, event), ()
    return _advance_attempt(thing, event)


def is_at_work(attempt: Attempt, now_ms: int) -> bool:
    """Say whether an attempt still holds its unit: it works in time, or it has delivered and waits for its verdict."""
    if attempt.state in (AttemptState.RECEIVED, AttemptState.EXCUSED):
        return True
    return attempt.state in LIVE_ATTEMPTS and now_ms < attempt.deadline_ms < NEVER_MS


def needs_release(unit: Unit, attempts: Iterable[Attempt], now_ms: int) -> bool:
    """Say whether nobody holds an assigned unit any more, so that it must be put back."""
    return unit.state is UnitState.ASSIGNED and not any(is_at_work(attempt, now_ms) for attempt in attempts)


def _advance_unit(unit: Unit, event: object) -> Unit:
    # The key of a wrong event type is simply not in the table, which is why a plain `type(event)` may look it up.
    state = UNIT_TRANSITIONS.get((unit.state, type(event)))  # type: ignore[arg-type]
    if state is None:
        raise IllegalTransition(f"Unit {unit.unit} is {unit.state.value}; {event!r} does not fit.")
    moved = replace(unit, state=state)
    match event:
        case UnitAccepted():
            return replace(moved, outcome=Outcome.ACCEPTED, chosen=event.lease)
        case UnitRejected():
            return replace(moved, outcome=Outcome.REJECTED)
        case UnitAbandoned():
            return replace(moved, outcome=Outcome.ABANDONED)
        case _:
            return moved


def _advance_attempt(attempt: Attempt, event: object) -> tuple[Attempt, tuple[Instruction, ...]]:
    state = ATTEMPT_TRANSITIONS.get((attempt.state, type(event)))  # type: ignore[arg-type]
    if state is None:
        raise _illegal(attempt, event)
    moved = replace(attempt, state=state)
    match event:
        case Claimed():
            moved = replace(
                moved,
                claim_sha256=event.claim_sha256,
                claim_envelope=event.claim_envelope,
                artifacts=event.artifacts,
                claim_receipt=event.receipt,
                deadline_ms=event.deadline_ms,
                trained_ms=event.trained_ms,
                epoch=event.epoch,
                audit_share=event.audit_share,
                scrutiny=Scrutiny.NONE if event.reason is None else Scrutiny.PENDING,
                reason=event.reason,
            )
            return moved, ()
        case Sketched():
            return replace(moved, sketch=event.sketch), ()
        case Received():
            offer = OfferToUnit(unit=attempt.unit, lease=attempt.lease)
            return replace(moved, bytes_receipt=event.receipt, late=event.late), (offer,)
        case BytesWanted():
            return replace(moved, deadline_ms=event.deadline_ms), ()
        case Judged():
            return _judge(attempt, event)
        case Rejudged():
            verdict = PublishVerdict(lease=attempt.lease, verdict_envelope=event.verdict_envelope)
            return replace(moved, verdict_envelope=event.verdict_envelope), (verdict,)
        case Expired() | HandedBack():
            return moved, (ReleaseUnit(unit=attempt.unit),)
        case _:
            return moved, ()


def _judge(attempt: Attempt, event: Judged) -> tuple[Attempt, tuple[Instruction, ...]]:
    if (event.verdict_envelope is None) != (attempt.claim_sha256 is None):
        # A verdict speaks of a claim: every claim gets one, and without a claim there is nothing to speak of.
        raise _illegal(attempt, event)
    moved = replace(attempt, state=AttemptState.JUDGED, verdict_envelope=event.verdict_envelope)
    instructions: list[Instruction] = []
    if event.verdict_envelope is not None:
        # If its unit is not settled by now, this attempt will not do it, so somebody else must be able to.
        instructions.append(ReleaseUnit(unit=attempt.unit))
        instructions.append(PublishVerdict(lease=attempt.lease, verdict_envelope=event.verdict_envelope))
    return moved, tuple(instructions)


def _illegal(attempt: Attempt, event: object) -> IllegalTransition:
    # The event's name only: its fields can hold megabytes of envelopes.
    return IllegalTransition(
        f"The attempt under lease {attempt.lease} is {attempt.state.value}; {type(event).__name__} does not fit."
    )
