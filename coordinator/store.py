"""What the coordinator remembers: the `Store` interface that every database behind it is held to.

The words MUST below are checked by one conformance suite (`tests/coordinator/store_conformance.py`), which every
implementation passes. The store keeps facts and refuses impossible ones; what may happen next is decided by the
lifecycle tables (`coordinator.units`, `coordinator.rounds`, `coordinator.owners`).

    with store.transaction():
        unit = store.next_open_unit(3)
        ...
        store.save_unit(unit, assigned)
        store.add_attempt(attempt)
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from coordinator.audits import Audit, AuditState
from coordinator.owners import Device, Owner
from coordinator.rounds import Round
from coordinator.units import Attempt, Outcome, Unit, UnitState
from protocol.documents import Digest, LeaseId, UnitId
from protocol.keys import KeyId
from protocol.log import LogEntry


class Store(Protocol):
    """Everything that must survive a crash, except files.

    - A method MUST be called from one thread at a time; it need not always be the same thread.
    - A write outside `transaction()` MUST raise `RuntimeError`, and so MUST a transaction inside another.
    - A transaction MUST be durable when its block has ended, and leave no trace if the block or its end raises.
    - Inside a transaction, reads MUST see its own writes. Nobody else's writes MUST come in between.
    - What a constraint forbids MUST raise `sqlite3.IntegrityError` or the like at the latest when the transaction
      ends: it is a mistake of ours, not a state to be handled.
    - `save_*(before, after)` MUST write only if the row still is as `before` says, and MUST raise `StaleRow` otherwise.
      `before` and `after` MUST name the same row (`ValueError`).
    - A full disk MUST raise `CoordinatorDiskFull`, with the transaction undone.
    - Looking up what is not there MUST return None or an empty tuple, never raise.
    """

    def transaction(self) -> AbstractContextManager[None]:
        """Return a context manager for one atomic, durable piece of work."""
        ...

    def close(self) -> None:
        """Release files and locks; calling it again MUST be harmless."""
        ...

    def backup_to(self, path: Path) -> None:
        """Write a consistent copy to a new file while others go on; raise `DirectoryNotEmpty` if it exists."""
        ...

    # --- owners and devices ----------------------------------------------------------------------------------

    def owner(self, owner: KeyId) -> Owner | None:
        """Return an owner."""
        ...

    def put_owner(self, owner: Owner) -> None:
        """Store an owner, new or changed."""
        ...

    def owners(self) -> tuple[Owner, ...]:
        """Return every owner."""
        ...

    def established_others(self, owner: KeyId) -> int:
        """Return how many owners but this one are established."""
        ...

    def device(self, device: KeyId) -> Device | None:
        """Return a device."""
        ...

    def put_device(self, device: Device) -> None:
        """Store a device, new or changed; its owner MUST be stored."""
        ...

    def device_count(self) -> int:
        """Return how many devices the run has ever seen."""
        ...

    # --- units -----------------------------------------------------------------------------------------------

    def add_units(self, units: Sequence[Unit]) -> None:
        """Store new units. Ids and (round, index) MUST be new; their round MUST be stored by the transaction's end."""
        ...

    def unit(self, unit: UnitId) -> Unit | None:
        """Return a unit."""
        ...

    def next_open_unit(self, round_number: int, *, short_below: str = "", short: bool = False) -> Unit | None:
        """Return the round's OPEN unit with the lowest index; of short units, if wanted, or of long ones, if any is.

        Args:
            short_below: the ids of short units come before this text (`protocol.assignment.short_below`).
        """
        ...

    def save_unit(self, before: Unit, after: Unit) -> None:
        """Store a changed unit. A chosen attempt MUST be one of this unit's whose bytes were received."""
        ...

    def units(self, round_number: int) -> tuple[Unit, ...]:
        """Return the round's units by index."""
        ...

    def unsettled_units(self, round_number: int) -> tuple[Unit, ...]:
        """Return the units of this round and earlier ones that are not settled; by round, index."""
        ...

    def units_to_unmerge(self) -> tuple[Unit, ...]:
        """Return merged units that are retracted and that no later checkpoint takes out yet."""
        ...

    def unit_counts(self, round_number: int) -> dict[UnitState, int]:
        """Return how many of the round's units are in each state, zeros included."""
        ...

    def outcome_counts(self, round_number: int | None = None) -> dict[Outcome, int]:
        """Return how many settled units, of one round or of all, had each outcome, zeros included."""
        ...

    def units_by_member(self, round_number: int | None = None) -> dict[str, int]:
        """Return how many accepted and not retracted units, of one round or of all, each member (pseudonym) did."""
        ...

    # --- attempts --------------------------------------------------------------------------------------------

    def add_attempt(self, attempt: Attempt) -> None:
        """Store a new LEASED attempt. A device, and a unit, MUST have at most one LEASED attempt."""
        ...

    def attempt(self, lease: LeaseId) -> Attempt | None:
        """Return the attempt under a lease."""
        ...

    def attempt_of_claim(self, claim_sha256: Digest) -> Attempt | None:
        """Return the attempt that made a claim; a claim's digest MUST belong to one attempt only."""
        ...

    def latest_claimed(self, device: KeyId) -> Attempt | None:
        """Return a device's newest attempt that it has claimed a result of."""
        ...

    def save_attempt(self, before: Attempt, after: Attempt) -> None:
        """Store a changed attempt. Its state and what it holds MUST fit each other."""
        ...

    def leased_attempt(self, device: KeyId) -> Attempt | None:
        """Return the attempt that the device trains."""
        ...

    def leased_count(self, owner: KeyId) -> int:
        """Return how many LEASED attempts the owner's devices have."""
        ...

    def unsent_count(self, owner: KeyId) -> int:
        """Return how many claims of the owner's devices wait for their sketch or bytes, and are still in time."""
        ...

    def held_by_newcomers(self, round_number: int) -> int:
        """Return how many units of a round owners on probation work on, or have delivered and are audited for."""
        ...

    def uploading_attempts(self, device: KeyId) -> tuple[Attempt, ...]:
        """Return the device's CLAIMED and SKETCHED attempts, the nearest deadline first."""
        ...

    def due_attempts(self, now_ms: int) -> tuple[Attempt, ...]:
        """Return LEASED, CLAIMED and SKETCHED attempts whose deadline is not after `now_ms`, the oldest first."""
        ...

    def postpone(self, since_ms: int, by_ms: int) -> None:
        """Move every deadline that was ahead at `since_ms`, of open attempts, audits and appeals, back by `by_ms`."""
        ...

    def attempts_of_unit(self, unit: UnitId) -> tuple[Attempt, ...]:
        """Return the unit's attempts in the order in which they were added."""
        ...

    def mergeable(self) -> tuple[tuple[Unit, Attempt], ...]:
        """Return unsettled units with the first RECEIVED attempt that no audit holds back; by round, index."""
        ...

    def ready_count(self, round_number: int) -> int:
        """Return how many of the round's units `mergeable` holds."""
        ...

    def wasted_count(self, owner: KeyId, round_number: int) -> int:
        """Return how many leases of the round came to nothing: given up, expired, or answered with no delta in time.

        A claim counts while its bytes are overdue, and no longer when they have come.
        """
        ...

    def unsent_in_doubt(self, round_number: int) -> tuple[Attempt, ...]:
        """Return attempts of this round and earlier ones that must be audited and whose bytes did not come."""
        ...

    def unmerged_of_owner(self, owner: KeyId) -> tuple[Attempt, ...]:
        """Return the owner's attempts that are leased, or claimed and not judged, in the order of their leases."""
        ...

    def merged_unaudited_of_owner(self, owner: KeyId) -> tuple[Attempt, ...]:
        """Return the owner's attempts that were chosen for a merge, seen by no auditor, and not retracted."""
        ...

    def merged_on_word_of(self, owner: KeyId) -> tuple[Attempt, ...]:
        """Return others' attempts like that which passed an audit because a replica of this owner agreed."""
        ...

    def unjudged(self, before_round: int) -> tuple[Attempt, ...]:
        """Return the RECEIVED and EXCUSED attempts of earlier rounds, in the order in which they were added."""
        ...

    def received_count(self, round_number: int) -> int:
        """Return how many of the round's units have a RECEIVED attempt."""
        ...

    def add_evidence(self, lease: LeaseId, claim_envelope: bytes) -> None:
        """Keep a second, different claim under a lease. The same bytes again, and more than
        `limits.MAX_EVIDENCE_PER_LEASE`, MUST change nothing: evidence must not be a way to fill the disk.
        """
        ...

    def evidence(self, lease: LeaseId) -> tuple[bytes, ...]:
        """Return the claims that were kept as evidence, in the order of their arrival."""
        ...

    # --- audits ----------------------------------------------------------------------------------------------

    def add_audit(self, audit: Audit) -> Audit:
        """Store a new audit and return it with its number."""
        ...

    def audit(self, number: int) -> Audit | None:
        """Return an audit."""
        ...

    def save_audit(self, before: Audit, after: Audit) -> None:
        """Store a changed audit."""
        ...

    def audits(self, state: AuditState) -> tuple[Audit, ...]:
        """Return the audits in an open state, the oldest first."""
        ...

    def audits_of_subject(self, lease: LeaseId) -> tuple[Audit, ...]:
        """Return the audits of an attempt's claim, the oldest first."""
        ...

    def audits_of_replica(self, lease: LeaseId) -> tuple[Audit, ...]:
        """Return the audits that an attempt serves as a replica, the oldest first."""
        ...

    def failed_count(self, owner: KeyId) -> int:
        """Return how many audits of the owner's claims ended with a referee's refutation that still holds."""
        ...

    def unmerged_blobs(self) -> tuple[Digest, ...]:
        """Return the blobs of judged attempts that no merge chose: kept only as long as somebody may appeal.

        A blob that is a chosen attempt's as well MUST NOT be among them.
        """
        ...

    def audit_counts(self) -> dict[AuditState, int]:
        """Return how many audits are in each state, zeros included."""
        ...

    def in_doubt_count(self, epoch: int) -> int:
        """Return how many claims of an epoch still wait for an audit, appeals and audits back not counted."""
        ...

    def awaited_count(self, epoch: int, now_ms: int) -> int:
        """Return how many claims of an epoch may still bring their bytes in time."""
        ...

    def add_opinion(self, audit: int, claim: Digest, auditor: KeyId, finding: str, envelope: bytes) -> None:
        """Store an auditor's signed opinion on a claim; one of each auditor MUST stand for each audit and claim."""
        ...

    def opinions(self, audit: int) -> tuple[bytes, ...]:
        """Return the signed opinions of an audit in the order of their arrival."""
        ...

    # --- rounds ----------------------------------------------------------------------------------------------

    def round(self, round_number: int) -> Round | None:
        """Return a round."""
        ...

    def latest_round(self) -> Round | None:
        """Return the round with the highest number."""
        ...

    def add_round(self, new: Round) -> None:
        """Store a new round. At most one round MUST be unpublished: the next one trains from what this publishes."""
        ...

    def save_round(self, before: Round, after: Round) -> None:
        """Store a changed round."""
        ...

    # --- log and meta ----------------------------------------------------------------------------------------

    def append_log(self, kind: str, body: bytes) -> LogEntry:
        """Append to the log, whose entries MUST be numbered 1, 2, ... and MUST never change or go."""
        ...

    def log_entries(self, first: int, last: int) -> tuple[LogEntry, ...]:
        """Return the entries from position `first` to `last`, both included."""
        ...

    def log_head(self) -> tuple[int, bytes]:
        """Return the last position and head; (0, `protocol.log.EMPTY_LOG_HEAD`) for an empty log."""
        ...

    def meta(self, key: str) -> str | None:
        """Return a stored fact about the run, such as the last persisted time."""
        ...

    def put_meta(self, key: str, value: str) -> None:
        """Store a fact, new or changed."""
        ...
