"""A virtual worker's finished units on their way, as `worker.delivery` brings them: one upload at a time, resumed."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from benchmarks.simulation.ledger import Ledger
from benchmarks.simulation.machines import Load, Machine
from benchmarks.simulation.office import Later, Office
from benchmarks.simulation.people import TRAINER, Identity
from benchmarks.simulation.physics import HONEST, Physics, Task
from coordinator import claims
from coordinator.desk import Desk
from protocol.assignment import unit_samples
from protocol.calls import Instruction
from protocol.canonical import sha256_hex
from protocol.documents import (
    Artifact,
    Claim,
    ClaimReceipt,
    Digest,
    Lease,
    LeaseId,
    UnitId,
    digest_of,
    parse_payload,
    sign,
)
from protocol.envelope import parse_envelope
from protocol.errors import Refusal
from protocol.limits import SECOND_MS

T = TypeVar("T")

SKETCH_MS: Final = 10 * SECOND_MS
"""From the claim to the first byte: the delta is decoded and sketched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What all machines of a fleet have in common. `ahead`: whether they fetch checkpoints ahead."""

    office: Office
    physics: Physics
    load: Load
    ledger: Ledger
    chance: random.Random
    later: Later
    ahead: bool = True

    def now_ms(self) -> int:
        """Return the time."""
        return self.office.clock.now_ms()

    def decide(self, work: Callable[[Desk], T]) -> T:
        """See `Office.decide`."""
        return self.office.decide(work)


@dataclass(slots=True, kw_only=True)
class _Parcel:
    """A finished unit. `left_ms` is what its upload still takes; `kept`: a replica whose bytes may never be wanted."""

    lease: LeaseId
    task: Task
    digest: Digest
    envelope: bytes
    artifact: Artifact
    left_ms: int
    kept: bool = False

    @property
    def claim(self) -> bytes:
        """What the claim is called on the wire."""
        return bytes.fromhex(self.digest)


@dataclass(slots=True, kw_only=True)
class Post:
    """The finished units of one machine. `sent` is called when an upload has ended."""

    world: World
    me: Identity
    machine: Machine
    sent: Callable[[], None]
    _parcels: list[_Parcel] = field(default_factory=list)
    _sending: _Parcel | None = None
    _since_ms: int = 0
    _line: int = 0
    _open: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be sent."""
        return all(parcel.kept for parcel in self._parcels)

    def open(self) -> None:
        """Go on with what was left."""
        self._open = True
        self._send()

    def close(self) -> None:
        """Break off an upload; it goes on from there when the post is open again."""
        if self._sending is not None:
            self._sending.left_ms = max(0, self._sending.left_ms - (self.world.now_ms() - self._since_ms))
        self._open, self._sending = False, None
        self._line += 1

    def hand_in(self, lease: Lease) -> None:
        """Claim a finished unit, send its sketch, and begin to upload it; raise what the coordinator refuses."""
        task = Task(unit=UnitId(lease.unit), round=lease.round, index=lease.index)
        artifact = self.world.physics.deliver(task, HONEST, "")
        digest, envelope = self._signed(lease, artifact)
        answer = self.world.decide(partial(claims.submit_claim, session=self.me.session, raw=envelope))
        receipt = parse_payload(ClaimReceipt, parse_envelope(answer.receipt).payload)
        sketch = self.world.physics.sketch(task, artifact, Digest(receipt.sketch_seed))
        parcel = _Parcel(
            lease=LeaseId(lease.lease),
            task=task,
            digest=digest,
            envelope=envelope,
            artifact=artifact,
            left_ms=SKETCH_MS + self.machine.up_ms(artifact.size),
        )
        wanted = self.world.decide(
            partial(claims.submit_sketch, session=self.me.session, claim=parcel.claim, sketch=sketch)
        )
        self._parcels.append(parcel)
        self._follow(parcel, wanted)

    def _signed(self, lease: Lease, artifact: Artifact) -> tuple[Digest, bytes]:
        claim = Claim(
            run=lease.run,
            lease=lease.lease,
            lease_sha256=digest_of(lease),
            unit=lease.unit,
            device=self.me.session.device,
            artifacts=(artifact,),
            trail_root=sha256_hex(lease.unit.encode()),
            salt=self.world.chance.randbytes(32).hex(),
            samples=unit_samples(self.world.office.config, UnitId(lease.unit)),
            loss=1.0,
            trainer_version=TRAINER,
            device_class=self.me.session.proof.device_class,
        )
        return digest_of(claim), sign(claim, self.me.key)

    def _follow(self, parcel: _Parcel, wanted: Instruction) -> None:
        parcel.kept = wanted is Instruction.KEEP
        if wanted is Instruction.DONE:
            self._parcels.remove(parcel)
        self._send()

    def ask_about_kept(self) -> None:
        """Ask whether the bytes of replicas are wanted now, as a worker does now and then."""
        if not self._open:
            return
        for parcel in [parcel for parcel in self._parcels if parcel.kept]:
            answer = self.world.decide(partial(claims.submit_claim, session=self.me.session, raw=parcel.envelope))
            self._follow(parcel, answer.next)

    def _send(self) -> None:
        """Begin with the first upload, if there is one and none is under way."""
        waiting = [parcel for parcel in self._parcels if not parcel.kept]
        if self._open and waiting and self._sending is None:
            self._sending, self._since_ms, line = waiting[0], self.world.now_ms(), self._line

            def arrive() -> None:
                if line == self._line:
                    self._arrived(waiting[0])

            self.world.later(waiting[0].left_ms, arrive)

    def _arrived(self, parcel: _Parcel) -> None:
        self._sending = None
        self._parcels.remove(parcel)
        try:
            self._deliver(parcel)
        except Refusal as refusal:
            self.world.ledger.refused[parcel.lease] = refusal.code
        self._send()
        self.sent()

    def _deliver(self, parcel: _Parcel) -> None:
        session = self.me.session
        expected = self.world.decide(
            partial(claims.expected_artifact, session=session, claim=parcel.claim, role=parcel.artifact.role)
        )
        if not isinstance(expected, bytes):
            self.world.physics.admit(parcel.task, expected)
            self.world.decide(partial(claims.record_received, lease=expected.attempt.lease))
