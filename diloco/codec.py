"""The delta codec: from about one bit to eight bits a parameter, stateless, and replayable from the unit's seed.

Each block of elements of a flattened tensor shares one scale: `reach` times its mean magnitude over L, the run's
`levels`, rounded up to a bf16. An element x becomes floor(x / scale + u), held to [-L, L]. With L = 1 the codes are
trits; how they lie in bytes is `diloco.packing`'s business. The dither u is spread evenly over `width` around 1/2, in
2^16 steps k that the unit's "dither" stream draws:

    u = 1/2 + width * ((k + 1/2) / 2^16 - 1/2)

With a width of one and a reach that no element exceeds, the decoded value is x on the average over u. A narrower dither
and a shorter reach are far less noisy, and their errors hardly add up: the deltas of a merge differ by more than a
scale, so that each rounds the others' bias away. Nothing is remembered from one delta to the next, so there is no
hidden state, and whoever runs the unit again gets the same codes.

Blocks whose mean magnitude is below 2^-100 are stored as zero, and larger values than 2^60 are refused, so that no
decoded value is subnormal or can overflow: machines that flush subnormals to zero still agree.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from diloco.packing import CELL, MAX_LEVELS, Packed, Packing, Signed
from diloco.schema import Schema
from diloco.streams import Stream
from diloco.tables import Floats
from protocol.canonical import canonical_json
from protocol.errors import DeltaCodeIllegal, DeltaNotFinite

Scales = npt.NDArray[np.uint16]

DITHER: Final = "dither"
DEAD_ZONE: Final = "dead-zone"
"""How codes came about: by a seeded dither, on the way up; by `diloco.patch`, on the way down."""
DITHER_GROUP: Final = 1 << 16
"""Elements of a tensor that share one draw of the dither stream: step = tensor's index, sample = group's index."""
DECODE_CHUNK: Final = 1 << 18
"""Elements decoded at once by readers that stream; a multiple of every block size and of a cell."""
UNIT: Final = 256
"""One, in the units of `reach` and `width`."""
MAX_REACH: Final = 64 * UNIT
SMALLEST_MEAN: Final = np.float32(2.0**-100)
"""Mean magnitude below which a block is stored as zero."""
LARGEST: Final = np.float32(2.0**60)
"""Largest magnitude of a delta that is coded. What a merge and its momentum make of such deltas stays far below
`LARGEST_STEP`, so that no legal delta can keep a closed round from being published."""
LARGEST_STEP: Final = np.float32(2.0**100)
"""Largest magnitude of an outer step that is coded."""
SMALLEST_SCALE: Final = np.uint16(0x0600)
LARGEST_SCALE: Final = np.uint16(0x6100)
"""The bits of the bf16 numbers 2^-115 and 2^67: no scale of a delta that an encoder writes lies beyond."""
LARGEST_STEP_SCALE: Final = np.uint16(0x7180)
"""2^100, for patches."""
_DOMAIN: Final = b"commonweight/delta/v2\0"


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """How deltas are coded in a run.

    Args:
        kind: of the code.
        levels: codes are whole numbers from -levels to levels: 1 is ternary, 7 about four bits, 127 eight.
        block: elements that share a scale, a power of two.
        reach: the magnitude that the largest code stands for, in units of 2^-8 of the block's mean magnitude.
        width: of the dither, in units of 2^-8 of a scale: 0 rounds to the nearest, 256 is without bias.
    """

    kind: str
    levels: int
    block: int
    reach: int
    width: int

    def __post_init__(self) -> None:
        if self.kind not in (DITHER, DEAD_ZONE):
            raise ValueError(f"codec kind is {self.kind!r}; this version knows {DITHER!r} and {DEAD_ZONE!r}")
        if not 1 <= self.levels <= MAX_LEVELS:
            raise ValueError(f"codec levels is {self.levels}; it must be from 1 (ternary) to {MAX_LEVELS} (8 bits)")
        if not 16 <= self.block <= DITHER_GROUP or self.block & (self.block - 1):
            raise ValueError(f"codec block is {self.block}; it must be a power of two from 16 to {DITHER_GROUP}")
        if not UNIT <= self.reach <= MAX_REACH:
            raise ValueError(f"codec reach is {self.reach}; it must be from {UNIT} to {MAX_REACH} (in 2^-8)")
        if not 0 <= self.width <= UNIT:
            raise ValueError(f"codec width is {self.width}; it must be from 0 to {UNIT} (in 2^-8)")

    @cached_property
    def packing(self) -> Packing:
        """How codes lie in bytes."""
        return Packing(levels=self.levels)

    def num_blocks(self, elements: int) -> int:
        """Return how many scales a tensor of so many elements has."""
        return -(-elements // self.block)

    @property
    def alignment(self) -> int:
        """Parts of a tensor begin at multiples of this: at the start of a block and of a cell."""
        return max(self.block, CELL)

    @cached_property
    def share(self) -> np.float32:
        """A scale as a share of its block's mean magnitude: reach over levels."""
        share: np.float32 = np.divide(np.float32(self.reach / UNIT), np.float32(self.levels))
        return share

    def to_json(self) -> dict[str, object]:
        """Return the form that is hashed and written into containers."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDelta:
    """Packed codes (uint8) and scales (bf16 bits in uint16) of each tensor of a delta."""

    schema: Schema
    codec: CodecConfig
    codes: Mapping[str, Packed]
    scales: Mapping[str, Scales]

    def data(self) -> Iterator[memoryview]:
        """Yield the canonical content, in file order: every tensor's scales, then every tensor's codes."""
        for name in self.schema.names:
            yield self.scales[name].astype("<u2", copy=False).data.cast("B")
        for name in self.schema.names:
            yield self.codes[name].data

    def content_digest(self) -> bytes:
        """Return the SHA-256 that identifies this delta: of codec, schema, scales and codes."""
        return content_digest(self.schema, self.codec, self.data())

    def decoded(self) -> dict[str, Floats]:
        """Return every tensor decoded, fp32 in the schema's shapes."""
        return {
            spec.name: decode(self.codes[spec.name], self.scales[spec.name], spec.num_elements, codec=self.codec)
            .reshape(spec.shape)
            for spec in self.schema.tensors
        }  # fmt: skip

    def decoded_chunks(self) -> Iterator[Floats]:
        """Yield the decoded delta as flat fp32 chunks, tensor after tensor."""
        packing, block = self.codec.packing, self.codec.block
        for spec in self.schema.tensors:
            for start, stop in chunk_ranges(spec.num_elements):
                codes = self.codes[spec.name][packing.num_bytes(start) : packing.num_bytes(stop)]
                scales = self.scales[spec.name][start // block : -(-stop // block)]
                yield decode(codes, scales, stop - start, codec=self.codec)


def content_digest(schema: Schema, codec: CodecConfig, data: Iterable[memoryview]) -> bytes:
    """Return the SHA-256 of codec, schema and canonical content: a delta's identity, whatever file it is in."""
    described = canonical_json(codec.to_json())
    hasher = hashlib.sha256(_DOMAIN + len(described).to_bytes(8, "little") + described + schema.digest)
    for part in data:
        hasher.update(part)
    return hasher.digest()


def chunk_ranges(elements: int, chunk: int = DECODE_CHUNK) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) ranges of at most `chunk` elements."""
    for start in range(0, elements, chunk):
        yield start, min(start + chunk, elements)


def encode(delta: Mapping[str, Floats], schema: Schema, codec: CodecConfig, seed: bytes) -> EncodedDelta:
    """Encode a unit's delta with the dither of the unit's seed.

    Args:
        delta: fp32 arrays with the schema's names and shapes.
        seed: the unit's 32-byte seed.

    Raises:
        DeltaNotFinite: a value is NaN, infinite or beyond 2^60.
        ValueError: names, shapes or dtypes are not those of the schema.
    """
    if set(delta) != set(schema.names):
        raise ValueError("the delta's tensors are not those of the schema")
    stream = Stream(seed, "dither")
    codes: dict[str, Packed] = {}
    scales: dict[str, Scales] = {}
    for index, spec in enumerate(schema.tensors):
        tensor = delta[spec.name]
        if tensor.dtype != np.float32 or tensor.shape != spec.shape:
            raise ValueError(f"{spec.name} is {tensor.dtype}{tensor.shape}; the schema says float32{spec.shape}")
        flat = np.ascontiguousarray(tensor).reshape(-1)
        codes[spec.name], scales[spec.name] = _encode_tensor(flat, stream, index, codec, spec.name)
    return EncodedDelta(schema=schema, codec=codec, codes=codes, scales=scales)


def decode(codes: Packed, scales: Scales, elements: int, *, codec: CodecConfig) -> Floats:
    """Return `elements` fp32 values; `codes` and `scales` start at a multiple of `codec.alignment`.

    Every product is exact (7 bits times 8 significant ones), so all machines agree. Legality is `check_codes`'s
    business.
    """
    values: Floats = codec.packing.unpack(codes, elements).astype(np.float32)
    steps = bf16_to_f32(scales)
    block = codec.block
    whole = elements // block
    full = values[: whole * block].reshape(whole, block)
    np.multiply(full, steps[:whole, None], out=full)
    if whole * block < elements:
        tail = values[whole * block :]
        np.multiply(tail, steps[whole], out=tail)
    return values


def bf16_to_f32(bits: Scales) -> Floats:
    """Return the fp32 value of each bf16, exactly."""
    widened = bits.astype(np.uint32)
    np.left_shift(widened, 16, out=widened)
    return widened.view(np.float32)


def check_scales(scales: Scales, name: str, *, kind: str = DITHER) -> None:
    """Refuse scales that no encoder of this kind writes.

    Raises:
        DeltaNotFinite: NaN, infinite, or so large that a sum of deltas could overflow.
        DeltaCodeIllegal: negative, subnormal, or below the smallest that an encoder writes.
    """
    largest = LARGEST_SCALE if kind == DITHER else LARGEST_STEP_SCALE
    magnitude = scales & np.uint16(0x7FFF)
    if magnitude.size and np.max(magnitude) > largest:
        raise DeltaNotFinite(f"Tensor {name} of the delta holds a scale that is not finite or beyond any honest value.")
    # What remains is legal exactly if it is zero or at least the smallest: negatives wrap round to large numbers here.
    if np.any((scales != 0) & ((scales < SMALLEST_SCALE) | (scales > largest))):
        raise DeltaCodeIllegal(
            f"Tensor {name} of the delta holds a negative or subnormal scale; no encoder writes one."
        )


def check_codes(codes: Packed, scales: Scales, elements: int, *, codec: CodecConfig, name: str) -> None:
    """Refuse codes that no encoder writes; `codes` and `scales` start at a multiple of `codec.alignment`.

    Raises:
        DeltaCodeIllegal: a byte that stands for nothing, padding that is not zero, or a code under a zero scale.
    """
    packing = codec.packing
    if codes.size and np.max(codes) >= packing.values:
        raise DeltaCodeIllegal(f"Tensor {name} of the delta holds a byte that stands for no codes.")
    if np.any(packing.padding(codes, elements) != codec.levels):
        raise DeltaCodeIllegal(f"Tensor {name} of the delta has padding that is not zero.")
    silent = np.flatnonzero(scales == 0)
    if not silent.size:
        return
    numbers = packing.unpack(codes, elements)
    block = codec.block
    whole = elements // block
    rows_GB = numbers[: whole * block].reshape(whole, block)
    rest = numbers[whole * block :] if silent[-1] == whole else numbers[:0]
    if np.any(rows_GB[silent[silent < whole]]) or np.any(rest):
        raise DeltaCodeIllegal(f"Tensor {name} of the delta has codes other than zero under a scale of zero.")


def dither(stream: Stream, tensor: int, group: int, elements: int, width: int) -> Floats:
    """Return the dither u of a group's elements, fp32 in (0, 1).

    Args:
        stream: the unit's "dither" stream.
        tensor: the tensor's index in the schema.
        group: the index of the group of `DITHER_GROUP` elements within the tensor.
        width: of the codec.
    """
    uniform = stream.u16(tensor, group, elements).astype(np.float32)
    np.subtract(uniform, np.float32(2**15 - 0.5), out=uniform)
    np.multiply(uniform, np.float32(width * 2.0**-24), out=uniform)
    return np.add(uniform, np.float32(0.5), out=uniform)


def _encode_tensor(flat: Floats, stream: Stream, tensor: int, codec: CodecConfig, name: str) -> tuple[Packed, Scales]:
    packing = codec.packing
    codes = np.empty(packing.num_bytes(flat.size), dtype=np.uint8)
    scales = np.empty(codec.num_blocks(flat.size), dtype=np.uint16)
    for group, (start, stop) in enumerate(chunk_ranges(flat.size, DITHER_GROUP)):
        x_GB = in_blocks(flat[start:stop], codec.block)
        bits = _scale_bits(x_GB, stop - start, codec, name)
        uniform = dither(stream, tensor, group, x_GB.size, codec.width).reshape(x_GB.shape)
        numbers = _quantise(x_GB, bits, uniform, codec.levels).reshape(-1)[: stop - start]
        scales[start // codec.block : start // codec.block + len(x_GB)] = bits
        codes[packing.num_bytes(start) : packing.num_bytes(stop)] = packing.pack(numbers)
    return codes, scales


def in_blocks(flat: Floats, block: int) -> Floats:
    """Return the values in rows of `block`, the last one filled up with zeros; no copy if none is needed."""
    blocks = -(-flat.size // block)
    if flat.size < blocks * block:
        padded = np.zeros(blocks * block, dtype=np.float32)
        padded[: flat.size] = flat
        flat = padded
    return flat.reshape(blocks, block)


def mean_rows(values_GB: Floats, elements: int) -> Floats:
    """Return the mean of each row of `in_blocks`: a sum by halves, the same bits on every machine.

    Args:
        elements: how many the rows hold together, without what the last one is filled up with.
    """
    size_G = np.full(len(values_GB), values_GB.shape[1], dtype=np.float32)
    size_G[-1] = elements - (len(values_GB) - 1) * values_GB.shape[1]
    return np.divide(sum_rows(values_GB), size_G)


def sum_rows(values_GB: Floats) -> Floats:
    """Add up each row by halves; rows are a power of two long."""
    while values_GB.shape[1] > 1:
        half = values_GB.shape[1] // 2
        values_GB = np.add(values_GB[:, :half], values_GB[:, half:])
    return values_GB[:, 0]


def _scale_bits(x_GB: Floats, elements: int, codec: CodecConfig, name: str) -> Scales:
    magnitude_GB = np.abs(x_GB)
    if not np.max(magnitude_GB) <= LARGEST:  # NaN is not <= anything
        raise DeltaNotFinite(f"Tensor {name} of the delta holds a value that is not finite or is beyond 2^60.")
    mean = mean_rows(magnitude_GB, elements)
    return np.where(mean < SMALLEST_MEAN, np.uint16(0), bf16_upward(np.multiply(mean, codec.share)))


def bf16_upward(values: Floats) -> Scales:
    """Round non-negative fp32 up to bf16, by integer arithmetic on the bits; a zero stays one."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _quantise(x_GB: Floats, bits: Scales, uniform_GB: Floats, levels: int) -> Signed:
    """Return floor(x / scale + u) within the levels as int8, each operation a separate fp32 one."""
    steps = np.where(bits == 0, np.float32(1.0), bf16_to_f32(bits))
    values = np.divide(x_GB, steps[:, None])
    np.add(values, uniform_GB, out=values)
    np.floor(values, out=values)
    np.clip(values, np.float32(-levels), np.float32(levels), out=values)
    return values.astype(np.int8)
