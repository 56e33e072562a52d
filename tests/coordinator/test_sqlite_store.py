import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.sql_files import MIGRATIONS, parse_queries, read_sql
from coordinator.sqlite_store import SqliteStore
from coordinator.store import Store
from coordinator.units import Judged, UnitAccepted, advance
from protocol.errors import DatabaseTooNew, DirectoryInUse, DirectoryNotARun
from protocol.log import EMPTY_LOG_HEAD, next_head
from tests.coordinator import examples
from tests.coordinator.store_conformance import StoreConformance, deliver, fill, lease, save

ROOT = Path(__file__).parents[2]
DATABASE = "state.sqlite"


class TestSqliteStore(StoreConformance):
    def open_store(self, directory: Path) -> Store:
        return SqliteStore.open(directory / DATABASE)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database with one merged unit, one claimed and one leased attempt, a log of two, and evidence."""
    store = SqliteStore.open(tmp_path / DATABASE)
    fill(store)
    _, merged = deliver(store, "merged", 0)
    save(store, merged, advance(merged, Judged(verdict_envelope=b"verdict"))[0])
    claimed = lease(store, "claimed", 1, "ada-1")
    save(store, claimed, examples.claimed(claimed))
    lease(store, "leased", 2, "ada-2")
    with store.transaction():
        store.append_log("claim", b"{}")
        store.append_log("verdict", b"{}")
        store.add_evidence(claimed.lease, b"other")
    store.close()
    return tmp_path / DATABASE


@pytest.fixture
def raw(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that a careless program could have: our schema, none of our code."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys=ON")
        yield connection


MERGED, CLAIMED, LEASED = (f"lease = '{examples.lease_id(name)}'" for name in ("merged", "claimed", "leased"))
IMPOSSIBLE = {
    "a leased attempt with a claim": f"UPDATE attempts SET state = 'leased' WHERE {CLAIMED}",
    "a claim without a receipt": f"UPDATE attempts SET claim_receipt = NULL WHERE {CLAIMED}",
    "a claim without artifacts": f"UPDATE attempts SET artifacts = '[]' WHERE {CLAIMED}",
    "another claim under the same lease": f"UPDATE attempts SET claim_sha256 = '{'0' * 64}' WHERE {CLAIMED}",
    "a sketch before a claim": f"UPDATE attempts SET sketch = zeroblob(4096) WHERE {LEASED}",
    "a short sketch": f"UPDATE attempts SET state = 'sketched', sketch = zeroblob(12) WHERE {CLAIMED}",
    "received without a receipt": f"UPDATE attempts SET state = 'received' WHERE {CLAIMED}",
    "judged without a verdict": f"UPDATE attempts SET state = 'judged' WHERE {CLAIMED}",
    "a verdict on an open claim": f"UPDATE attempts SET verdict_envelope = x'00' WHERE {CLAIMED}",
    "a judged attempt that goes on": f"UPDATE attempts SET state = 'received' WHERE {MERGED}",
    "an unknown state": f"UPDATE attempts SET state = 'paused' WHERE {LEASED}",
    "text for a number": f"UPDATE attempts SET deadline_ms = 'soon' WHERE {LEASED}",
    "an attempt in another round than its unit": f"UPDATE attempts SET round = 2 WHERE {LEASED}",
    "an attempt that is forgotten though merged": f"DELETE FROM attempts WHERE {MERGED}",
    "two leases of one device": (
        "INSERT INTO attempts (lease, unit, round, device, owner, state, deadline_ms, lease_envelope, lease_sha256, "
        f"artifacts) SELECT '{'0' * 32}', '{examples.unit(3).unit}', round, device, owner, state, deadline_ms, "
        f"lease_envelope, lease_sha256, artifacts FROM attempts WHERE {LEASED}"
    ),
    "two leases of one unit": (
        "INSERT INTO attempts (lease, unit, round, device, owner, state, deadline_ms, lease_envelope, lease_sha256, "
        f"artifacts) SELECT '{'0' * 32}', unit, round, '{examples.device('bob-1', 'bob').device}', owner, state, "
        f"deadline_ms, lease_envelope, lease_sha256, artifacts FROM attempts WHERE {LEASED}"
    ),
    "a malformed lease id": f"UPDATE attempts SET lease = 'A{'0' * 31}' WHERE {LEASED}",
    "settled without an outcome": f"UPDATE units SET state = 'settled' WHERE unit = '{examples.unit(3).unit}'",
    "an outcome while open": f"UPDATE units SET outcome = 'rejected' WHERE unit = '{examples.unit(3).unit}'",
    "accepted without a choice": (
        f"UPDATE units SET state = 'settled', outcome = 'accepted' WHERE unit = '{examples.unit(3).unit}'"
    ),
    "a choice of another unit's attempt": (
        f"UPDATE units SET state = 'settled', outcome = 'accepted', chosen = '{examples.lease_id('merged')}' "
        f"WHERE unit = '{examples.unit(3).unit}'"
    ),
    "a choice of an attempt without bytes": (
        f"UPDATE units SET state = 'settled', outcome = 'accepted', chosen = '{examples.lease_id('claimed')}' "
        f"WHERE unit = '{examples.unit(1).unit}'"
    ),
    "merged without being accepted": f"UPDATE units SET merged_in = 1 WHERE unit = '{examples.unit(3).unit}'",
    "merged into the past": f"UPDATE units SET merged_in = 0 WHERE unit = '{examples.unit(0).unit}'",
    "a settled unit that opens again": (
        f"UPDATE units SET state = 'open', outcome = NULL, chosen = NULL WHERE unit = '{examples.unit(0).unit}'"
    ),
    "two units with one index": f"UPDATE units SET \"index\" = 2 WHERE unit = '{examples.unit(3).unit}'",
    "a unit of a round that is not there": f"UPDATE units SET round = 9 WHERE unit = '{examples.unit(3).unit}'",
    "two rounds at once": "INSERT INTO rounds (round, state, opened_ms, merge) VALUES (2, 'collecting', 5, '[]')",
    "a merge set before the close": "UPDATE rounds SET merge = '[{}]'",
    "published without a manifest": "UPDATE rounds SET state = 'published', closed_ms = 5000",
    "closed before it was opened": "UPDATE rounds SET state = 'closed', closed_ms = 1",
    "a device without an owner": f"UPDATE devices SET owner = '{'0' * 64}'",
    "two owners with one pseudonym": f"UPDATE owners SET member = '{examples.owner('ada').member}'",
    "a log entry that is rewritten": "UPDATE log SET body = x'00' WHERE position = 1",
    "a log that is cut": "DELETE FROM log WHERE position = 2",
    "a gap in the log": "INSERT INTO log VALUES (4, 'claim', x'00', zeroblob(32))",
    "evidence without a lease": f"INSERT INTO evidence VALUES ('{'0' * 32}', 1, x'00')",
}


@pytest.mark.parametrize("statement", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_the_schema_refuses(raw: sqlite3.Connection, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        assert raw.execute(statement).rowcount > 0


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("UPDATE owners SET state = 'banned'", "UPDATE owners SET state = 'established'"),
        (
            "UPDATE rounds SET state = 'closed', closed_ms = 5000, merge = '[1]'",
            "UPDATE rounds SET state = 'merging', merge = '[2]'",
        ),
        (
            "UPDATE rounds SET state = 'published', closed_ms = 5000, manifest_sha256 = 'a'",
            "UPDATE rounds SET manifest_sha256 = 'b'",
        ),
        ("UPDATE units SET merged_in = 1 WHERE chosen IS NOT NULL", "UPDATE units SET merged_in = 2"),
    ],
)
def test_what_is_final_stays(raw: sqlite3.Connection, first: str, then: str) -> None:
    assert raw.execute(first).rowcount > 0
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(then)


def test_a_chosen_attempt_may_be_saved_after_the_unit_that_chooses_it(tmp_path: Path) -> None:
    with closing(SqliteStore.open(tmp_path / DATABASE)) as store:
        fill(store)
        start = lease(store, "a", 0)
        unit = store.unit(start.unit)
        assert unit is not None
        accepted, _ = advance(unit, UnitAccepted(lease=start.lease))
        with store.transaction():
            store.save_unit(unit, accepted)
            store.save_attempt(start, examples.received(start))
        assert store.mergeable() == ((accepted, examples.received(start)),)


def test_a_constraint_that_speaks_at_the_end_undoes_the_whole_transaction(tmp_path: Path) -> None:
    with closing(SqliteStore.open(tmp_path / DATABASE)) as store:
        fill(store)
        start = lease(store, "a", 0)
        unit = store.unit(start.unit)
        assert unit is not None
        accepted, _ = advance(unit, UnitAccepted(lease=start.lease))

        def choose_what_has_not_arrived() -> None:
            with store.transaction():
                store.put_meta("key", "value")
                store.save_unit(unit, accepted)

        with pytest.raises(sqlite3.IntegrityError):
            choose_what_has_not_arrived()
        assert store.meta("key") is None
        assert store.unit(unit.unit) == unit


# --- the file ------------------------------------------------------------------------------------------------


def test_an_empty_file_becomes_a_database_of_the_newest_version(tmp_path: Path) -> None:
    (tmp_path / DATABASE).touch()
    SqliteStore.open(tmp_path / DATABASE).close()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        tables = {row[0] for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == set(re.findall(r"CREATE TABLE (\w+)", read_sql("schema.sql")))


def test_opening_again_migrates_nothing_and_keeps_everything(database: Path) -> None:
    with closing(sqlite3.connect(database)) as raw:
        before = list(raw.iterdump())
    SqliteStore.open(database).close()
    with closing(sqlite3.connect(database)) as raw:
        assert list(raw.iterdump()) == before


def test_the_database_is_for_its_owner_only(database: Path) -> None:
    assert database.stat().st_mode & 0o777 == 0o600


def test_a_database_of_a_newer_version_is_refused_and_left_alone(database: Path) -> None:
    with closing(sqlite3.connect(database)) as raw:
        raw.execute("PRAGMA user_version=99")
    with pytest.raises(DatabaseTooNew, match="has version 99; this Commonweight knows versions up to 1"):
        SqliteStore.open(database)
    with closing(sqlite3.connect(database)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (99,)


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / DATABASE)) as raw:
        raw.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(DirectoryNotARun, match="another program"):
        SqliteStore.open(tmp_path / DATABASE)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"not a database, but a letter to the operator" * 100)
    with pytest.raises(DirectoryNotARun, match="is not a database"):
        SqliteStore.open(tmp_path / DATABASE)


def test_a_database_that_somebody_keeps_locked_says_so(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.sqlite_file.BUSY_MS", 10)
    with closing(SqliteStore.open(database)) as store, closing(sqlite3.connect(database)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(DirectoryInUse, match="locked"), store.transaction():
            pass
        raw.rollback()
        with store.transaction():
            store.put_meta("key", "value")


def test_the_store_can_be_used_from_a_thread_that_did_not_open_it(database: Path) -> None:
    seen: list[int] = []
    with closing(SqliteStore.open(database)) as store:
        thread = threading.Thread(target=lambda: seen.append(store.device_count()))
        thread.start()
        thread.join()
    assert seen == [3]


def test_a_backup_is_one_file_and_can_be_made_in_the_middle_of_a_transaction(database: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.sqlite"
    with closing(SqliteStore.open(database)) as store, store.transaction():
        store.append_log("claim", b"{}")
        store.backup_to(target)
    with closing(sqlite3.connect(target)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert raw.execute("SELECT count(*) FROM log").fetchone() == (2,)  # what was not committed is not there
    assert [path.name for path in tmp_path.glob("copy*")] == ["copy.sqlite"]


def test_a_backup_of_nothing_is_refused(tmp_path: Path) -> None:
    with closing(SqliteStore.open(tmp_path / DATABASE)) as store:
        (tmp_path / DATABASE).unlink()
        with pytest.raises(DirectoryNotARun):
            store.backup_to(tmp_path / "copy.sqlite")
    assert not list(tmp_path.glob("copy*"))


# --- speed ---------------------------------------------------------------------------------------------------


def test_no_statement_of_every_day_scans_a_table(raw: sqlite3.Connection) -> None:
    for_screens = {"device_count", "outcome_counts", "units_by_member"}
    for name, statement in parse_queries(read_sql("queries.sql")).items():
        values = dict.fromkeys(re.findall(r":(\w+)", statement), 1)
        plan = [row[3] for row in raw.execute("EXPLAIN QUERY PLAN " + statement, values)]
        scans = [step for step in plan if step.startswith("SCAN") and "USING INDEX units_to_merge" not in step]
        if name not in for_screens | {"latest_round", "log_head"}:  # these two read one row from the end
            assert scans == [], name


# --- crashes -------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from coordinator.sqlite_store import SqliteStore
store = SqliteStore.open(Path(sys.argv[1]))
for number in range(1, 1_000_000):
    with store.transaction():
        store.append_log("claim", b'{"number":%d}' % number)
        store.put_meta("last", str(number))
    print(number, flush=True)
"""


