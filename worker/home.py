"""Where a worker keeps what it must not lose: its keys, its finished deltas, what its owner agreed to; and its cache.

HOME/lock               held while a worker runs
HOME/keys/              owner and device keys (0700), made on first start
HOME/consent/RUN.json   which terms were accepted
HOME/joins/RUN          the join string that last led to a run
HOME/spool/RUN/         finished units on their way to the coordinator
HOME/cache/             public files by digest; can be deleted at any time
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protocol.documents import RunId
from protocol.errors import DirectoryInUse, JoinStringInvalid
from protocol.join import JoinString
from worker.durable import disk_named, write_durably


class WorkerHome:
    """The paths of one worker's directory, and its lock."""

    __slots__ = ("root",)

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def keys(self) -> Path:
        """Directory of the owner's and the device's key."""
        return self.root / "keys"

    @property
    def cache(self) -> Path:
        """Directory of the file cache, shared by all runs."""
        return self.root / "cache"

    def consent(self, run: RunId) -> Path:
        """File that says which terms of a run were accepted."""
        return self.root / "consent" / f"{run}.json"

    def remember_join(self, join: JoinString) -> None:
        """Keep the join string of a run that answered, so that its owner need not look it up again."""
        path = self.root / "joins" / join.run
        with disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not path.exists() or path.read_text(encoding="utf-8") != str(join):
                write_durably(path, str(join).encode("utf-8"))

    def joins(self) -> dict[RunId, JoinString]:
        """Return the join strings that were kept, by run; damaged ones are left out."""
        found: dict[RunId, JoinString] = {}
        for path in sorted((self.root / "joins").glob("*")):
            with suppress(OSError, UnicodeDecodeError, JoinStringInvalid):
                join = JoinString.parse(path.read_text(encoding="utf-8"))
                found[join.run] = join
        return found

    def spool(self, run: RunId) -> Path:
        """Directory of a run's finished units."""
        return self.root / "spool" / run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for one worker; the lock goes with the process, however it ends.

        Raises:
            DirectoryInUse: another worker runs with this directory.
        """
        with disk_named(self.root):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DirectoryInUse(
                    f"Another worker runs with {self.root}; stop it, or give this one its own directory with --home."
                ) from None
            yield
        finally:
            os.close(descriptor)
