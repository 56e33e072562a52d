"""Finished units on disk, so that no crash, full disk or unreachable coordinator loses one.

    SPOOL/incoming/LEASE/    a delta that is being written; after a crash it is dropped and the unit is trained again
    SPOOL/pending/CLAIM/     state.json, lease.json, claim.json, delta.safetensors.zst, and the receipts as they come
    SPOOL/settled/CLAIM/     the same with verdict.json: the volunteer's proof of what was done; the delta stays only if
                             the verdict rejects it, until the time for an appeal is over
    SPOOL/refused/CLAIM/     the same, with code and sentence in state.json

A document is on the disk before the state that needs it; every write is an atomic rename after fsync. A unit becomes
pending by one rename, when delta and signed claim are complete. All methods block and belong in one thread at a time.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.canonical import canonical_json, parse_json
from protocol.documents import Claim, Digest, Lease, LeaseId, Verdict, parse_payload
from protocol.envelope import parse_envelope
from protocol.errors import DiskFull, LocalProblem, PayloadInvalid, Refusal
from protocol.layout import ROLE_DELTA
from protocol.limits import APPEAL_MS, GIB
from worker.durable import disk_named, move_durably, sync_directory, write_durably
from worker.lifecycle import (
    SPARES_DELTA,
    Event,
    Instruction,
    SpooledUnit,
    SpoolState,
    advance,
    instructions_of,
)

FORMAT: Final = 1
STATE: Final = "state.json"
LEASE: Final = "lease.json"
CLAIM: Final = "claim.json"
CLAIM_RECEIPT: Final = "claim-receipt.json"
BYTES_RECEIPT: Final = "bytes-receipt.json"
VERDICT: Final = "verdict.json"
APPEALED: Final = "appealed.json"
"""Beside a rejecting verdict: that its owner appealed."""
SPARE_DELTAS_KEPT: Final = 4
"""Deltas that always stay on the disk for looking into, beside those that are the only copy."""
SPARE_BYTES: Final = 2 * GIB
"""What more of them may take; the oldest go first."""
_AREAS: Final = ("incoming", "pending", "settled", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolEntry:
    """A finished unit, its directory, and its claim as it was signed."""

    unit: SpooledUnit
    directory: Path
    claim: Claim
    claim_envelope: bytes

    @property
    def state(self) -> SpoolState:
        """How far the unit has come."""
        return self.unit.state

    def artifact_path(self, role: str) -> Path:
        """Return the file of one of the claim's artifacts."""
        return self.directory / f"{role}.safetensors.zst"

    def document(self, name: str) -> bytes | None:
        """Return a stored document, or None if it has not come yet."""
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def lease(self) -> Lease | None:
        """Return the lease, which says which unit of which round this is; None if it is damaged or gone."""
        try:
            raw = self.document(LEASE)
            return None if raw is None else parse_payload(Lease, parse_envelope(raw).payload)
        except (OSError, Refusal):
            return None


