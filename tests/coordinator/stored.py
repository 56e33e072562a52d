"""A small run in a store: what the tests of the store, and of what uses it, begin from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.audits import (
    Audit,
    AuditReason,
)
from coordinator.rounds import Closed, MergeStarted, Published, Round
from coordinator.rounds import advance as advance_round
from coordinator.store import Store
from coordinator.units import (
    Attempt,
    Judged,
    Unit,
    UnitAccepted,
    UnitAssigned,
    UnitState,
    advance,
)
from protocol.keys import KeyId
from tests.coordinator import examples

DATABASE = "state.sqlite"
NOBODY = KeyId("0" * 64)
AUDITOR, OTHER_AUDITOR = KeyId(examples.digest("auditor/1")), KeyId(examples.digest("auditor/0"))


def fill(store: Store, units: int = 4) -> None:
    """Store round 1 with its units, two owners, and two devices of the first."""
    with store.transaction():
        store.add_round(examples.first_round())
        store.add_units([examples.unit(index) for index in range(units)])
        store.put_owner(examples.owner("ada"))
        store.put_owner(examples.owner("bob"))
        store.put_device(examples.device("ada-1", "ada"))
        store.put_device(examples.device("ada-2", "ada"))
        store.put_device(examples.device("bob-1", "bob"))


def save(store: Store, before: Any, after: Any) -> Any:
    """Save a unit, attempt, audit or round in a transaction of its own; return it."""
    with store.transaction():
        match before:
            case Unit():
                store.save_unit(before, after)
            case Attempt():
                store.save_attempt(before, after)
            case Audit():
                store.save_audit(before, after)
            case Round():
                store.save_round(before, after)
    return after


def lease(store: Store, name: str, index: int, by: str = "ada-1", *, deadline_ms: int = 60_000) -> Attempt:
    """Lease a unit of round 1 to a device."""
    device = examples.device(by, by.split("-", maxsplit=1)[0])
    attempt = examples.leased(name, examples.unit(index), device, deadline_ms=deadline_ms)
    unit = store.unit(attempt.unit)
    assert unit is not None
    with store.transaction():
        if unit.state is UnitState.OPEN:
            store.save_unit(unit, advance(unit, UnitAssigned())[0])
        store.add_attempt(attempt)
    return attempt


def deliver(
    store: Store, name: str, index: int, by: str = "ada-1", *, reason: AuditReason | None = None
) -> tuple[Unit, Attempt]:
    """Lease a unit and receive its bytes; with a reason, they wait for an audit."""
    start = lease(store, name, index, by)
    received = save(store, start, examples.received(start, reason))
    unit = store.unit(start.unit)
    assert unit is not None
    return unit, received


def choose(store: Store, name: str, index: int, by: str = "ada-1") -> tuple[Unit, Attempt]:
    """Lease a unit, receive its bytes and settle it with them, as a round does at its close."""
    unit, received = deliver(store, name, index, by)
    return save(store, unit, advance(unit, UnitAccepted(lease=received.lease))[0]), received


def add_audit(store: Store, audit: Audit) -> Audit:
    """Store an audit in a transaction of its own; return it with its number."""
    with store.transaction():
        return store.add_audit(audit)


def judge(store: Store, attempt: Attempt) -> Attempt:
    """Give an attempt a verdict."""
    verdict = None if attempt.claim_sha256 is None else b"verdict"
    return save(store, attempt, advance(attempt, Judged(verdict_envelope=verdict))[0])  # type: ignore[no-any-return]


def publish(store: Store) -> None:
    """Take round 1, with nothing in its merge, to its end."""
    collecting = store.round(1)
    assert collecting is not None
    event = Closed(now_ms=9_000, merge=(), unmerge=(), weigh_seed=None)
    closed = save(store, collecting, advance_round(collecting, event)[0])
    merging = save(store, closed, advance_round(closed, MergeStarted())[0])
    save(store, merging, advance_round(merging, Published(manifest_sha256=examples.digest("manifest")))[0])


class OpensStore:
    """The fixtures of a suite for stores. A subclass says how to open one in a directory; opening again must find what
    was there.
    """

    def open_store(self, directory: Path) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = self.open_store(tmp_path)
        yield store
        store.close()

    @pytest.fixture
    def filled(self, store: Store) -> Store:
        fill(store)
        return store
