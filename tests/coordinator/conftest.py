from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.sqlite_store import SqliteStore
from protocol.documents import RunConfig
from tests.coordinator import examples
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import config
from tests.coordinator.stored import AUDITOR, DATABASE, add_audit, choose, fill, judge, lease, save


@pytest.fixture
def opening(tmp_path: Path) -> Iterator[Opening]:
    """Opens an office for a run config, or for `config(...)` of what it is given."""
    offices: list[Office] = []

    def do(run: RunConfig | None = None, *, retain_rounds: int = 0, **rules: int) -> Office:
        offices.append(Office(tmp_path, run or config(**rules), retain_rounds=retain_rounds))
        return offices[-1]

    yield do
    for office in offices:
        office.store.close()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database with one merged unit, one claimed and one leased attempt, a log of two, evidence, and an audit."""
    store = SqliteStore.open(tmp_path / DATABASE)
    fill(store)
    merged = judge(store, choose(store, "merged", 0)[1])
    audit = add_audit(store, examples.audit(merged))
    claimed = lease(store, "claimed", 1, "ada-1")
    save(store, claimed, examples.claimed(claimed))
    lease(store, "leased", 2, "ada-2")
    with store.transaction():
        store.append_log("claim", b"{}")
        store.append_log("verdict", b"{}")
        store.add_evidence(claimed.lease, b"other")
        store.add_opinion(audit.audit, audit.claim, AUDITOR, "confirmed", b"opinion")
    store.close()
    return tmp_path / DATABASE
