"""The lifecycle of an audit: a claim is checked by running its work unit again.

A replica on an established other owner's device comes first, where there is one, and is compared by sketch; a referee
(an auditor whom the root key delegated) settles disagreements, samples agreements, and judges alone where nobody can
replicate. Only a referee's finding refutes. Pure rules: no clock, no database, no randomness. Source: PROTOCOL.md
section 5.
"""

from dataclasses import dataclass, replace
from enum import Enum, unique
from typing import Final, TypeAlias

from protocol.documents import Digest, LeaseId, UnitId
from protocol.errors import IllegalTransition
from protocol.keys import KeyId
from protocol.limits import SECOND_MS


@unique
class AuditState(Enum):
    """Where an audit stands."""

    WANTS_REPLICA = "wants_replica"  # an established other owner must run the unit
    REPLICATED = "replicated"  # the replica's sketch is here; its comparison is awaited
    WANTS_BYTES = "wants_bytes"  # the replica's delta is awaited, for a referee
    WANTS_REFEREE = "wants_referee"  # an auditor must run the unit
    WANTS_SECOND = "wants_second"  # another auditor must, since the first one's finding is in doubt
    PASSED = "passed"  # end: the claim is honest work
    FAILED = "failed"  # end, but for an appeal: a referee refuted the claim
    DROPPED = "dropped"  # end: the claim was judged for another reason meanwhile


@unique
class AuditReason(Enum):
    """Why a claim is audited."""

    PROBATION = "probation"  # its owner is not established
    DRAWN = "drawn"  # the epoch's secret drew it
    OUTLIER = "outlier"  # it stands out among the deltas of its merge
    FEW = "few"  # it would be merged with deltas of fewer than two other owners
    TOO_FAST = "too-fast"  # it came in less than half its owner's audited time
    CONFLICT = "conflict"  # its device signed two claims for one lease
    LATE = "late"  # a late claim for the same unit happens to be a replica of it
    OVERDUE = "overdue"  # its bytes came when everybody could know that it was not drawn
    DISTRUSTED = "distrusted"  # its owner let another audit go by
    REPLICA = "replica"  # it was run as the replica of another claim, and a referee refuted it there
    RECHECK = "recheck"  # its owner was banned after it had been merged


FOR_A_REFEREE: Final = frozenset(
    {
        AuditReason.OUTLIER,
        AuditReason.FEW,
        AuditReason.TOO_FAST,
        AuditReason.CONFLICT,
        AuditReason.OVERDUE,
        AuditReason.DISTRUSTED,
        AuditReason.RECHECK,
    }
)
"""Reasons that send a claim to an auditor at once. Its owner can bring most of them about: with a replica, it could
order a partner's confirmation whenever that one is ready to give it; and when a claim is overdue, everybody can compute
who will be offered its replica. Deltas that are audited back are public: copies prove nothing."""


@unique
class Scrutiny(Enum):
    """What an audit makes of an attempt."""

    NONE = "none"  # not audited: counts by its owner's record
    PENDING = "pending"  # must not be merged before its audit has passed
    CONFIRMED = "confirmed"  # an audit passed: counts in full


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """An audit of the claim under `lease` (the subject). `audit` numbers them; 0 before it is stored.

    `replica` is the lease under which the unit is run again; `epoch` the one that drew the subject. `auditor` holds the
    claims now, until `deadline_ms`; `refuted_by` gave the finding that is in doubt or appealed against. `deadline_ms`
    (UTC milliseconds) is that of the current step.
    """

    audit: int
    unit: UnitId
    lease: LeaseId
    owner: KeyId
    claim: Digest
    epoch: int
    reason: AuditReason
    state: AuditState
    deadline_ms: int
    replica: LeaseId | None = None
    auditor: KeyId | None = None
    refuted_by: KeyId | None = None
    appealed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSketched:
    """The replica's claim and sketch are here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAgreed:
    """The sketches agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaDoubted:
    """The sketches disagree, or agree and were drawn to be looked at all the same; its bytes are wanted."""

    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaMissing:
    """No replica came in time, or it turned out useless; a referee must do without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReceived:
    """The replica's delta is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """A referee found the subject's codes within the tolerance of its own run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuted:
    """A referee found the subject's codes outside of the tolerance."""

    auditor: KeyId


