"""The file a delta travels in: a safetensors file whose every header byte follows from (schema, codec, unit id).

Nothing of the header is interpreted: size, then header bytes are compared with the implied ones, and only then is data
read, chunk by chunk. A 66 MB header, a compressed stream or a foreign schema is refused at the cost of a `stat` call or
of reading one header of the right length.
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

import numpy as np

from diloco.codec import (
    DECODE_CHUNK,
    CodecConfig,
    Codes,
    EncodedDelta,
    Scales,
    check_codes,
    check_scales,
    chunk_ranges,
    content_digest,
    decode,
)
from diloco.layout import Entry, Layout
from diloco.pinned import Bytes, PinnedFile
from diloco.schema import Schema
from diloco.tables import Floats
from protocol.canonical import canonical_json
from protocol.errors import DeltaOversized, DeltaSchemaMismatch, DeltaTruncated
from protocol.limits import MAX_CONTAINER_HEADER_BYTES

FORMAT: Final = 1
_HASH_CHUNK: Final = 1 << 20


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
        Entry(name=f"{spec.name}.codes", dtype="U8", shape=((spec.num_elements + 1) // 2,)) for spec in schema.tensors
    ]
    return Layout(entries=(*scales, *codes), metadata=("delta", described.decode("utf-8")))


def expected_header(schema: Schema, codec: CodecConfig, unit_id: bytes) -> bytes:
    """Return the bytes that a container starts with: length and header.

    Raises:
        ValueError: the schema needs a longer header than `limits.MAX_CONTAINER_HEADER_BYTES`.
    """
    return _bounded_prefix(container_layout(schema, codec, unit_id))


def container_size(schema: Schema, codec: CodecConfig, unit_id: bytes) -> int:
    """Return the exact size of a container in bytes; every delta of the run has this size."""
    layout = container_layout(schema, codec, unit_id)
    return len(_bounded_prefix(layout)) + layout.data_bytes()


def write_container(path: Path, encoded: EncodedDelta, unit_id: bytes) -> None:
    """Write the delta of a unit to `path` and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(expected_header(encoded.schema, encoded.codec, unit_id))
        for part in encoded.data():
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


class Container:
    """A received delta whose size and header hold; its content is checked by `check_finite` and read in chunks.

    Holds no open file: see `PinnedFile`.
    """

    __slots__ = ("_data_start", "_file", "_starts", "codec", "schema", "unit_id")

    def __init__(self, file: PinnedFile, schema: Schema, codec: CodecConfig, unit_id: bytes, data_start: int) -> None:
        """`open` makes containers, after it has compared the `data_start` bytes before the data."""
        self.schema = schema
        self.codec = codec
        self.unit_id = unit_id
        self._file = file
        self._data_start = data_start
        self._starts = data_starts(schema, codec)

    @classmethod
    def open(cls, path: Path, schema: Schema, codec: CodecConfig, unit_id: bytes) -> Self:
        """Compare size, then header, with what schema, codec and unit imply.

        Raises:
            DeltaTruncated: the file is shorter.
            DeltaOversized: the file is longer.
            DeltaSchemaMismatch: a byte of the header differs.
        """
        layout = container_layout(schema, codec, unit_id)
        expected = _bounded_prefix(layout)
        size = len(expected) + layout.data_bytes()
        file = PinnedFile(path, DeltaTruncated)
        if file.size < size:
            raise DeltaTruncated(f"The delta has {file.size:,} bytes; the run's model implies exactly {size:,}.")
        if file.size > size:
            raise DeltaOversized(f"The delta has {file.size:,} bytes; the run's model implies exactly {size:,}.")
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
            DeltaCodeIllegal: a negative or subnormal scale, a nibble 0, non-zero padding, codes under a zero scale.
        """
        for spec in self.schema.tensors:
            for start, stop in chunk_ranges(spec.num_elements, 4 * DECODE_CHUNK):
                codes, scales = self.coded(spec.name, start, stop)
                check_scales(scales, spec.name)
                check_codes(codes, scales, stop - start, block=self.codec.block, name=spec.name)

    def content_digest(self) -> bytes:
        """Return the SHA-256 of codec, schema, scales and codes, streamed; equal to `EncodedDelta.content_digest()`."""
        return content_digest(self.schema, self.codec, self._data())

    def decode(self, name: str, start: int, stop: int) -> Floats:
        """Return elements [start, stop) of the flattened tensor, fp32; `start` must be the start of a block."""
        codes, scales = self.coded(name, start, stop)
        return decode(codes, scales, stop - start, block=self.codec.block)

    def tensor(self, name: str) -> Floats:
        """Return one whole tensor, fp32 in its shape."""
        (spec,) = (spec for spec in self.schema.tensors if spec.name == name)
        return self.decode(name, 0, spec.num_elements).reshape(spec.shape)

    def decoded_chunks(self) -> Iterator[Floats]:
        """Yield the decoded delta as flat fp32 chunks, tensor after tensor."""
        for spec in self.schema.tensors:
            for start, stop in chunk_ranges(spec.num_elements):
                yield self.decode(spec.name, start, stop)

    def coded(self, name: str, start: int, stop: int) -> tuple[Codes, Scales]:
        """Return codes and scales of elements [start, stop); `start` must be the start of a block."""
        block = self.codec.block
        if start % block or not 0 <= start <= stop <= self.schema.elements_of[name]:
            raise ValueError(f"elements {start} to {stop} of {name} are not a block-aligned range of the tensor")
        codes, scales = self._file.read(
            (self._data_start + self._starts[f"{name}.codes"] + start // 2, (stop - start + 1) // 2),
            (
                self._data_start + self._starts[f"{name}.scales"] + start // block * 2,
                self.codec.num_blocks(stop - start) * 2,
            ),
        )
        return codes, scales.view("<u2").astype(np.uint16, copy=False)

    def parts(self, *spans: tuple[int, int]) -> Sequence[Bytes]:
        """Return one array of bytes for each (offset, length) in the data section, laid out as `data_starts` says."""
        return self._file.read(*((self._data_start + offset, length) for offset, length in spans))

    def _data(self) -> Iterator[memoryview]:
        for offset in range(self._data_start, self._file.size, _HASH_CHUNK):
            (part,) = self._file.read((offset, min(_HASH_CHUNK, self._file.size - offset)))
            yield part.data


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
