"""A finished unit on its way from this disk to a verdict: every state, every event, every legal move.

It starts when the delta and the signed claim are on the disk. Its delta may be deleted only from the signed receipt of
the bytes on, since then the coordinator answers for the work. It is kept all the same, while there is room, until the
verdict accepts it or the time for an appeal is over: whoever was rejected wrongly can show what was sent.
"""

from dataclasses import dataclass, replace
from enum import Enum, unique
from typing import Final

from protocol.documents import Digest, LeaseId
from protocol.errors import IllegalTransition


@unique
class SpoolState(Enum):
    """How far a finished unit has come."""

    TRAINED = "trained"  # delta and claim are on this disk; the coordinator may not know of them
    CLAIMED = "claimed"  # the claim's receipt is here, and with it the seed of the sketch
    SKETCHED = "sketched"  # the sketch was taken; the bytes are wanted
    KEPT = "kept"  # the bytes are not wanted now, but must be kept until the verdict
    RECEIVED = "received"  # the signed receipt of the bytes is here; the delta may go where space is short
    SETTLED = "settled"  # end: the verdict is here, and accepts
    REJECTED = "rejected"  # end: the verdict is here, and rejects; the delta stays for an appeal while there is room
    REFUSED = "refused"  # end: the coordinator refused it for good


HOLDS_DELTA: Final = frozenset({SpoolState.TRAINED, SpoolState.CLAIMED, SpoolState.SKETCHED, SpoolState.KEPT})
"""States in which this disk may hold the only copy of the work."""
AWAITS_VERDICT: Final = frozenset({SpoolState.KEPT, SpoolState.RECEIVED})
"""States in which nothing is left to do but to ask for the verdict."""
SPARES_DELTA: Final = frozenset({SpoolState.RECEIVED, SpoolState.REJECTED, SpoolState.REFUSED})
"""States in which the delta is on this disk for its owner's sake alone, and goes when space is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpooledUnit:
    """What the spool remembers of a unit beside its documents; `code` and `sentence` say why it was refused."""

    claim: Digest
    lease: LeaseId
    state: SpoolState
    code: str = ""
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class ClaimReceipted:
    """The claim's receipt was verified and stored."""


@dataclass(frozen=True, slots=True)
class UploadWanted:
    """The coordinator has the sketch and wants the bytes."""


@dataclass(frozen=True, slots=True)
class UploadExcused:
    """The coordinator has the sketch and wants the bytes kept here."""


@dataclass(frozen=True, slots=True)
class BytesReceipted:
    """The receipt of the bytes was verified and stored."""


@dataclass(frozen=True, slots=True)
class VerdictAccepts:
    """A verdict that accepts was verified and stored: the first one, or one that takes another's place."""


@dataclass(frozen=True, slots=True)
class VerdictRejects:
    """A verdict that rejects was verified and stored: the first one, or one that takes another's place."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The coordinator does not know the claim or its place any more (it was restored from a backup): claim again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedForGood:
    """The coordinator refused the claim or its bytes; sending them again won't help."""

    code: str
    sentence: str


Event = (
    ClaimReceipted
    | UploadWanted
    | UploadExcused
    | BytesReceipted
    | VerdictAccepts
    | VerdictRejects
    | Forgotten
    | RefusedForGood
)


@unique
class Instruction(Enum):
    """What the spool must do after the new state is on the disk."""

    DROP_DELTA = "drop delta"
    THIN_OUT = "drop the oldest spare deltas beyond what may be kept"
    ARCHIVE = "move to settled/"
    SET_ASIDE = "move to refused/"


TRANSITIONS: Final[dict[tuple[SpoolState, type[Event]], SpoolState]] = {
    (SpoolState.TRAINED, ClaimReceipted): SpoolState.CLAIMED,
    (SpoolState.TRAINED, RefusedForGood): SpoolState.REFUSED,
    (SpoolState.CLAIMED, UploadWanted): SpoolState.SKETCHED,
    (SpoolState.CLAIMED, UploadExcused): SpoolState.KEPT,
    # A claim may be judged before its bytes have come: too late to be merged, or forfeit.
    (SpoolState.CLAIMED, VerdictAccepts): SpoolState.SETTLED,
    (SpoolState.CLAIMED, VerdictRejects): SpoolState.REJECTED,
    (SpoolState.CLAIMED, Forgotten): SpoolState.TRAINED,
    (SpoolState.CLAIMED, RefusedForGood): SpoolState.REFUSED,
    (SpoolState.SKETCHED, BytesReceipted): SpoolState.RECEIVED,
    (SpoolState.SKETCHED, UploadExcused): SpoolState.KEPT,
    (SpoolState.SKETCHED, VerdictAccepts): SpoolState.SETTLED,
    (SpoolState.SKETCHED, VerdictRejects): SpoolState.REJECTED,
    (SpoolState.SKETCHED, Forgotten): SpoolState.TRAINED,
    (SpoolState.SKETCHED, RefusedForGood): SpoolState.REFUSED,
    (SpoolState.KEPT, UploadWanted): SpoolState.SKETCHED,
    (SpoolState.KEPT, VerdictAccepts): SpoolState.SETTLED,
    (SpoolState.KEPT, VerdictRejects): SpoolState.REJECTED,
    (SpoolState.KEPT, Forgotten): SpoolState.TRAINED,
    (SpoolState.KEPT, RefusedForGood): SpoolState.REFUSED,
    (SpoolState.RECEIVED, VerdictAccepts): SpoolState.SETTLED,
    (SpoolState.RECEIVED, VerdictRejects): SpoolState.REJECTED,
    # A merged delta may be refuted by an audit back, and a rejected one be restored on appeal.
    (SpoolState.SETTLED, VerdictAccepts): SpoolState.SETTLED,
    (SpoolState.SETTLED, VerdictRejects): SpoolState.REJECTED,
    (SpoolState.REJECTED, VerdictAccepts): SpoolState.SETTLED,
    (SpoolState.REJECTED, VerdictRejects): SpoolState.REJECTED,
}
"""Every legal move."""

END_STATES: Final = frozenset({SpoolState.SETTLED, SpoolState.REJECTED, SpoolState.REFUSED})
"""States in which the coordinator asks for nothing any more; from one only another one can follow."""

_INSTRUCTIONS: Final[dict[SpoolState, tuple[Instruction, ...]]] = {
    SpoolState.RECEIVED: (Instruction.THIN_OUT,),
    SpoolState.SETTLED: (Instruction.DROP_DELTA, Instruction.ARCHIVE),
    SpoolState.REJECTED: (Instruction.ARCHIVE, Instruction.THIN_OUT),
    SpoolState.REFUSED: (Instruction.SET_ASIDE, Instruction.THIN_OUT),
}


def instructions_of(state: SpoolState) -> tuple[Instruction, ...]:
    """Return what a state asks of the spool; carried out again after a crash, since each can be repeated."""
    return _INSTRUCTIONS.get(state, ())


def advance(unit: SpooledUnit, event: Event) -> tuple[SpooledUnit, tuple[Instruction, ...]]:
    """Return the unit after `event`, and what the spool must now do; raise `IllegalTransition` for any other move."""
    try:
        state = TRANSITIONS[unit.state, type(event)]
    except KeyError:
        raise IllegalTransition(
            f"A spooled unit in state {unit.state.value} can't take {type(event).__name__} (claim {unit.claim[:12]})."
        ) from None
    moved = replace(unit, state=state)
    if isinstance(event, RefusedForGood):
        moved = replace(moved, code=event.code, sentence=event.sentence)
    return moved, instructions_of(state)