def test_killing_the_writer_loses_nothing_that_it_had_said_and_breaks_nothing(tmp_path: Path) -> None:
    database = tmp_path / DATABASE
    for kill in range(1, 4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER.replace("range(1,", f"range({kill}_000,"), str(database)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as writer:
            assert writer.stdout is not None
            for _ in range(20 * kill):
                said = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            said = max([said, *(int(line) for line in writer.stdout if line.endswith("\n"))])

        with closing(SqliteStore.open(database)) as store:
            position, head = store.log_head()
            last = int(store.meta("last") or 0)
            assert last in (said, said + 1)  # the last commit may have had no time to be told
            chain = EMPTY_LOG_HEAD
            entries = store.log_entries(1, position)
            assert entries[-1].body == b'{"number":%d}' % last
            for entry in entries:
                chain = next_head(chain, entry.kind, entry.body)
            assert (len(entries), chain) == (position, head)
        with closing(sqlite3.connect(database)) as raw:
            assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert raw.execute("PRAGMA foreign_key_check").fetchall() == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from coordinator.sqlite_store import SqliteStore
from protocol.errors import CoordinatorDiskFull
store = SqliteStore.open(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for number in range(1_000):
    try:
        with store.transaction():
            store.append_log("claim", bytes(5_000))
            store.put_meta("last", str(number))
    except CoordinatorDiskFull:
        assert store.log_head()[0] == int(store.meta("last")) + 1 == number
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        with store.transaction():
            store.append_log("claim", b"room again")
        print("told", number)
        break
store.close()
"""


def test_a_full_disk_is_told_undoes_the_transaction_and_passes(tmp_path: Path) -> None:
    database = tmp_path / DATABASE
    told = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(database)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    word, number = told.stdout.split()
    assert word == "told"
    assert int(number) > 3
    with closing(SqliteStore.open(database)) as store:
        assert store.log_head()[0] == int(number) + 1
    with closing(sqlite3.connect(database)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
