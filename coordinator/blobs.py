"""Files that never change, kept and found by their SHA-256.

blobs.add(staging.path(claim, "delta"), sha256)  # after the content was checked and fsynced
blobs.path(sha256)
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from protocol.documents import Digest
from protocol.errors import DigestMismatch

_HEX = re.compile(r"[0-9a-f]{64}")


class BlobStore(Protocol):
    """Content-addressed files.

    - A digest that is not 64 lower-case hex digits MUST raise `ValueError`, from every method.
    - A blob MUST be there whole or not at all, also after a crash, and MUST be durable when `add` returns.
    - The digest MUST be taken on trust: the caller has hashed the very bytes that it hands over, and hashing gigabytes
      twice would halve the rate of uploads. Only an obvious mix-up (another size under the same digest) is noticed.
    """

    def add(self, staged: Path, sha256: Digest) -> None:
        """Take the file over under its digest; the caller has fsynced its content.

        `staged` is gone afterwards. Adding a blob that is there already MUST succeed, also if `staged` went with an
        earlier call. Raises `FileNotFoundError` if neither is there, `DigestMismatch` if both are, in different sizes.
        """
        ...

    def path(self, sha256: Digest) -> Path:
        """Return where the blob lies, or would lie."""
        ...

    def has(self, sha256: Digest) -> bool:
        """Say whether the blob is there."""
        ...

    def size(self, sha256: Digest) -> int:
        """Return the blob's size in bytes; raise `FileNotFoundError`."""
        ...

    def remove(self, sha256: Digest) -> None:
        """Remove the blob; harmless if it is not there."""
        ...

    def digests(self) -> Iterator[Digest]:
        """Yield the digests of all blobs in ascending order."""
        ...


class DirectoryBlobs:
    """A `BlobStore` in a local directory: `ROOT/sha256/ab/HEX`. The staging area must be on the same file system."""

    def __init__(self, root: Path) -> None:
        self._root = root / "sha256"

    def add(self, staged: Path, sha256: Digest) -> None:
        """See `BlobStore.add`."""
        place = self.path(sha256)
        if place.exists():
            if staged.exists():
                if staged.stat().st_size != place.stat().st_size:
                    raise DigestMismatch(f"Two files of different sizes are both said to have SHA-256 {sha256[:12]}.")
                staged.unlink()
        else:
            self._make_shelf(place.parent)
            staged.chmod(0o444)
            staged.replace(place)
        # Also for a blob that was there: the crash that made this a second call may have come before this line.
        sync_directory(place.parent)

    def path(self, sha256: Digest) -> Path:
        """See `BlobStore.path`."""
        if _HEX.fullmatch(sha256) is None:
            raise ValueError(f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
        return self._root / sha256[:2] / sha256

    def has(self, sha256: Digest) -> bool:
        """See `BlobStore.has`."""
        return self.path(sha256).is_file()

    def size(self, sha256: Digest) -> int:
        """See `BlobStore.size`."""
        return self.path(sha256).stat().st_size

    def remove(self, sha256: Digest) -> None:
        """See `BlobStore.remove`."""
        self.path(sha256).unlink(missing_ok=True)

    def digests(self) -> Iterator[Digest]:
        """See `BlobStore.digests`."""
        for shelf in sorted(self._root.glob("[0-9a-f][0-9a-f]")):
            for file in sorted(shelf.iterdir()):
                if _HEX.fullmatch(file.name) and file.name.startswith(shelf.name):
                    yield Digest(file.name)

    def _make_shelf(self, shelf: Path) -> None:
        missing = [directory for directory in (self._root.parent, self._root, shelf) if not directory.exists()]
        shelf.mkdir(parents=True, exist_ok=True)
        for directory in missing:
            # A new directory's name lives in its parent: without this a crash could lose the shelf and all on it.
            sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable: what was created, renamed or removed there survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
