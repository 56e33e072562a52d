"""The delta codec `dither4`: four bits a parameter, unbiased, stateless, and replayable from the unit's seed.

Each block of 256 elements of a flattened tensor shares one scale, its largest magnitude over 7 rounded up to a bf16. An
element x becomes floor(x / scale + u), an integer in [-7, 7], with u = (k + 1/2) / 2^16 drawn from the unit's "dither"
stream. Averaged over u the decoded value is x (within 2^-17 scales), so no error feedback, and so no hidden state, is
needed. Stored: code + 8, two in a byte, the first in the low half. When a tensor's element count is odd, the last high
half is padding and must be 8, the code of zero.

Blocks below 2^-100 are stored as zero, and larger values than 2^100 are refused, so that no decoded value is subnormal
or can overflow: machines that flush subnormals to zero still agree.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from diloco.schema import Schema
from diloco.streams import Stream
from diloco.tables import Floats
from protocol.canonical import canonical_json
from protocol.errors import DeltaCodeIllegal, DeltaNotFinite

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.uint16]

KIND: Final = "dither4"
ZERO_CODE: Final = 8
ZERO_PAIR: Final = 0x88
DITHER_GROUP: Final = 1 << 16
"""Elements of a tensor that share one draw of the dither stream: step = tensor's index, sample = group's index."""
DECODE_CHUNK: Final = 1 << 18
"""Elements decoded at once by readers that stream; a multiple of every block size."""
_LEVELS: Final = np.float32(7.0)
_SMALLEST: Final = np.float32(2.0**-100)
_LARGEST: Final = np.float32(2.0**100)
_DOMAIN: Final = b"commonweight/delta/v1\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecConfig:
    """How deltas are coded in a run: the kind of code, and the elements that share a scale (a power of two)."""

    kind: str
    block: int

    def __post_init__(self) -> None:
        if self.kind != KIND:
            raise ValueError(f"codec kind is {self.kind!r}; this version knows only {KIND!r}")
        if not 16 <= self.block <= DITHER_GROUP or self.block & (self.block - 1):
            raise ValueError(f"codec block is {self.block}; it must be a power of two from 16 to {DITHER_GROUP}")

    def num_blocks(self, elements: int) -> int:
        """Return how many scales a tensor of so many elements has."""
        return -(-elements // self.block)

    def to_json(self) -> dict[str, object]:
        """Return the form that is hashed and written into containers."""
        return {"kind": self.kind, "block": self.block}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedDelta:
    """Codes (uint8, two in a byte) and scales (bf16 bits in uint16) of each tensor of a delta."""

    schema: Schema
    codec: CodecConfig
    codes: Mapping[str, Codes]
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
            spec.name: decode(self.codes[spec.name], self.scales[spec.name], spec.num_elements, block=self.codec.block)
            .reshape(spec.shape)
            for spec in self.schema.tensors
        }  # fmt: skip

    def decoded_chunks(self) -> Iterator[Floats]:
        """Yield the decoded delta as flat fp32 chunks, tensor after tensor."""
        block = self.codec.block
        for spec in self.schema.tensors:
            for start, stop in chunk_ranges(spec.num_elements):
                codes = self.codes[spec.name][start // 2 : (stop + 1) // 2]
                scales = self.scales[spec.name][start // block : -(-stop // block)]
                yield decode(codes, scales, stop - start, block=block)


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
        DeltaNotFinite: a value is NaN, infinite or beyond 2^100.
        ValueError: names, shapes or dtypes are not those of the schema.
    """
    if set(delta) != set(schema.names):
        raise ValueError("the delta's tensors are not those of the schema")
    stream = Stream(seed, "dither")
    codes: dict[str, Codes] = {}
    scales: dict[str, Scales] = {}
    for index, spec in enumerate(schema.tensors):
        tensor = delta[spec.name]
        if tensor.dtype != np.float32 or tensor.shape != spec.shape:
            raise ValueError(f"{spec.name} is {tensor.dtype}{tensor.shape}; the schema says float32{spec.shape}")
        flat = np.ascontiguousarray(tensor).reshape(-1)
        codes[spec.name], scales[spec.name] = _encode_tensor(flat, stream, index, codec, spec.name)
    return EncodedDelta(schema=schema, codec=codec, codes=codes, scales=scales)


def decode(codes: Codes, scales: Scales, elements: int, *, block: int) -> Floats:
    """Return `elements` fp32 values; `codes` and `scales` start at the boundary of a block.

    Every product is exact (a 3-bit integer times 8 significant bits), so all machines agree. Legality is
    `check_codes`'s business; an illegal nibble 0 decodes as -8.
    """
    pairs = np.empty(codes.size, dtype=np.uint64)
    # mode="clip" only tells numpy that it need not buffer: a byte is always within a table of 256.
    np.take(_PAIRS, codes, out=pairs, mode="clip")
    values: Floats = pairs.view(np.float32)[:elements]
    steps = bf16_to_f32(scales)
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


