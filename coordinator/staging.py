"""Uploads on their way: one append-only file per claim and artifact, resumed at the byte where it stopped.

Nothing here is trusted or durable until the caller has checked the whole file and called `sync`. A power cut can leave
bytes in a file that nobody sent; the digest check at the end finds them, and the caller then discards the file.
Everything blocks; callers use threads.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.blobs import sync_directory
from protocol.documents import Digest
from protocol.errors import CoordinatorDiskFull, DeltaOversized, UploadInProgress, UploadOffsetWrong

_CLAIM = re.compile(r"[0-9a-f]{64}")
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Staging:
    """Unfinished uploads under `root`; none is taken that would leave less than `reserve_bytes` free."""

    def __init__(self, root: Path, reserve_bytes: int) -> None:
        self._root = root
        self._reserve_bytes = reserve_bytes

    def path(self, claim: Digest, role: str) -> Path:
        """Return the file of an upload, which need not exist; raise `ValueError` for a malformed claim or role."""
        if _CLAIM.fullmatch(claim) is None:
            raise ValueError(f"{claim[:80]!r} is not a claim's SHA-256 in lower-case hex")
        if _ROLE.fullmatch(role) is None:
            raise ValueError(f"{role[:80]!r} is not an artifact's role")
        return self._root / f"{claim}.{role}"

    def has_room(self) -> bool:
        """Say whether the disk has more than the reserve."""
        self._root.mkdir(parents=True, exist_ok=True)
        free = os.statvfs(self._root)
        return free.f_bavail * free.f_frsize >= self._reserve_bytes

    def offset(self, claim: Digest, role: str) -> int:
        """Return how many bytes are stored, which is where the next chunk must start."""
        try:
            return self.path(claim, role).stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, claim: Digest, role: str, offset: int, data: bytes, max_bytes: int) -> int:
        """Store a chunk and return the new length; whatever is raised, the file is as long as it was before.

        Raises `UploadOffsetWrong` unless the chunk starts where the file ends, `DeltaOversized` if it would end beyond
        `max_bytes`, `CoordinatorDiskFull` if it would touch the reserve or the disk is full, and `UploadInProgress` if
        another chunk of the same file is being written at this moment.
        """
        path = self.path(claim, role)
        with _disk_full_said():
            self._root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            try:
                # Two connections that send the same artifact must not both see the same length.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UploadInProgress from None
            length = os.fstat(descriptor).st_size
            if offset != length:
                raise UploadOffsetWrong(f"The chunk starts at byte {offset}, but {length} bytes are stored.")
            if length + len(data) > max_bytes:
                raise DeltaOversized(f"The upload would have {length + len(data)} bytes; {max_bytes} are expected.")
            self._check_reserve(len(data))
            _write_at(descriptor, data, length)
            return length + len(data)
        finally:
            os.close(descriptor)

    def sync(self, claim: Digest, role: str) -> None:
        """Make a finished file durable; raise `CoordinatorDiskFull` if the disk has no room for what it had taken."""
        path = self.path(claim, role)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            with _disk_full_said():
                os.fsync(descriptor)
        except BaseException:
            # After a failed fsync nobody knows which pages were written: the file can't be continued.
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_directory(self._root)

    def discard(self, claim: Digest, role: str) -> None:
        """Forget an upload; harmless if there is none."""
        self.path(claim, role).unlink(missing_ok=True)

    def sweep(self, older_than_ms: int, now_ms: int) -> int:
        """Remove uploads that nobody has continued for `older_than_ms` milliseconds; return how many."""
        removed = 0
        if not self._root.is_dir():
            return removed
        for file in self._root.iterdir():
            claim, _, role = file.name.partition(".")
            if _CLAIM.fullmatch(claim) is None or _ROLE.fullmatch(role) is None:
                continue
            try:
                if now_ms - file.stat().st_mtime_ns // 1_000_000 > older_than_ms:
                    file.unlink()
                    removed += 1
            except FileNotFoundError:
                continue  # it was finished in the meantime
        return removed

    def _check_reserve(self, wanted: int) -> None:
        free = os.statvfs(self._root)
        if free.f_bavail * free.f_frsize - wanted < self._reserve_bytes:
            # Checked before the disk is full, since the database and the next merge need room to finish.
            raise CoordinatorDiskFull


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    at = offset
    try:
        with _disk_full_said():
            while rest:
                written = os.pwrite(descriptor, rest, at)
                rest = rest[written:]
                at += written
    except BaseException:
        os.ftruncate(descriptor, offset)
        raise


@contextmanager
def _disk_full_said() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise CoordinatorDiskFull(private=str(error)) from None
        raise