@dataclass(frozen=True, slots=True, kw_only=True)
class BothRefuted:
    """A referee refuted the subject and the replica alike: perhaps it is the referee that computes wrongly.

    A second one is awaited until `deadline_ms`.
    """

    auditor: KeyId
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Appealed:
    """The volunteer asks for another referee."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unanswered:
    """No second referee came in time: who is right stays open, and nothing of it is merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overturned:
    """Another audit of the same claim was taken back on appeal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectGone:
    """The subject was judged for another reason; there is nothing to find out any more."""


AuditEvent: TypeAlias = (
    ReplicaSketched
    | ReplicaAgreed
    | ReplicaDoubted
    | ReplicaMissing
    | ReplicaReceived
    | Confirmed
    | Refuted
    | BothRefuted
    | Appealed
    | Unanswered
    | Overturned
    | SubjectGone
)

TRANSITIONS: Final[dict[tuple[AuditState, type[AuditEvent]], AuditState]] = {
    (AuditState.WANTS_REPLICA, ReplicaSketched): AuditState.REPLICATED,
    (AuditState.WANTS_REPLICA, ReplicaMissing): AuditState.WANTS_REFEREE,
    (AuditState.WANTS_REPLICA, SubjectGone): AuditState.DROPPED,
    (AuditState.REPLICATED, ReplicaAgreed): AuditState.PASSED,
    (AuditState.REPLICATED, ReplicaDoubted): AuditState.WANTS_BYTES,
    (AuditState.REPLICATED, ReplicaMissing): AuditState.WANTS_REFEREE,
    (AuditState.REPLICATED, SubjectGone): AuditState.DROPPED,
    (AuditState.WANTS_BYTES, ReplicaReceived): AuditState.WANTS_REFEREE,
    (AuditState.WANTS_BYTES, ReplicaMissing): AuditState.WANTS_REFEREE,
    (AuditState.WANTS_BYTES, SubjectGone): AuditState.DROPPED,
    # A replica that is banned or judged meanwhile is left out; the referee goes on with the subject.
    (AuditState.WANTS_REFEREE, ReplicaMissing): AuditState.WANTS_REFEREE,
    (AuditState.WANTS_REFEREE, Confirmed): AuditState.PASSED,
    (AuditState.WANTS_REFEREE, Refuted): AuditState.FAILED,
    (AuditState.WANTS_REFEREE, BothRefuted): AuditState.WANTS_SECOND,
    (AuditState.WANTS_REFEREE, SubjectGone): AuditState.DROPPED,
    (AuditState.WANTS_SECOND, ReplicaMissing): AuditState.WANTS_SECOND,
    (AuditState.WANTS_SECOND, Confirmed): AuditState.PASSED,
    # Two referees who agree with each other are believed.
    (AuditState.WANTS_SECOND, Refuted): AuditState.FAILED,
    (AuditState.WANTS_SECOND, BothRefuted): AuditState.FAILED,
    (AuditState.WANTS_SECOND, SubjectGone): AuditState.DROPPED,
    (AuditState.WANTS_SECOND, Unanswered): AuditState.DROPPED,
    (AuditState.FAILED, Appealed): AuditState.WANTS_SECOND,
    (AuditState.FAILED, Overturned): AuditState.PASSED,
}
"""Every legal move of an audit."""

_REPLICA_SHARE: Final = 4
"""A replica's first asker is awaited for a quarter of a lease; then the referee goes on alone."""
_REPLICA_AT_LEAST_MS: Final = 10 * SECOND_MS


def replica_wait_ms(lease_ms: int) -> int:
    """Return how long somebody who would run a replica is awaited."""
    return max(_REPLICA_AT_LEAST_MS, lease_ms // _REPLICA_SHARE)


OPEN_AUDITS: Final = frozenset(
    {
        AuditState.WANTS_REPLICA,
        AuditState.REPLICATED,
        AuditState.WANTS_BYTES,
        AuditState.WANTS_REFEREE,
        AuditState.WANTS_SECOND,
    }
)
"""States of an audit that is not settled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptSubject:
    """The subject is honest work: tell its owner's record, and let it be merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectSubject:
    """The subject is refuted: reject it and ban its owner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReplica:
    """Ask the replica's device for its bytes."""


Instruction: TypeAlias = AcceptSubject | RejectSubject | FetchReplica


def advance(thing: Audit, event: AuditEvent) -> tuple[Audit, tuple[Instruction, ...]]:
    """Return the audit after `event`, and what the caller must do now; raise `IllegalTransition`."""
    state = TRANSITIONS.get((thing.state, type(event)))
    if state is None:
        raise IllegalTransition(f"Audit {thing.audit} is {thing.state.value}; {type(event).__name__} does not fit.")
    moved = replace(thing, state=state, auditor=None)
    match event:
        case ReplicaDoubted():
            return replace(moved, deadline_ms=event.deadline_ms), (FetchReplica(),)
        case ReplicaMissing():
            return replace(moved, replica=None), ()
        case ReplicaAgreed() | Confirmed():
            return moved, (AcceptSubject(),)
        case Refuted():
            return replace(moved, refuted_by=event.auditor), (RejectSubject(),)
        case BothRefuted():
            judged: tuple[Instruction, ...] = (RejectSubject(),) if state is AuditState.FAILED else ()
            return replace(moved, refuted_by=event.auditor, deadline_ms=event.deadline_ms), judged
        case Appealed():
            return replace(moved, appealed=True), ()
        case _:
            return moved, ()


def may_take(audit: Audit, auditor: KeyId, now_ms: int) -> bool:
    """Say whether an auditor may have the audit's claims now.

    Nobody judges twice: a second opinion by the same key would be the first one again.
    """
    if audit.auditor is not None and audit.auditor != auditor and now_ms < audit.deadline_ms:
        return False
    if audit.state is AuditState.WANTS_SECOND:
        return audit.refuted_by != auditor
    return audit.state is AuditState.WANTS_REFEREE
