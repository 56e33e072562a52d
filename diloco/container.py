"""The file a delta travels in: a compressed safetensors file whose header follows from (schema, codec, unit id).

Unpacked (`zstd -d` does it) it is a safetensors file: all scales, then all packed codes. Its size and header are
implied by the run, so nothing of the header is interpreted: it is compared with the bytes that must be there, and only
then is data read, piece by piece. A foreign schema, a 66 MB header or a stream that would unpack to more than a delta
is refused at the cost of reading one table and one header of the right length.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

import numpy as np

from diloco.codec import (
    DECODE_CHUNK,
    CodecConfig,
    EncodedDelta,
    Scales,
    check_codes,
    check_scales,
    chunk_ranges,
    content_digest,
    decode,
)
from diloco.frames import FramedFile, largest_file, write_frames
from diloco.layout import Entry, Layout
from diloco.packing import CELL, Packed
from diloco.pinned import Bytes
from diloco.schema import Schema
from diloco.tables import Floats
from protocol.canonical import canonical_json
from protocol.errors import DeltaSchemaMismatch
from protocol.limits import MAX_CONTAINER_HEADER_BYTES

FORMAT: Final = 2


@lru_cache(maxsize=64)
def container_layout(schema: Schema, codec: CodecConfig, unit_id: bytes) -> Layout:
    """Return the implied layout: all scales in schema order, then all codes in schema order."""
    described = canonical_json(
        {"format": FORMAT, "codec": codec.to_json(), "schema": schema.digest.hex(), "unit": unit_id.hex()}
    )
    scales = [
        Entry(name=f"{spec.name}.scales", dtype="U16", shape=(codec.num_blocks(spec.num_elements),))
        for spec in schema.tensors
    ]
    codes = [
        Entry(name=f"{spec.name}.codes", dtype="U8", shape=(codec.packing.num_bytes(spec.num_elements),))
        for spec in schema.tensors
    ]
    return Layout(entries=(*scales, *codes), metadata=("delta", described.decode("utf-8")))


def expected_header(schema: Schema, codec: CodecConfig, unit_id: bytes) -> bytes:
    """Return the bytes that a container starts with: length and header.

    Raises:
        ValueError: the schema needs a longer header than `limits.MAX_CONTAINER_HEADER_BYTES`.
    """
    return _bounded_prefix(container_layout(schema, codec, unit_id))


def container_size(schema: Schema, codec: CodecConfig, unit_id: bytes) -> int:
    """Return the exact size of an unpacked container in bytes; every delta of the run has this size."""
    layout = container_layout(schema, codec, unit_id)
    return len(_bounded_prefix(layout)) + layout.data_bytes()


def largest_container(schema: Schema, codec: CodecConfig) -> int:
    """Return the most bytes that a container's file may have; a lease allows so many."""
    return largest_file(container_size(schema, codec, bytes(32)))


def write_container(path: Path, encoded: EncodedDelta, unit_id: bytes) -> None:
    """Write the delta of a unit to `path` and wait until the disk has it."""
    header = expected_header(encoded.schema, encoded.codec, unit_id)
    size = container_size(encoded.schema, encoded.codec, unit_id)
    write_frames(path, size, itertools.chain([header], encoded.data()))


