"""How values of the store are written as rows of the SQLite database, and read back."""

import json
import sqlite3
from dataclasses import asdict
from typing import Any, TypeAlias

from coordinator.audits import Audit, AuditReason, AuditState, Scrutiny
from coordinator.owners import Device, Owner, OwnerState
from coordinator.rounds import Round, RoundState
from coordinator.units import Attempt, AttemptState, Outcome, Unit, UnitState
from protocol.canonical import canonical_json
from protocol.documents import Artifact, Digest, LeaseId, MergeEntry, UnitId, UnmergeEntry
from protocol.keys import KeyId
from protocol.log import LogEntry

Row: TypeAlias = dict[str, object]
"""Named parameters of a statement."""


def owner_row(owner: Owner) -> Row:
    """Return the parameters that store an owner."""
    return {**asdict(owner), "state": owner.state.value}


def owner_of(row: sqlite3.Row) -> Owner:
    """Return the owner in a row of `owners`."""
    return Owner(
        owner=KeyId(row["owner"]),
        public_key=row["public_key"],
        member=row["member"],
        terms_sha256=Digest(row["terms_sha256"]),
        state=OwnerState(row["state"]),
        valid_in_row=row["valid_in_row"],
        audited_ms=row["audited_ms"],
    )


def device_row(device: Device) -> Row:
    """Return the parameters that store a device."""
    return asdict(device)


def device_of(row: sqlite3.Row) -> Device:
    """Return the device in a row of `devices`."""
    return Device(
        device=KeyId(row["device"]),
        public_key=row["public_key"],
        owner=KeyId(row["owner"]),
        delegation_envelope=row["delegation_envelope"],
        device_class=row["device_class"],
        trainer_version=row["trainer_version"],
    )


def unit_row(unit: Unit) -> Row:
    """Return the parameters that store a unit."""
    return {
        "unit": unit.unit,
        "round": unit.round,
        "index": unit.index,
        "state": unit.state.value,
        "outcome": unit.outcome.value if unit.outcome else None,
        "chosen": unit.chosen,
        "merged_in": unit.merged_in,
        "retracted": int(unit.retracted),
        "unmerged_in": unit.unmerged_in,
    }


def unit_of(row: sqlite3.Row) -> Unit:
    """Return the unit in a row of `units`."""
    return Unit(
        unit=UnitId(row["unit"]),
        round=row["round"],
        index=row["index"],
        state=UnitState(row["state"]),
        outcome=Outcome(row["outcome"]) if row["outcome"] else None,
        chosen=LeaseId(row["chosen"]) if row["chosen"] else None,
        merged_in=row["merged_in"],
        retracted=bool(row["retracted"]),
        unmerged_in=row["unmerged_in"],
    )


def attempt_row(attempt: Attempt) -> Row:
    """Return the parameters that store an attempt."""
    return {
        **{name: getattr(attempt, name) for name in _PLAIN_ATTEMPT_COLUMNS},
        "state": attempt.state.value,
        "artifacts": _json([asdict(artifact) for artifact in attempt.artifacts]),
        "scrutiny": attempt.scrutiny.value,
        "reason": attempt.reason.value if attempt.reason else None,
        "refused": int(attempt.refused),
    }


_PLAIN_ATTEMPT_COLUMNS = (
    "lease", "unit", "round", "device", "owner", "deadline_ms", "lease_envelope", "lease_sha256", "claim_sha256",
    "claim_envelope", "claim_receipt", "sketch", "bytes_receipt", "verdict_envelope", "leased_ms", "trained_ms",
    "epoch", "audit_share", "late",
)  # fmt: skip


def attempt_of(row: sqlite3.Row) -> Attempt:
    """Return the attempt in a row of `attempts`."""
    return Attempt(
        lease=LeaseId(row["lease"]),
        unit=UnitId(row["unit"]),
        round=row["round"],
        device=KeyId(row["device"]),
        owner=KeyId(row["owner"]),
        state=AttemptState(row["state"]),
        deadline_ms=row["deadline_ms"],
        lease_envelope=row["lease_envelope"],
        lease_sha256=Digest(row["lease_sha256"]),
        claim_sha256=Digest(row["claim_sha256"]) if row["claim_sha256"] else None,
        claim_envelope=row["claim_envelope"],
        artifacts=tuple(Artifact(**members) for members in json.loads(row["artifacts"])),
        claim_receipt=row["claim_receipt"],
        sketch=row["sketch"],
        bytes_receipt=row["bytes_receipt"],
        verdict_envelope=row["verdict_envelope"],
        leased_ms=row["leased_ms"],
        trained_ms=row["trained_ms"],
        epoch=row["epoch"],
        audit_share=row["audit_share"],
        scrutiny=Scrutiny(row["scrutiny"]),
        reason=AuditReason(row["reason"]) if row["reason"] else None,
        late=row["late"],
        refused=bool(row["refused"]),
    )


def audit_row(audit: Audit) -> Row:
    """Return the parameters that store an audit."""
    return {
        **asdict(audit),
        "state": audit.state.value,
        "reason": audit.reason.value,
        "appealed": int(audit.appealed),
    }


def audit_of(row: sqlite3.Row) -> Audit:
    """Return the audit in a row of `audits`."""
    return Audit(
        audit=row["audit"],
        unit=UnitId(row["unit"]),
        lease=LeaseId(row["lease"]),
        owner=KeyId(row["owner"]),
        claim=Digest(row["claim"]),
        epoch=row["epoch"],
        reason=AuditReason(row["reason"]),
        state=AuditState(row["state"]),
        deadline_ms=row["deadline_ms"],
        replica=LeaseId(row["replica"]) if row["replica"] else None,
        auditor=KeyId(row["auditor"]) if row["auditor"] else None,
        refuted_by=KeyId(row["refuted_by"]) if row["refuted_by"] else None,
        appealed=bool(row["appealed"]),
    )


def round_row(of: Round) -> Row:
    """Return the parameters that store a round."""
    return {
        "round": of.round,
        "state": of.state.value,
        "opened_ms": of.opened_ms,
        "closed_ms": of.closed_ms,
        "merge": _json([asdict(entry) for entry in of.merge]),
        "unmerge": _json([asdict(entry) for entry in of.unmerge]),
        "weigh_seed": of.weigh_seed,
        "manifest_sha256": of.manifest_sha256,
    }


def round_of(row: sqlite3.Row) -> Round:
    """Return the round in a row of `rounds`."""
    return Round(
        round=row["round"],
        state=RoundState(row["state"]),
        opened_ms=row["opened_ms"],
        closed_ms=row["closed_ms"],
        merge=tuple(MergeEntry(**members) for members in json.loads(row["merge"])),
        unmerge=tuple(UnmergeEntry(**members) for members in json.loads(row["unmerge"])),
        weigh_seed=Digest(row["weigh_seed"]) if row["weigh_seed"] else None,
        manifest_sha256=Digest(row["manifest_sha256"]) if row["manifest_sha256"] else None,
    )


def log_row(entry: LogEntry) -> Row:
    """Return the parameters that store a log entry."""
    return asdict(entry)


def log_entry_of(row: sqlite3.Row) -> LogEntry:
    """Return the entry in a row of `log`."""
    return LogEntry(position=row["position"], kind=row["kind"], body=row["body"], head=row["head"])


def _json(value: list[dict[str, Any]]) -> str:
    return canonical_json(value).decode("utf-8")