def check_scales(scales: Scales, name: str) -> None:
    """Refuse scales that no encoder writes.

    Raises:
        DeltaNotFinite: NaN, infinite, or so large that a sum of deltas could overflow.
        DeltaCodeIllegal: negative, subnormal, or below the smallest that an encoder writes.
    """
    magnitude = scales & np.uint16(0x7FFF)
    if magnitude.size and np.max(magnitude) > _MAX_SCALE_BITS:
        raise DeltaNotFinite(f"Tensor {name} of the delta holds a scale that is not finite or beyond any honest value.")
    # What remains is legal exactly if it is zero or at least the smallest: negatives wrap round to large numbers here.
    if np.any((scales != 0) & ((scales < _MIN_SCALE_BITS) | (scales > _MAX_SCALE_BITS))):
        raise DeltaCodeIllegal(
            f"Tensor {name} of the delta holds a negative or subnormal scale; no encoder writes one."
        )


def check_codes(codes: Codes, scales: Scales, elements: int, *, block: int, name: str) -> None:
    """Refuse codes that no encoder writes; `codes` and `scales` start at the boundary of a block.

    Raises:
        DeltaCodeIllegal: a nibble 0, a padding nibble that is not 8, or a code other than 8 under a zero scale.
    """
    if np.any(codes < 16) or np.any((codes & 15) == 0):
        raise DeltaCodeIllegal(f"Tensor {name} of the delta holds the code -8, which no encoder writes.")
    if elements % 2 and codes[-1] >> 4 != ZERO_CODE:
        raise DeltaCodeIllegal(f"Tensor {name} of the delta ends in padding that is not zero.")
    silent = scales == 0
    if not np.any(silent):
        return
    half = block // 2
    whole = codes.size // half
    rows_GH = codes[: whole * half].reshape(whole, half)
    rest = codes[whole * half :] if silent.size > whole and silent[-1] else codes[:0]
    if np.any(rows_GH[silent[:whole]] != ZERO_PAIR) or np.any(rest != ZERO_PAIR):
        raise DeltaCodeIllegal(f"Tensor {name} of the delta has codes other than zero under a scale of zero.")


def _encode_tensor(flat: Floats, stream: Stream, tensor: int, codec: CodecConfig, name: str) -> tuple[Codes, Scales]:
    codes = np.empty((flat.size + 1) // 2, dtype=np.uint8)
    scales = np.empty(codec.num_blocks(flat.size), dtype=np.uint16)
    for group, (start, stop) in enumerate(chunk_ranges(flat.size, DITHER_GROUP)):
        blocks = codec.num_blocks(stop - start)
        padded = flat[start:stop]
        if padded.size < blocks * codec.block:
            padded = np.zeros(blocks * codec.block, dtype=np.float32)
            padded[: stop - start] = flat[start:stop]
        x_GB = padded.reshape(blocks, codec.block)
        bits = _scale_bits(x_GB, name)
        dither = stream.u16(tensor, group, x_GB.size).reshape(x_GB.shape)
        packed = _pack(_quantise(x_GB, bits, dither), stop - start)
        scales[start // codec.block : start // codec.block + blocks] = bits
        codes[start // 2 : (stop + 1) // 2] = packed[: (stop - start + 1) // 2]
    return codes, scales


def _scale_bits(x_GB: Floats, name: str) -> Scales:
    largest = np.maximum(np.max(x_GB, axis=1), -np.min(x_GB, axis=1))
    if not np.all(largest <= _LARGEST):  # NaN is not <= anything
        raise DeltaNotFinite(f"Tensor {name} of the delta holds a value that is not finite or is beyond 2^100.")
    return np.where(largest < _SMALLEST, np.uint16(0), _bf16_upward(largest / _LEVELS))


def _bf16_upward(values: Floats) -> Scales:
    """Round non-negative fp32 up to bf16, by integer arithmetic on the bits."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _quantise(x_GB: Floats, bits: Scales, dither: npt.NDArray[np.uint16]) -> Codes:
    """Return floor(x / scale + u) + 8 as uint8, each operation a separate fp32 one."""
    steps = np.where(bits == 0, np.float32(1.0), bf16_to_f32(bits))
    uniform = dither.astype(np.float32)
    np.add(uniform, np.float32(0.5), out=uniform)
    np.multiply(uniform, np.float32(2.0**-16), out=uniform)
    values = np.divide(x_GB, steps[:, None])
    np.add(values, uniform, out=values)
    # |x / scale| <= 7 (1 + 2^-23) and u is in [2^-17, 1 - 2^-17], so the floor is within [-7, 7] without clipping.
    np.floor(values, out=values)
    np.add(values, np.float32(ZERO_CODE), out=values)
    return values.astype(np.uint8)


def _pack(stored: Codes, elements: int) -> Codes:
    flat = stored.reshape(-1)
    flat[elements:] = ZERO_CODE
    pairs = flat.view("<u2")
    packed: Codes = (pairs | (pairs >> 4)).astype(np.uint8)
    return packed


def _pair_table() -> npt.NDArray[np.uint64]:
    byte = np.arange(256, dtype=np.uint32)
    values = np.stack([byte & 15, byte >> 4], axis=1).astype(np.float32) - np.float32(ZERO_CODE)
    return values.reshape(-1).view(np.uint64)


_PAIRS: Final = _pair_table()
_MIN_SCALE_BITS: Final = int(_bf16_upward(np.array([_SMALLEST / _LEVELS], dtype=np.float32))[0])
_MAX_SCALE_BITS: Final = int(_bf16_upward(np.array([_LARGEST / _LEVELS], dtype=np.float32))[0])
