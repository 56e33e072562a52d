"""Who and what the tests of the coordinator's decisions are about: volunteers, their work, and the run's rules."""

import hashlib
import struct
from dataclasses import dataclass, replace
from typing import Any, Final

from coordinator.sessions import Session
from protocol.documents import (
    Claim,
    Lease,
    RunConfig,
    digest_of,
)
from protocol.keys import PrivateKey
from protocol.limits import SKETCH_FLOATS
from tests.protocol.examples import run_config

ONE: Final = 2**24
DRAWN: Final = ONE
"""A floor of one: every claim is drawn."""
ESTABLISHED: Final = ONE
"""Audits passed in a row, so many that chance audits nothing where the floor is 0."""
START_MS: Final = 1_000_000
LEASE_MS: Final = 60_000
TRAINING_MS: Final = 20_000
"""What a unit takes here."""
DELTA_BYTES: Final = 123_456
HONEST: Final = "honest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volunteer:
    """A device of an owner, with its key and its session."""

    name: str
    key: PrivateKey
    session: Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A lease, and what its device claims as the result."""

    by: Volunteer
    lease: Lease
    result: str
    claim: Claim
    envelope: bytes

    @property
    def digest(self) -> bytes:
        """What the claim is called on the wire."""
        return bytes.fromhex(digest_of(self.claim))

    @property
    def sketch(self) -> bytes:
        """A sketch that depends on the result only, as if all sketches had one seed."""
        value = int.from_bytes(hashlib.sha256(self.result.encode()).digest()[:2], "big") / 256
        return struct.pack("<f", value) * SKETCH_FLOATS


def config(
    *, floor: int = 0, probation: int = 3, referee_share: int = 0, units: int = 4, planned: int = 6, **rounds: int
) -> RunConfig:
    """A run of few units in which chance decides nothing: `floor` and `referee_share` are 0 or one (2^24)."""
    plain = run_config(units=units, planned=planned)
    usual: dict[str, Any] = {"min_units": 1, "staleness_bound": 1, "lease_ms": LEASE_MS, "upload_ms": LEASE_MS}
    return replace(
        plain,
        verification=replace(plain.verification, floor=floor, probation=probation, referee_share=referee_share),
        rounds=replace(plain.rounds, **usual | rounds),
    )