class Spool:
    """The finished units of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with disk_named(root):
            for area in _AREAS:
                (root / area).mkdir(parents=True, exist_ok=True, mode=0o700)
            for leftover in (root / "incoming").iterdir():
                shutil.rmtree(leftover)
            sync_directory(root)

    def pending(self) -> tuple[SpoolEntry, ...]:
        """Return the units that are not yet settled or refused, oldest first; finish what a crash interrupted.

        Raises:
            LocalProblem: an entry is damaged. Nothing is deleted: a person may still save it.
        """
        entries = []
        for directory in sorted((self.root / "pending").iterdir(), key=lambda path: path.stat().st_mtime_ns):
            entry = self._load(directory)
            self._carry_out(entry, instructions_of(entry.state))
            if (self.root / "pending" / entry.unit.claim).exists():
                entries.append(entry)
        return tuple(entries)

    def refused_leases(self) -> frozenset[LeaseId]:
        """Return the leases whose claims were refused for good."""
        return frozenset(self._load(directory).unit.lease for directory in (self.root / "refused").iterdir())

    def add(
        self,
        lease: LeaseId,
        lease_envelope: bytes,
        write_delta: Callable[[Path], None],
        sign_claim: Callable[[Path], tuple[Digest, bytes]],
    ) -> SpoolEntry:
        """Take in a finished unit; when this returns it survives anything but the loss of the disk.

        Args:
            lease: the lease that the unit was trained under.
            lease_envelope: the lease as it was signed.
            write_delta: writes and fsyncs the delta at a path.
            sign_claim: looks at the written delta; returns the claim's digest and signed envelope.

        Raises:
            DiskFull: nothing is left behind, though every spare delta was removed; the same call can be made again.
        """
        while True:
            try:
                return self._add(lease, lease_envelope, write_delta, sign_claim)
            except DiskFull:
                if not self.free_one():
                    raise

    def _add(
        self,
        lease: LeaseId,
        lease_envelope: bytes,
        write_delta: Callable[[Path], None],
        sign_claim: Callable[[Path], tuple[Digest, bytes]],
    ) -> SpoolEntry:
        draft = self.root / "incoming" / lease
        try:
            with disk_named(draft):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(mode=0o700)
                delta = draft / f"{ROLE_DELTA}.safetensors.zst"
                write_delta(delta)
                claim, claim_envelope = sign_claim(delta)
            unit = SpooledUnit(claim=claim, lease=lease, state=SpoolState.TRAINED)
            write_durably(draft / LEASE, lease_envelope)
            write_durably(draft / CLAIM, claim_envelope)
            write_durably(draft / STATE, _state_bytes(unit))
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        target = self.root / "pending" / claim
        move_durably(draft, target)
        return self._load(target)

    def record(self, entry: SpoolEntry, event: Event, *documents: tuple[str, bytes]) -> SpoolEntry:
        """Store the documents that come with an event, then the new state, then do what it asks for.

        Raises:
            DiskFull: the entry is as it was before; the step can be repeated, since the coordinator repeats its answer.
            IllegalTransition: the event does not fit the state.
        """
        moved, instructions = advance(entry.unit, event)
        self._keep_earlier_verdict(entry, documents)
        for name, content in documents:
            write_durably(entry.directory / name, content)
        write_durably(entry.directory / STATE, _state_bytes(moved))
        stored = SpoolEntry(
            unit=moved, directory=entry.directory, claim=entry.claim, claim_envelope=entry.claim_envelope
        )
        return self._carry_out(stored, instructions)

    def _keep_earlier_verdict(self, entry: SpoolEntry, documents: tuple[tuple[str, bytes], ...]) -> None:
        """Keep a verdict that another one replaces, under a name that says its code: both are signed."""
        earlier = entry.document(VERDICT)
        if earlier is not None and dict(documents).get(VERDICT, earlier) != earlier:
            code = parse_payload(Verdict, parse_envelope(earlier).payload).code  # verified before it was stored
            write_durably(entry.directory / f"superseded-{code}.json", earlier)

    def _carry_out(self, entry: SpoolEntry, instructions: tuple[Instruction, ...]) -> SpoolEntry:
        directory = entry.directory
        for instruction in instructions:
            match instruction:
                case Instruction.DROP_DELTA:
                    for artifact in entry.claim.artifacts:
                        entry.artifact_path(artifact.role).unlink(missing_ok=True)
                case Instruction.ARCHIVE:
                    directory = self._move(directory, "settled")
                case Instruction.SET_ASIDE:
                    directory = self._move(directory, "refused")
                case Instruction.THIN_OUT:
                    self._thin_out()
        return SpoolEntry(unit=entry.unit, directory=directory, claim=entry.claim, claim_envelope=entry.claim_envelope)

    def _move(self, directory: Path, area: str) -> Path:
        target = self.root / area / directory.name
        if directory != target:
            move_durably(directory, target)
        return target

    # --- deltas that are kept for their owner's sake -------------------------------------------------------------

    def settled(self, most: int) -> tuple[SpoolEntry, ...]:
        """Return the newest units that have a verdict, damaged ones left out: a later verdict may take its place."""
        directories = sorted((self.root / "settled").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        found = []
        for directory in directories[-most:]:
            with suppress(LocalProblem):
                found.append(self._load(directory))
        return tuple(found)

    def forget_old(self, now_ms: int) -> None:
        """Remove the deltas of rejected units whose time for an appeal is over."""
        for path in self._spare_deltas():
            verdict = path.with_name(VERDICT)
            if verdict.exists() and now_ms - verdict.stat().st_mtime_ns // 1_000_000 > APPEAL_MS:
                path.unlink()

    def free_one(self) -> bool:
        """Remove the oldest delta that is not the only copy, to make room; return whether there was one."""
        for path in self._spare_deltas()[:1]:
            path.unlink()
            return True
        return False

    def _thin_out(self) -> None:
        kept = 0
        for number, path in enumerate(reversed(self._spare_deltas())):
            kept += path.stat().st_size
            if number >= SPARE_DELTAS_KEPT and kept > SPARE_BYTES:
                path.unlink()

    def _spare_deltas(self) -> list[Path]:
        """Return the deltas that are not the only copy, oldest first; those of rejected units go last."""
        found = []
        for path in self.root.glob("*/*/*.safetensors.zst"):
            area = path.parent.parent.name
            if area == "settled" or area == "refused" or (area == "pending" and self._is_spare(path.parent)):
                found.append(path)
        return sorted(found, key=lambda path: (path.parent.parent.name == "settled", path.stat().st_mtime_ns))

    def _is_spare(self, directory: Path) -> bool:
        try:
            return _read_state((directory / STATE).read_bytes()).state in SPARES_DELTA
        except (OSError, KeyError, TypeError, ValueError, Refusal):
            return False  # damaged: a person may still save it

    def _load(self, directory: Path) -> SpoolEntry:
        try:
            unit = _read_state((directory / STATE).read_bytes())
            claim_envelope = (directory / CLAIM).read_bytes()
            # Our own signature was checked by making it; what counts is that the coordinator checks it again.
            claim = parse_payload(Claim, parse_envelope(claim_envelope).payload)
        except (OSError, KeyError, TypeError, ValueError, Refusal) as error:
            raise LocalProblem(
                f"The finished unit in {directory} is damaged ({error}); move that directory away and start again."
            ) from None
        return SpoolEntry(unit=unit, directory=directory, claim=claim, claim_envelope=claim_envelope)


def _state_bytes(unit: SpooledUnit) -> bytes:
    return canonical_json(
        {
            "format": FORMAT,
            "claim": unit.claim,
            "lease": unit.lease,
            "state": unit.state.value,
            "code": unit.code,
            "sentence": unit.sentence,
        }
    )


def _read_state(raw: bytes) -> SpooledUnit:
    value = parse_json(raw)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise PayloadInvalid(f"{STATE} is not of format {FORMAT}: {json.dumps(value)[:80]}")
    return SpooledUnit(
        claim=Digest(str(value["claim"])),
        lease=LeaseId(str(value["lease"])),
        state=SpoolState(value["state"]),
        code=str(value["code"]),
        sentence=str(value["sentence"]),
    )
