"""Volunteers and auditors: their keys, their sessions, and how they behave.

A `Behaviour` answers the few questions in which a hostile volunteer can differ from an honest one. It may know more
than a real attacker would (which leases are replicas, and of whose claims), so that what stops it here stops it there.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.simulation.physics import HONEST, Task
from coordinator.sessions import Session
from protocol.documents import DeviceDelegation, RunConfig, RunId, SessionProof, sign
from protocol.keys import KeyId, PrivateKey

TRAINER: Final = "simulation"
DEVICE_CLASS: Final = "cpu-simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A leased unit as its holder sees it.

    replica_of: name of the volunteer whose claim it repeats, if the lease is a replica; real volunteers are not told.
    delivered: claims that the holder made before. established: whether the holder's owner is by now.
    merged: whether the unit is in a published checkpoint by now, so that anybody can copy its delta.
    """

    task: Task
    lease: str
    lease_sha256: str
    replica_of: str | None = None
    delivered: int = 0
    established: bool = False
    merged: bool = False


class Behaviour:
    """An honest volunteer; attacks override what they do otherwise."""

    name = HONEST
    hostile = False
    holds = False
    """Whether it keeps its units until their round is over, and never claims one."""
    pace = 1.0
    """How long its training takes, as a share of an honest unit's time."""
    patience = 0
    """How long it waits after its training before it claims, in milliseconds."""

    def takes(self, _taken: Taken, /) -> bool:
        """Return whether to train the unit; else it is handed back."""
        return True

    def delivers(self, _taken: Taken, /) -> str | None:
        """Return the kind of delta to claim; None to claim nothing."""
        return HONEST

    def works(self, _taken: Taken, /) -> bool:
        """Return whether it trains for that."""
        return True

    def claims_again(self, _taken: Taken, /) -> str | None:
        """Return the kind of a second delta to claim under the same lease."""
        return None

    def uploads(self, _taken: Taken, /) -> bool:
        """Return whether to upload what was claimed."""
        return True

    def returns(self) -> "Behaviour | None":
        """Return the behaviour of a new identity after a ban; None to give up."""
        return None


@dataclass(slots=True, kw_only=True)
class Player:
    """A device in the simulation.

    record: audits passed before the run began; with a record the owner is established from the start.
    team: colluders have one name; they forge alike. first_asks: who asks earlier when a round opens (lower is earlier).
    """

    name: str
    owner: str
    behaviour: Behaviour = field(default_factory=Behaviour)
    record: int = 0
    team: str = ""
    first_asks: int = 0
    speed: float = 1.0
    device_class: str = DEVICE_CLASS


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A device's key and session."""

    key: PrivateKey
    session: Session


def identity(owner: str, device: str, *, seed: bytes, config: RunConfig, run: RunId, device_class: str) -> Identity:
    """Return the device `device` of the owner `owner`; both keys follow from the seed and the names."""
    owner_key, device_key = _key(seed, f"owner/{owner}"), _key(seed, f"device/{device}")
    delegation = DeviceDelegation(owner_public_key=owner_key.public.hex, device_public_key=device_key.public.hex)
    session = Session(
        device=device_key.public.key_id,
        device_key=device_key.public,
        owner=owner_key.public.key_id,
        owner_key=owner_key.public,
        proof=_proof(config, run, device_class),
        delegation_envelope=sign(delegation, owner_key),
        expires_ms=2**53 - 1,
    )
    return Identity(key=device_key, session=session)


def referee(name: str, *, seed: bytes, config: RunConfig, run: RunId) -> Identity:
    """Return an auditor, who is its own device and its own owner."""
    key = _key(seed, f"auditor/{name}")
    session = Session(
        device=key.public.key_id,
        device_key=key.public,
        owner=key.public.key_id,
        owner_key=key.public,
        proof=_proof(config, run, DEVICE_CLASS),
        delegation_envelope=b"delegated by the root",
        expires_ms=2**53 - 1,
        auditor=True,
    )
    return Identity(key=key, session=session)


def owner_id(owner: str, seed: bytes) -> KeyId:
    """Return the key id of an owner of that name."""
    return _key(seed, f"owner/{owner}").public.key_id


def volunteers(count: int, *, record: int = 0, prefix: str = "honest", speeds: Sequence[float] = ()) -> list[Player]:
    """Return honest volunteers, each an owner with one device."""
    return [
        Player(
            name=f"{prefix}-{number}",
            owner=f"{prefix}-{number}",
            record=record,
            speed=speeds[number % len(speeds)] if speeds else 1.0,
        )
        for number in range(count)
    ]


def _proof(config: RunConfig, run: RunId, device_class: str) -> SessionProof:
    return SessionProof(
        run=run,
        certificate_sha256="00" * 32,
        nonce="00" * 32,
        numerics=config.numerics,
        trainer_version=TRAINER,
        device_class=device_class,
        terms_sha256=config.terms_sha256,
    )


def _key(seed: bytes, name: str) -> PrivateKey:
    return PrivateKey.from_seed(hashlib.sha256(b"benchmarks/simulation\0" + seed + name.encode()).digest())
