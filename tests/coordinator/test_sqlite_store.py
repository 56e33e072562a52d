import re
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.sql_files import MIGRATIONS, read_sql
from coordinator.sqlite_store import SqliteStore
from coordinator.store import Store
from coordinator.units import UnitAccepted, advance
from protocol.errors import DatabaseTooNew, DirectoryInUse, DirectoryNotARun
from protocol.log import EMPTY_LOG_HEAD, next_head
from tests.coordinator import examples
from tests.coordinator.store_audit_conformance import AuditConformance
from tests.coordinator.store_conformance import StoreConformance
from tests.coordinator.stored import DATABASE, fill, lease

ROOT = Path(__file__).parents[2]


class TestSqliteStore(StoreConformance, AuditConformance):
    def open_store(self, directory: Path) -> Store:
        return SqliteStore.open(directory / DATABASE)


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
        assert store.unit(unit.unit) == accepted
        assert store.attempt(start.lease) == examples.received(start)


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
