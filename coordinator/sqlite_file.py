"""The SQLite file itself: opening it, bringing its schema up to date, copying it, and saying what is wrong with it."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from coordinator.blobs import sync_directory
from coordinator.sql_files import MIGRATIONS, read_sql
from protocol.errors import (
    CoordinatorDiskFull,
    DatabaseTooNew,
    DirectoryInUse,
    DirectoryNotARun,
    DirectoryNotEmpty,
    PackageMissing,
)

APPLICATION_ID: Final = 0x43573031
"""Says "CW01" in the file's header, so that somebody else's database is never taken for ours."""
OLDEST_SQLITE: Final = (3, 37, 0)
"""The first SQLite with STRICT tables."""
BUSY_MS: Final = 5_000
"""How long a write waits for another process (a backup, a curious operator) to let go of the file."""

_NO_ROOM: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, making or migrating it as needed; usable from any one thread at a time.

    Raises `DatabaseTooNew` for a newer schema, `DirectoryNotARun` for a file that is not ours, `DirectoryInUse` if
    another process keeps it locked, `CoordinatorDiskFull`.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise PackageMissing(f"Python's SQLite is {sqlite3.sqlite_version}; at least 3.37 is needed.")
    # The mode that the database gets, its journal and its index get too.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        with our_errors(path):
            _prepare(connection, path)
        sync_directory(path.parent)
    except BaseException:
        connection.close()
        raise
    return connection


def backup_database(source: Path, target: Path) -> None:
    """Copy a database that may be in use to a new file, complete, consistent and durable.

    Uses a connection of its own, so it can run beside the writer, in another thread or process. Raises
    `DirectoryNotEmpty` if `target` exists, `DirectoryNotARun` if `source` is missing or not a database.
    """
    if target.exists():
        raise DirectoryNotEmpty(f"{target} exists already; nothing was overwritten.")
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    try:
        with (
            our_errors(source),
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True)) as origin,
            closing(sqlite3.connect(unfinished)) as copy,
        ):
            origin.backup(copy)
            # One file that is complete by itself: no journal beside it that could be left behind.
            copy.execute("PRAGMA journal_mode=DELETE")
            (report,) = copy.execute("PRAGMA quick_check").fetchone()
        if report != "ok":
            raise DirectoryNotARun(f"The database {source} is damaged: {report}.")
        unfinished.chmod(0o600)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(target)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(target.parent)


def newest_fixed_round(database: Path) -> int:
    """Return the newest round whose merge is fixed in a database that nobody writes to; 0 if there is none."""
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        (newest,) = connection.execute("SELECT max(round) FROM rounds WHERE state <> 'collecting'").fetchone()
    return newest or 0


@contextmanager
def our_errors(path: Path) -> Iterator[None]:
    """Turn what the world does to a database into our errors; constraint violations stay what they are."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code in _NO_ROOM:
            raise CoordinatorDiskFull(private=f"{path}: {error}") from None
        if code == sqlite3.SQLITE_NOTADB:
            raise DirectoryNotARun(f"{path} is not a database.") from None
        if code & 0xFF == sqlite3.SQLITE_CANTOPEN:
            raise DirectoryNotARun(f"The database {path} can't be opened.") from None
        if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DirectoryInUse(f"Another process keeps the database {path} locked.") from None
        raise


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise DirectoryNotARun(f"{path} is a database of another program.")
    if found > len(MIGRATIONS):
        raise DatabaseTooNew(
            f"The database {path} has version {found}; this Commonweight knows versions up to {len(MIGRATIONS)}. "
            "Install the version that wrote it, or a newer one."
        )
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA trusted_schema=OFF")
    for version in range(found, len(MIGRATIONS)):
        _migrate(connection, read_sql(MIGRATIONS[version]), version + 1)


def _migrate(connection: sqlite3.Connection, script: str, version: int) -> None:
    steps = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={version};"
    try:
        # The version number changes with the tables or not at all.
        connection.executescript(f"BEGIN IMMEDIATE;\n{script}\n{steps}\nCOMMIT;")
    except BaseException:
        with suppress(sqlite3.OperationalError):
            connection.execute("ROLLBACK")
        raise
