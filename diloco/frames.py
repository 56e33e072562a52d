"""A file compressed piece by piece, so that any part of it can be read without the rest, and nothing unpacks to more.

The plain content is cut into pieces of 64 KiB, each one zstd frame. Before them stands a frame that decompressors skip,
with the length of each of the others (unsigned 32-bit, little-endian), so the file is a plain `.zst` file to everybody
else. The reader knows beforehand how long the content is, and so how many pieces there are and what each must unpack
to; a frame that announces anything else is refused before it is unpacked.

What the compressor makes of a piece may differ between its versions. Only the content has an identity.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import zstandard

from diloco.pinned import Bytes, PinnedFile
from protocol.errors import DeltaOversized, DeltaStreamCorrupt, DeltaTruncated

FRAME: Final = 1 << 16
"""Bytes of content in a frame. Merges read several at once; a larger one would be unpacked for a part of it."""
_LEVEL: Final = 1
"""Packed codes are nearly random: what the quickest level leaves, no other one finds (within 2 % of the entropy)."""
_SKIPPABLE: Final = (0x184D2A50).to_bytes(4, "little")
_PREFIX: Final = 8
_MOST_OVERHEAD: Final = 64
"""Bytes by which a frame may be longer than its content."""


def num_frames(size: int) -> int:
    """Return the frames of so many bytes of content."""
    return -(-size // FRAME)


def largest_file(size: int) -> int:
    """Return the most bytes that a file of so many bytes of content may have, however badly it compresses."""
    return _table_bytes(size) + size + _MOST_OVERHEAD * num_frames(size)


def write_frames(path: Path, size: int, parts: Iterable[bytes | bytearray | memoryview]) -> None:
    """Compress `parts`, `size` bytes together, into a file, and wait until the disk has it."""
    lengths: list[int] = []
    written = 0
    with path.open("wb") as file:
        file.seek(_table_bytes(size))
        compressor = zstandard.ZstdCompressor(level=_LEVEL)
        for piece in _pieces(parts):
            lengths.append(file.write(compressor.compress(piece)))
            written += len(piece)
        if written != size:
            raise ValueError(f"the parts have {written} bytes, not the {size} that were announced")
        file.seek(0)
        file.write(_SKIPPABLE + (4 * len(lengths)).to_bytes(4, "little"))
        file.write(np.array(lengths, dtype="<u4").tobytes())
        file.flush()
        os.fsync(file.fileno())


class FramedFile:
    """A compressed file whose table holds; its content is read by offset. Holds no open file: see `PinnedFile`."""

    __slots__ = ("_file", "_starts", "size")

    def __init__(self, file: PinnedFile, starts: npt.NDArray[np.int64], size: int) -> None:
        self._file = file
        self._starts = starts
        self.size = size

    @classmethod
    def open(cls, path: Path, size: int) -> Self:
        """Read the table of a file whose content has `size` bytes.

        Raises:
            DeltaTruncated, DeltaOversized: the file is shorter or longer than its table says, or than it can be.
            DeltaStreamCorrupt: there is no such table, or it has a frame longer than its content allows.
        """
        file = PinnedFile(path, DeltaTruncated)
        table = _table_bytes(size)
        if file.size < table:
            raise DeltaTruncated(f"The file has {file.size:,} bytes; its table alone has {table:,}.")
        if file.size > largest_file(size):
            raise DeltaOversized(
                f"The file has {file.size:,} bytes; the most that it can have is {largest_file(size):,}."
            )
        prefix, raw = file.read((0, _PREFIX), (_PREFIX, table - _PREFIX))
        if prefix.tobytes() != _SKIPPABLE + (table - _PREFIX).to_bytes(4, "little"):
            raise DeltaStreamCorrupt("The file does not begin with the table of its frames.")
        lengths = raw.view("<u4")
        starts = np.zeros(num_frames(size) + 1, dtype=np.int64)
        np.cumsum(lengths, dtype=np.int64, out=starts[1:])
        starts += table
        if file.size < starts[-1]:
            raise DeltaTruncated(f"The file has {file.size:,} bytes; its table says {starts[-1]:,}.")
        if file.size > starts[-1]:
            raise DeltaOversized(f"The file has {file.size:,} bytes; its table says {starts[-1]:,}.")
        # A legal frame of a few bytes of content may be stuffed to any length, and it is read as a whole.
        too_long = np.flatnonzero(lengths > _contents(size) + _MOST_OVERHEAD)
        if too_long.size:
            raise DeltaStreamCorrupt(f"Frame {too_long[0]} of the file is longer than any that holds so little.")
        return cls(file, starts, size)

    def read(self, *spans: tuple[int, int]) -> Sequence[Bytes]:
        """Return one array of bytes for each (offset, length) of the content; neighbouring spans share their frames.

        Raises:
            DeltaStreamCorrupt: a frame does not unpack to what it must.
            DeltaTruncated: the file was changed, replaced or cut short meanwhile.
        """
        numbers = sorted({number for offset, length in spans for number in _frames_of(offset, length)})
        raw = self._file.read(*(self._place(number) for number in numbers))
        unpacked = {number: self._unpack(number, frame) for number, frame in zip(numbers, raw, strict=True)}
        return [_cut(unpacked, offset, length) for offset, length in spans]

    def pieces(self) -> Iterator[memoryview]:
        """Yield the whole content, piece after piece."""
        for start in range(0, self.size, FRAME):
            (piece,) = self.read((start, min(FRAME, self.size - start)))
            yield piece.data

    def _place(self, number: int) -> tuple[int, int]:
        start, stop = self._starts[number : number + 2].tolist()
        return start, stop - start

    def _unpack(self, number: int, frame: Bytes) -> Bytes:
        wanted = min(FRAME, self.size - number * FRAME)
        try:
            announced = zstandard.get_frame_parameters(frame.data)
            if announced.content_size != wanted or announced.dict_id:
                raise DeltaStreamCorrupt(f"Frame {number} of the file announces another content than it must have.")
            content = zstandard.ZstdDecompressor().decompress(frame.data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise DeltaStreamCorrupt(f"Frame {number} of the file does not unpack ({error}).") from None
        if len(content) != wanted:
            raise DeltaStreamCorrupt(f"Frame {number} of the file unpacks to {len(content)} bytes, not {wanted}.")
        return np.frombuffer(content, dtype=np.uint8)


def _table_bytes(size: int) -> int:
    return _PREFIX + 4 * num_frames(size)


def _contents(size: int) -> npt.NDArray[np.int64]:
    """Return what each frame must unpack to, in bytes."""
    contents = np.full(num_frames(size), FRAME, dtype=np.int64)
    contents[-1:] = size - FRAME * (contents.size - 1)
    return contents


def _pieces(parts: Iterable[bytes | bytearray | memoryview]) -> Iterator[bytes]:
    """Cut parts of any length into pieces of `FRAME` bytes and a shorter last one."""
    pending = bytearray()
    for part in parts:
        pending += part
        whole = len(pending) - len(pending) % FRAME
        for start in range(0, whole, FRAME):
            yield bytes(pending[start : start + FRAME])
        del pending[:whole]
    if pending:
        yield bytes(pending)


def _frames_of(offset: int, length: int) -> range:
    return range(offset // FRAME, -(-(offset + length) // FRAME)) if length else range(0)


def _cut(unpacked: dict[int, Bytes], offset: int, length: int) -> Bytes:
    numbers = _frames_of(offset, length)
    found = [unpacked[number] for number in numbers]
    joined = found[0] if len(found) == 1 else np.concatenate([np.empty(0, dtype=np.uint8), *found])
    start = offset - numbers.start * FRAME
    return joined[start : start + length]
