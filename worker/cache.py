"""Public files by SHA-256, with a cap on their bytes: checkpoints and shards are fetched once, and never half.

    CACHE/files/HEX      whole files; a file gets its name only after its digest was checked and the disk has it
    CACHE/partial/HEX    what has come so far of a file; the next attempt goes on from there

Over the cap the least recently used files go, never those that the caller still needs.
"""

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from protocol.documents import Digest
from protocol.errors import CacheTooSmall, DigestMismatch, Unreachable
from worker.durable import disk_named, sync_directory
from worker.progress import readable_bytes
from worker.web import Body, PublicSite

_HASH_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A public file: its path under the public URL, and what a signed document says of its bytes."""

    path: str
    sha256: Digest
    size: int


class FileCache:
    """A directory of verified files. Methods block; use from one thread at a time."""

    def __init__(self, root: Path, cap_bytes: int) -> None:
        self.root = root
        self.cap_bytes = cap_bytes
        self._verified: dict[str, tuple[int, int, int]] = {}
        with disk_named(root):
            for part in ("files", "partial"):
                (root / part).mkdir(parents=True, exist_ok=True)

    def check_fits(self, wanted: Collection[Wanted]) -> None:
        """Raise `CacheTooSmall` unless all these files fit under the cap together. Before anything is fetched."""
        needed = sum({file.sha256: file.size for file in wanted}.values())
        if needed > self.cap_bytes:
            raise CacheTooSmall(
                f"A unit of this run needs {readable_bytes(needed)} of files, and --cache-gib allows "
                f"{readable_bytes(self.cap_bytes)}; start the worker with a larger --cache-gib."
            )

    def fetch(
        self,
        site: PublicSite,
        wanted: Wanted,
        *,
        keep: Collection[Digest],
        on_bytes: Callable[[int], None],
    ) -> Path:
        """Return the path of a verified file, fetching what is missing of it.

        Args:
            keep: files that must stay, whatever the cap says.
            on_bytes: told the number of bytes of each chunk that came over the network.

        Raises:
            DigestMismatch: the bytes are not those that were signed for; they were dropped.
            Unreachable, ServerBusy: the server does not answer; what has come is kept.
            UnitAbandoned: the site's transfers were broken off; what has come is kept.
            DiskFull: what has come is kept.
        """
        final = self.root / "files" / wanted.sha256
        if not self._holds(final, wanted):
            self._make_room(wanted, keep)
            self._download(site, wanted, final, on_bytes)
        os.utime(final)
        self._verified[wanted.sha256] = _identity(final)
        return final

    def held(self, wanted: Wanted) -> Path | None:
        """Return the path of a file if it is here, and whole."""
        path = self.root / "files" / wanted.sha256
        return path if self._holds(path, wanted) else None

    def make(self, wanted: Wanted, write: Callable[[Path], str], *, keep: Collection[Digest]) -> Path:
        """Return the path of a file that is made here from others, and not fetched.

        Args:
            write: writes the file, has the disk keep it, and returns its SHA-256 in hex.
            keep: files that must stay, whatever the cap says.

        Raises:
            DigestMismatch: what was written is not what was signed for.
        """
        final = self.root / "files" / wanted.sha256
        if not self._holds(final, wanted):
            self._make_room(wanted, keep)
            partial = self.root / "partial" / wanted.sha256
            with disk_named(partial):
                found = write(partial)
                if found != wanted.sha256:
                    partial.unlink()
                    raise DigestMismatch(f"What the patches lead to is not {wanted.path} as the run signed it.")
                partial.rename(final)
                sync_directory(final.parent)
        os.utime(final)
        self._verified[wanted.sha256] = _identity(final)
        return final

    def _holds(self, path: Path, wanted: Wanted) -> bool:
        if not path.exists():
            return False
        if self._verified.get(wanted.sha256) == _identity(path):
            return True
        # Once in the life of a process, since a disk may have lost what it said it had.
        with path.open("rb") as file:
            sound = hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256
        if not sound:
            path.unlink()
        return sound

    def _make_room(self, wanted: Wanted, keep: Collection[Digest]) -> None:
        files = sorted((self.root / "files").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for partial in (self.root / "partial").iterdir():
            if partial.name != wanted.sha256 and partial.name not in keep:
                partial.unlink()
        used = sum(path.stat().st_size for path in files)
        for path in files:
            if used + wanted.size <= self.cap_bytes:
                return
            if path.name not in keep:
                used -= path.stat().st_size
                path.unlink()
                self._verified.pop(path.name, None)

    def _download(self, site: PublicSite, wanted: Wanted, final: Path, on_bytes: Callable[[int], None]) -> None:
        partial = self.root / "partial" / wanted.sha256
        with disk_named(partial), partial.open("a+b") as file:
            if file.seek(0, os.SEEK_END) >= wanted.size:
                file.truncate(0)
            offset = file.seek(0, os.SEEK_END)
            with site.open(wanted.path, offset) as body:
                if body.offset < offset:
                    file.truncate(body.offset)  # the server sends the whole file again
                received = _append(file, body, wanted, on_bytes)
            if received < wanted.size:
                raise Unreachable(f"The download of {wanted.path} broke off at {received:,} of {wanted.size:,} bytes.")
            file.flush()
            file.seek(0)
            found = hashlib.sha256()
            while chunk := file.read(_HASH_CHUNK):
                found.update(chunk)
            if found.hexdigest() != wanted.sha256:
                file.truncate(0)
                raise DigestMismatch(f"{site.url}/{wanted.path} does not have the SHA-256 that the run signed for it.")
            os.fsync(file.fileno())
            partial.rename(final)
            sync_directory(final.parent)


def _append(file: BinaryIO, body: Body, wanted: Wanted, on_bytes: Callable[[int], None]) -> int:
    """Append what comes, and return the file's length; stop as soon as more comes than was signed for."""
    length = body.offset
    for chunk in body.chunks():
        length += len(chunk)
        if length > wanted.size:
            file.truncate(0)
            raise DigestMismatch(f"{wanted.path} is longer than the {wanted.size:,} bytes that the run signed for it.")
        file.write(chunk)
        on_bytes(len(chunk))
    return length


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
