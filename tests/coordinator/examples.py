"""Example values that the coordinator's tests share: one owner with devices, units and attempts of a small run."""

import hashlib

from coordinator.audits import Audit, AuditReason, AuditState
from coordinator.owners import Device, Owner
from coordinator.rounds import Round
from coordinator.units import Attempt, Claimed, Received, Sketched, Unit, advance
from protocol.documents import Artifact, Digest, LeaseId, MergeEntry, UnitId, UnmergeEntry
from protocol.keys import KeyId
from protocol.limits import SKETCH_BYTES

SKETCH = bytes(SKETCH_BYTES)


def digest(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


def lease_id(text: str) -> LeaseId:
    return LeaseId(digest("lease/" + text)[:32])


def owner(name: str = "ada") -> Owner:
    return Owner(
        owner=KeyId(digest("owner/" + name)),
        public_key=digest("owner-key/" + name),
        member=digest("member/" + name),
        terms_sha256=digest("terms"),
    )


def device(name: str = "ada-1", owned_by: str = "ada") -> Device:
    return Device(
        device=KeyId(digest("device/" + name)),
        public_key=digest("device-key/" + name),
        owner=owner(owned_by).owner,
        delegation_envelope=b"delegation of " + name.encode(),
        device_class="cpu-x86_64-avx2-torch2.13-t1",
        trainer_version="0.1.0",
    )


def unit(index: int = 0, round_number: int = 1) -> Unit:
    return Unit(unit=UnitId(digest(f"unit/{round_number}/{index}")), round=round_number, index=index)


def leased(lease: str = "a", of: Unit | None = None, by: Device | None = None, *, deadline_ms: int = 60_000) -> Attempt:
    of, by = of or unit(), by or device()
    return Attempt(
        lease=lease_id(lease),
        unit=of.unit,
        round=of.round,
        device=by.device,
        owner=by.owner,
        deadline_ms=deadline_ms,
        lease_envelope=b"lease " + lease.encode(),
        lease_sha256=digest("lease payload " + lease),
        leased_ms=1_000,
    )


def artifact(name: str) -> Artifact:
    return Artifact(role="delta", content_sha256=digest("content/" + name), blob_sha256=digest("blob/" + name), size=9)


def claim_event(name: str, *, deadline_ms: int = 120_000, reason: AuditReason | None = None) -> Claimed:
    return Claimed(
        claim_sha256=digest("claim/" + name),
        claim_envelope=b"claim " + name.encode(),
        artifacts=(artifact(name),),
        receipt=b"receipt of claim " + name.encode(),
        deadline_ms=deadline_ms,
        trained_ms=9_000,
        epoch=1,
        audit_share=838_861,
        reason=reason,
    )


def claimed(attempt: Attempt, reason: AuditReason | None = None) -> Attempt:
    return advance(attempt, claim_event(attempt.lease, reason=reason))[0]


def sketched(attempt: Attempt, reason: AuditReason | None = None) -> Attempt:
    return advance(claimed(attempt, reason), Sketched(sketch=SKETCH))[0]


def received(attempt: Attempt, reason: AuditReason | None = None) -> Attempt:
    return advance(sketched(attempt, reason), Received(receipt=b"receipt of bytes", late=0))[0]


def audit(
    of: Attempt, state: AuditState = AuditState.WANTS_REFEREE, *, replica: str | None = None, epoch: int = 1
) -> Audit:
    """An audit of a claimed attempt, not stored yet; `replica` is the name of a lease."""
    assert of.claim_sha256 is not None
    return Audit(
        audit=0,
        unit=of.unit,
        lease=of.lease,
        owner=of.owner,
        claim=of.claim_sha256,
        epoch=epoch,
        reason=AuditReason.DRAWN,
        state=state,
        deadline_ms=90_000,
        replica=None if replica is None else lease_id(replica),
        refuted_by=KeyId(digest("auditor")) if state in (AuditState.WANTS_SECOND, AuditState.FAILED) else None,
    )


def merge_entry(attempt: Attempt, weight: int = 2**24) -> MergeEntry:
    assert attempt.claim_sha256 is not None
    (delta,) = attempt.artifacts
    return MergeEntry(
        claim=attempt.claim_sha256,
        unit=attempt.unit,
        round=attempt.round,
        blob_sha256=delta.blob_sha256,
        content_sha256=delta.content_sha256,
        size=delta.size,
        weight=weight,
        samples=640,
        member=owner().member,
        audited=True,
        influence=2**24,
        late=0,
    )


def unmerge_entry(entry: MergeEntry, checkpoint: int = 1) -> UnmergeEntry:
    return UnmergeEntry(
        claim=entry.claim,
        unit=entry.unit,
        checkpoint=checkpoint,
        blob_sha256=entry.blob_sha256,
        content_sha256=entry.content_sha256,
        size=entry.size,
        weight=entry.weight,
        member=entry.member,
    )


def first_round() -> Round:
    return Round(round=1, opened_ms=1_000)
