"""The default `Store`: one SQLite file in WAL mode, written through one connection, every commit on the disk.

One writer, because SQLite's lock is unfair to the second; `synchronous=FULL`, because a volunteer holds a signed
receipt for what a commit has stored. The statements are in `sql/queries.sql`, the constraints in `sql/schema.sql`.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from coordinator.audits import Audit, AuditState
from coordinator.owners import Device, Owner
from coordinator.rounds import Round
from coordinator.sql_files import parse_queries, read_sql
from coordinator.sqlite_file import backup_database, open_database, our_errors
from coordinator.sqlite_rows import (
    attempt_of,
    attempt_row,
    audit_of,
    audit_row,
    device_of,
    device_row,
    log_entry_of,
    log_row,
    owner_of,
    owner_row,
    round_of,
    round_row,
    unit_of,
    unit_row,
)
from coordinator.units import NEVER_MS, Attempt, Outcome, Unit, UnitState
from protocol.documents import Digest, LeaseId, UnitId
from protocol.errors import StaleRow
from protocol.keys import KeyId
from protocol.limits import MAX_EVIDENCE_PER_LEASE
from protocol.log import EMPTY_LOG_HEAD, LogEntry, next_head

T = TypeVar("T")


class SqliteStore:
    """A `coordinator.store.Store` in a SQLite file; `SqliteStore.open` makes one."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._queries = parse_queries(read_sql("queries.sql"))

    @classmethod
    def open(cls, path: Path) -> "SqliteStore":
        """Open the store in the file `path`, which is made if it is not there; raise as `open_database` does."""
        return cls(path, open_database(path))

    # --- transactions ----------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See `Store.transaction`."""
        if self._in_transaction():
            raise RuntimeError("a transaction inside another would not be atomic on its own")
        with our_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            with our_errors(self._path):
                self._connection.execute("COMMIT")
        except BaseException:
            # A full disk makes SQLite roll back by itself; a commit that a constraint stops does not.
            if self._in_transaction():
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """See `Store.close`."""
        self._connection.close()

    def backup_to(self, path: Path) -> None:
        """See `Store.backup_to`."""
        backup_database(self._path, path)

    def _in_transaction(self) -> bool:
        return self._connection.in_transaction

    def _one(self, make: Callable[[sqlite3.Row], T], query: str, /, **values: object) -> T | None:
        with our_errors(self._path):
            row = self._connection.execute(self._queries[query], values).fetchone()
        return None if row is None else make(row)

    def _all(self, make: Callable[[sqlite3.Row], T], query: str, /, **values: object) -> tuple[T, ...]:
        with our_errors(self._path):
            rows = self._connection.execute(self._queries[query], values).fetchall()
        return tuple(make(row) for row in rows)

    def _count(self, query: str, /, **values: object) -> int:
        return self._one(lambda row: int(row["number"]), query, **values) or 0

    def _write(self, query: str, /, **values: object) -> int:
        if not self._in_transaction():
            raise RuntimeError(f"{query} writes, so it belongs in a transaction")
        with our_errors(self._path):
            return self._connection.execute(self._queries[query], values).rowcount

    def _save(self, query: str, thing: str, /, **values: object) -> None:
        if self._write(query, **values) != 1:
            raise StaleRow(private=f"{thing} is not as it was read")

    # --- owners and devices ----------------------------------------------------------------------------------

    def owner(self, owner: KeyId) -> Owner | None:
        """See `Store.owner`."""
        return self._one(owner_of, "owner", owner=owner)

    def put_owner(self, owner: Owner) -> None:
        """See `Store.put_owner`."""
        self._write("put_owner", **owner_row(owner))

    def owners(self) -> tuple[Owner, ...]:
        """See `Store.owners`."""
        return self._all(owner_of, "owners")

    def established_others(self, owner: KeyId) -> int:
        """See `Store.established_others`."""
        return self._count("established_others", owner=owner)

    def device(self, device: KeyId) -> Device | None:
        """See `Store.device`."""
        return self._one(device_of, "device", device=device)

    def put_device(self, device: Device) -> None:
        """See `Store.put_device`."""
        self._write("put_device", **device_row(device))

    def device_count(self) -> int:
        """See `Store.device_count`."""
        return self._count("device_count")

    # --- units -----------------------------------------------------------------------------------------------

    def add_units(self, units: Sequence[Unit]) -> None:
        """See `Store.add_units`."""
        for unit in units:
            self._write("add_unit", **unit_row(unit))

    def unit(self, unit: UnitId) -> Unit | None:
        """See `Store.unit`."""
        return self._one(unit_of, "unit", unit=unit)

    def next_open_unit(self, round_number: int, *, short_below: str = "", short: bool = False) -> Unit | None:
        """See `Store.next_open_unit`."""
        return self._one(unit_of, "next_open_unit", round=round_number, short_below=short_below, short=int(short))

    def save_unit(self, before: Unit, after: Unit) -> None:
        """See `Store.save_unit`."""
        _same((before.unit, before.round, before.index), (after.unit, after.round, after.index))
        was = unit_row(before)
        fence = {
            f"before_{name}": was[name]
            for name in ("state", "outcome", "chosen", "merged_in", "retracted", "unmerged_in")
        }
        self._save("save_unit", f"unit {before.unit}", **unit_row(after), **fence)

    def units(self, round_number: int) -> tuple[Unit, ...]:
        """See `Store.units`."""
        return self._all(unit_of, "units", round=round_number)

    def unsettled_units(self, round_number: int) -> tuple[Unit, ...]:
        """See `Store.unsettled_units`."""
        return self._all(unit_of, "unsettled_units", round=round_number)

    def units_to_unmerge(self) -> tuple[Unit, ...]:
        """See `Store.units_to_unmerge`."""
        return self._all(unit_of, "units_to_unmerge")

    def unit_counts(self, round_number: int) -> dict[UnitState, int]:
        """See `Store.unit_counts`."""
        rows = self._all(lambda row: (UnitState(row["state"]), int(row["number"])), "unit_counts", round=round_number)
        return dict.fromkeys(UnitState, 0) | dict(rows)

    def outcome_counts(self, round_number: int | None = None) -> dict[Outcome, int]:
        """See `Store.outcome_counts`."""
        rows = self._all(
            lambda row: (Outcome(row["outcome"]), int(row["number"])), "outcome_counts", round=round_number
        )
        return dict.fromkeys(Outcome, 0) | dict(rows)

    def units_by_member(self, round_number: int | None = None) -> dict[str, int]:
        """See `Store.units_by_member`."""
        rows = self._all(lambda row: (str(row["member"]), int(row["number"])), "units_by_member", round=round_number)
        return dict(rows)

    # --- attempts --------------------------------------------------------------------------------------------

    def add_attempt(self, attempt: Attempt) -> None:
        """See `Store.add_attempt`."""
        self._write("add_attempt", **attempt_row(attempt))

    def attempt(self, lease: LeaseId) -> Attempt | None:
        """See `Store.attempt`."""
        return self._one(attempt_of, "attempt", lease=lease)

    def attempt_of_claim(self, claim_sha256: Digest) -> Attempt | None:
        """See `Store.attempt_of_claim`."""
        return self._one(attempt_of, "attempt_of_claim", claim_sha256=claim_sha256)

    def latest_claimed(self, device: KeyId) -> Attempt | None:
        """See `Store.latest_claimed`."""
        return self._one(attempt_of, "latest_claimed", device=device)

    def save_attempt(self, before: Attempt, after: Attempt) -> None:
        """See `Store.save_attempt`."""
        _same(_identity(before), _identity(after))
        fence = {
            "before_state": before.state.value,
            "before_deadline_ms": before.deadline_ms,
            "before_scrutiny": before.scrutiny.value,
        }
        self._save("save_attempt", f"attempt {before.lease}", **attempt_row(after), **fence)

    def leased_attempt(self, device: KeyId) -> Attempt | None:
        """See `Store.leased_attempt`."""
        return self._one(attempt_of, "leased_attempt", device=device)

    def leased_count(self, owner: KeyId) -> int:
        """See `Store.leased_count`."""
        return self._count("leased_count", owner=owner)

    def unsent_count(self, owner: KeyId) -> int:
        """See `Store.unsent_count`."""
        return self._count("unsent_count", owner=owner, never_ms=NEVER_MS)

    def held_by_newcomers(self, round_number: int) -> int:
        """See `Store.held_by_newcomers`."""
        return self._count("held_by_newcomers", round=round_number, never_ms=NEVER_MS)

    def uploading_attempts(self, device: KeyId) -> tuple[Attempt, ...]:
        """See `Store.uploading_attempts`."""
        return self._all(attempt_of, "uploading_attempts", device=device)

    def due_attempts(self, now_ms: int) -> tuple[Attempt, ...]:
        """See `Store.due_attempts`."""
        return self._all(attempt_of, "due_attempts", now_ms=now_ms)

    def postpone(self, since_ms: int, by_ms: int) -> None:
        """See `Store.postpone`."""
        self._write("postpone_attempts", since_ms=since_ms, by_ms=by_ms, never_ms=NEVER_MS)
        self._write("postpone_audits", since_ms=since_ms, by_ms=by_ms)

    def attempts_of_unit(self, unit: UnitId) -> tuple[Attempt, ...]:
        """See `Store.attempts_of_unit`."""
        return self._all(attempt_of, "attempts_of_unit", unit=unit)

    def mergeable(self) -> tuple[tuple[Unit, Attempt], ...]:
        """See `Store.mergeable`."""
        pairs = []
        for attempt in self._all(attempt_of, "mergeable"):
            unit = self.unit(attempt.unit)
            assert unit is not None  # a foreign key
            pairs.append((unit, attempt))
        return tuple(pairs)

    def ready_count(self, round_number: int) -> int:
        """See `Store.ready_count`."""
        return self._count("ready_count", round=round_number)

    def wasted_count(self, owner: KeyId, round_number: int) -> int:
        """See `Store.wasted_count`."""
        return self._count("wasted_count", owner=owner, round=round_number, never_ms=NEVER_MS)

    def unsent_in_doubt(self, round_number: int) -> tuple[Attempt, ...]:
        """See `Store.unsent_in_doubt`."""
        return self._all(attempt_of, "unsent_in_doubt", round=round_number)

    def unmerged_of_owner(self, owner: KeyId) -> tuple[Attempt, ...]:
        """See `Store.unmerged_of_owner`."""
        return self._all(attempt_of, "unmerged_of_owner", owner=owner)

    def merged_unaudited_of_owner(self, owner: KeyId) -> tuple[Attempt, ...]:
        """See `Store.merged_unaudited_of_owner`."""
        return self._all(attempt_of, "merged_unaudited_of_owner", owner=owner)

    def merged_on_word_of(self, owner: KeyId) -> tuple[Attempt, ...]:
        """See `Store.merged_on_word_of`."""
        return self._all(attempt_of, "merged_on_word_of", owner=owner)

    # --- audits ----------------------------------------------------------------------------------------------

    def add_audit(self, audit: Audit) -> Audit:
        """See `Store.add_audit`."""
        self._write("add_audit", **audit_row(audit))
        stored = self.audit(self._count("last_audit"))
        assert stored is not None  # just written
        return stored

    def audit(self, number: int) -> Audit | None:
        """See `Store.audit`."""
        return self._one(audit_of, "audit", audit=number)

    def save_audit(self, before: Audit, after: Audit) -> None:
        """See `Store.save_audit`."""
        _same((before.audit, before.lease, before.reason), (after.audit, after.lease, after.reason))
        was = audit_row(before)
        fence = {f"before_{name}": was[name] for name in ("state", "replica", "auditor")}
        self._save("save_audit", f"audit {before.audit}", **audit_row(after), **fence)

    def audits(self, state: AuditState) -> tuple[Audit, ...]:
        """See `Store.audits`."""
        return self._all(audit_of, "open_audits", state=state.value)

    def audits_of_subject(self, lease: LeaseId) -> tuple[Audit, ...]:
        """See `Store.audits_of_subject`."""
        return self._all(audit_of, "audits_of_subject", lease=lease)

    def audits_of_replica(self, lease: LeaseId) -> tuple[Audit, ...]:
        """See `Store.audits_of_replica`."""
        return self._all(audit_of, "audits_of_replica", replica=lease)

    def failed_count(self, owner: KeyId) -> int:
        """See `Store.failed_count`."""
        return self._count("failed_count", owner=owner)

    def unmerged_blobs(self) -> tuple[Digest, ...]:
        """See `Store.unmerged_blobs`."""
        attempts = self._all(attempt_of, "rejected_blobs")
        return tuple(Digest(artifact.blob_sha256) for attempt in attempts for artifact in attempt.artifacts)

    def audit_counts(self) -> dict[AuditState, int]:
        """See `Store.audit_counts`."""
        rows = self._all(lambda row: (AuditState(row["state"]), int(row["number"])), "audit_counts")
        return dict.fromkeys(AuditState, 0) | dict(rows)

    def in_doubt_count(self, epoch: int) -> int:
        """See `Store.in_doubt_count`."""
        return self._count("in_doubt_count", epoch=epoch)

    def awaited_count(self, epoch: int, now_ms: int) -> int:
        """See `Store.awaited_count`."""
        return self._count("awaited_count", epoch=epoch, now_ms=now_ms, never_ms=NEVER_MS)

    def add_opinion(self, audit: int, claim: Digest, auditor: KeyId, finding: str, envelope: bytes) -> None:
        """See `Store.add_opinion`."""
        self._write("add_opinion", audit=audit, claim=claim, auditor=auditor, finding=finding, envelope=envelope)

    def opinions(self, audit: int) -> tuple[bytes, ...]:
        """See `Store.opinions`."""
        return self._all(lambda row: bytes(row["envelope"]), "opinions", audit=audit)

    # --- more of attempts ------------------------------------------------------------------------------------

    def unjudged(self, before_round: int) -> tuple[Attempt, ...]:
        """See `Store.unjudged`."""
        return self._all(attempt_of, "unjudged", before_round=before_round)

    def received_count(self, round_number: int) -> int:
        """See `Store.received_count`."""
        return self._count("received_count", round=round_number)

    def add_evidence(self, lease: LeaseId, claim_envelope: bytes) -> None:
        """See `Store.add_evidence`."""
        self._write("add_evidence", lease=lease, claim_envelope=claim_envelope, most=MAX_EVIDENCE_PER_LEASE)

    def evidence(self, lease: LeaseId) -> tuple[bytes, ...]:
        """See `Store.evidence`."""
        return self._all(lambda row: bytes(row["claim_envelope"]), "evidence", lease=lease)

    # --- rounds ----------------------------------------------------------------------------------------------

    def round(self, round_number: int) -> Round | None:
        """See `Store.round`."""
        return self._one(round_of, "round", round=round_number)

    def latest_round(self) -> Round | None:
        """See `Store.latest_round`."""
        return self._one(round_of, "latest_round")

    def add_round(self, new: Round) -> None:
        """See `Store.add_round`."""
        self._write("add_round", **round_row(new))

    def save_round(self, before: Round, after: Round) -> None:
        """See `Store.save_round`."""
        _same((before.round, before.opened_ms), (after.round, after.opened_ms))
        self._save("save_round", f"round {before.round}", **round_row(after), before_state=before.state.value)

    # --- log and meta ----------------------------------------------------------------------------------------

    def append_log(self, kind: str, body: bytes) -> LogEntry:
        """See `Store.append_log`."""
        position, head = self.log_head()
        entry = LogEntry(position=position + 1, kind=kind, body=body, head=next_head(head, kind, body))
        self._write("append_log", **log_row(entry))
        return entry

    def log_entries(self, first: int, last: int) -> tuple[LogEntry, ...]:
        """See `Store.log_entries`."""
        return self._all(log_entry_of, "log_entries", first=first, last=last)

    def log_head(self) -> tuple[int, bytes]:
        """See `Store.log_head`."""
        end = self._one(lambda row: (int(row["position"]), bytes(row["head"])), "log_head")
        return end or (0, EMPTY_LOG_HEAD)

    def meta(self, key: str) -> str | None:
        """See `Store.meta`."""
        return self._one(lambda row: str(row["value"]), "meta", key=key)

    def put_meta(self, key: str, value: str) -> None:
        """See `Store.put_meta`."""
        self._write("put_meta", key=key, value=value)


_UNIT_FENCE = ("state", "outcome", "chosen", "merged_in", "retracted", "unmerged_in")


def _identity(attempt: Attempt) -> tuple[object, ...]:
    return (
        attempt.lease,
        attempt.unit,
        attempt.round,
        attempt.device,
        attempt.owner,
        attempt.lease_envelope,
        attempt.lease_sha256,
        attempt.leased_ms,
    )


def _same(before: object, after: object) -> None:
    if before != after:
        raise ValueError(f"{before!r} can't be saved as {after!r}: these are two things")