class Container:
    """A received delta whose table and header hold; its content is checked by `check_finite` and read in chunks.

    Holds no open file: see `PinnedFile`.
    """

    __slots__ = ("_data_start", "_file", "_starts", "codec", "schema", "unit_id")

    def __init__(self, file: FramedFile, schema: Schema, codec: CodecConfig, unit_id: bytes, data_start: int) -> None:
        """`open` makes containers, after it has compared the `data_start` bytes before the data."""
        self.schema = schema
        self.codec = codec
        self.unit_id = unit_id
        self._file = file
        self._data_start = data_start
        self._starts = data_starts(schema, codec)

    @classmethod
    def open(cls, path: Path, schema: Schema, codec: CodecConfig, unit_id: bytes) -> Self:
        """Compare the table of frames, then the header, with what schema, codec and unit imply.

        Raises:
            DeltaTruncated, DeltaOversized: the file is shorter or longer than its table says, or than it can be.
            DeltaStreamCorrupt: it has no such table, or its first frame does not unpack.
            DeltaSchemaMismatch: a byte of the header differs.
        """
        expected = expected_header(schema, codec, unit_id)
        file = FramedFile.open(path, container_size(schema, codec, unit_id))
        (found,) = file.read((0, len(expected)))
        if found.tobytes() != expected:
            raise DeltaSchemaMismatch(
                "The delta's header is not the one that this run's model, codec and unit imply; "
                "it was made for another unit, or by another version."
            )
        return cls(file, schema, codec, unit_id, len(expected))

    def check_finite(self) -> None:
        """Stream over all scales and codes and refuse what no encoder writes.

        Raises:
            DeltaNotFinite: a scale is NaN, infinite, or beyond any honest value.
            DeltaCodeIllegal: a negative or subnormal scale, a byte that stands for nothing, padding that is not zero,
                codes under a zero scale.
            DeltaStreamCorrupt: a frame does not unpack to what it must.
        """
        for spec in self.schema.tensors:
            for start, stop in chunk_ranges(spec.num_elements, 4 * DECODE_CHUNK):
                codes, scales = self.coded(spec.name, start, stop)
                check_scales(scales, spec.name, kind=self.codec.kind)
                check_codes(codes, scales, stop - start, codec=self.codec, name=spec.name)

    def content_digest(self) -> bytes:
        """Return the SHA-256 of codec, schema, scales and codes, streamed; equal to `EncodedDelta.content_digest()`."""
        return content_digest(self.schema, self.codec, self._data())

    def decode(self, name: str, start: int, stop: int) -> Floats:
        """Return elements [start, stop) of the flattened tensor, fp32; `start` is a multiple of `codec.alignment`."""
        codes, scales = self.coded(name, start, stop)
        return decode(codes, scales, stop - start, codec=self.codec)

    def tensor(self, name: str) -> Floats:
        """Return one whole tensor, fp32 in its shape."""
        (spec,) = (spec for spec in self.schema.tensors if spec.name == name)
        return self.decode(name, 0, spec.num_elements).reshape(spec.shape)

    def decoded_chunks(self) -> Iterator[Floats]:
        """Yield the decoded delta as flat fp32 chunks, tensor after tensor."""
        for spec in self.schema.tensors:
            for start, stop in chunk_ranges(spec.num_elements):
                yield self.decode(spec.name, start, stop)

    def coded(self, name: str, start: int, stop: int) -> tuple[Packed, Scales]:
        """Return packed codes and scales of elements [start, stop); `start` is a multiple of `codec.alignment`."""
        block, packing = self.codec.block, self.codec.packing
        if start % self.codec.alignment or not 0 <= start <= stop <= self.schema.elements_of[name]:
            raise ValueError(f"elements {start} to {stop} of {name} are not an aligned range of the tensor")
        first = packing.num_bytes(start)
        codes, scales = self.parts(
            (self._starts[f"{name}.codes"] + first, self._packed_bytes(name, stop) - first),
            (self._starts[f"{name}.scales"] + start // block * 2, self.codec.num_blocks(stop - start) * 2),
        )
        return codes, scales.view("<u2").astype(np.uint16, copy=False)

    def parts(self, *spans: tuple[int, int]) -> Sequence[Bytes]:
        """Return one array of bytes for each (offset, length) in the data section, laid out as `data_starts` says."""
        return self._file.read(*((self._data_start + offset, length) for offset, length in spans))

    def _packed_bytes(self, name: str, stop: int) -> int:
        if stop % CELL and stop != self.schema.elements_of[name]:
            raise ValueError(f"element {stop} of {name} is neither its end nor that of a cell")
        return self.codec.packing.num_bytes(stop)

    def _data(self) -> Iterator[memoryview]:
        skip = self._data_start
        for piece in self._file.pieces():
            yield piece[min(skip, len(piece)) :]
            skip -= min(skip, len(piece))


@lru_cache(maxsize=4)
def data_starts(schema: Schema, codec: CodecConfig) -> dict[str, int]:
    """Return the offset of each tensor's "NAME.scales" and "NAME.codes" in the data section; not to be changed.

    Shared, so that an open container is small: a merge has many.
    """
    return container_layout(schema, codec, b"").starts()


def _bounded_prefix(layout: Layout) -> bytes:
    prefix = layout.prefix()
    if len(prefix) > MAX_CONTAINER_HEADER_BYTES:
        raise ValueError(
            f"this schema needs a container header of {len(prefix)} bytes; the limit is {MAX_CONTAINER_HEADER_BYTES}"
        )
    return prefix
