"""Reading files of a directory that came from a stranger: only plain files, only so many bytes, and never waiting.

A named pipe in place of a small file would hold its reader for ever, and a device could feed it without end.
"""

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        follow: whether a link in the last place of the path is taken for what it leads to.

    Raises:
        OSError: it is something else, is not there, or can't be read; `strerror` says which.
    """
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for somebody who writes.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise _not_plain(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(path)
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, max_bytes: int) -> bytes:
    """Return a regular file's bytes.

    Raises:
        OSError: like `open_plain`; or it holds more than `max_bytes`.
    """
    with open_plain(path) as file:
        raw = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)
    if len(raw) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes", str(path))
    return raw


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits; its bytes are not in memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_plain(path: Path) -> OSError:
    return OSError(errno.EINVAL, "it is no plain file", str(path))
