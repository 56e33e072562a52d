"""Reading by offset from a file that must stay the one that was checked, without keeping it open."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protocol.errors import BytesRefused

Bytes = npt.NDArray[np.uint8]


class PinnedFile:
    """A file that is opened for each read, and refused when it is not the same file, size and time as at first.

    A merge reads hundreds of deltas; keeping each of them open would hit the limit on open files.
    """

    __slots__ = ("_identity", "path", "refusal", "size")

    def __init__(self, path: Path, refusal: type[BytesRefused]) -> None:
        self.path = path
        self.refusal = refusal
        status = path.stat()
        self.size = status.st_size
        self._identity = _identity(status)

    def read(self, *spans: tuple[int, int]) -> Sequence[Bytes]:
        """Return one array of bytes for each (offset, length).

        Raises:
            BytesRefused: of the class given at the start: the file was changed, replaced or cut short meanwhile.
        """
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _identity(os.fstat(descriptor)) != self._identity:
                raise self.refusal(f"{self.path.name} was changed while it was being read.")
            return [self._read_span(descriptor, offset, length) for offset, length in spans]
        finally:
            os.close(descriptor)

    def _read_span(self, descriptor: int, offset: int, length: int) -> Bytes:
        buffer = np.empty(length, dtype=np.uint8)
        view = buffer.data
        done = 0
        while done < length:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise self.refusal(f"{self.path.name} ends at byte {offset + done}; it must go on.")
            done += count
        return buffer


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
