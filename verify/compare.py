"""How far two results of one unit are apart, and whether that is too far.

A referee who trained a unit itself has the raw delta that the uploaded codes should stem from. Comparing decoded codes
alone would be coarse: the dither turns float noise into flips of whole codes. But seed and scale of the dither are
known, so every code says in which interval its raw value must have lain. The least raw difference is the distance from
the referee's raw delta to the nearest delta that would have been encoded to exactly the uploaded bytes. For an honest
volunteer it is at most the true difference between the two trainings; and a poison has only the room that the tolerance
gives, wherever in the dither it hides.

None of this is canonical: a verdict's margins are far wider than a rounding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from diloco.codec import (
    DITHER_GROUP,
    SMALLEST_MEAN,
    CodecConfig,
    EncodedDelta,
    Scales,
    bf16_to_f32,
    chunk_ranges,
    dither,
)
from diloco.container import Container
from diloco.streams import Stream
from diloco.tables import Floats
from protocol.documents import Verification

_SLACK: Final = 2.0**-18
"""In units of a scale: how far the encoder's fp32 roundings of x / scale + u may move the edge of an interval, with 64
levels and more; with fewer it is less. And how far, of itself, those of a mean may move it."""
_Reals = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two differences between a claim and a replay of its unit; both count relative to the replay.

    raw_difference: norm of the least raw difference, over the norm of the raw delta.
    code_difference: D, the squared distance of the decoded deltas over the squared norm of the replay's.
    """

    raw_difference: float
    code_difference: float


def compare(theirs: Container, own: EncodedDelta, raw: Mapping[str, Floats], seed: bytes) -> Comparison:
    """Compare an uploaded delta with a referee's own encoded and raw one.

    Args:
        theirs: must have passed `check_finite`.
        own: the referee's delta, encoded with the dither of the unit's seed.
        raw: the same before it was encoded, fp32, in the schema's shapes.
        seed: the unit's 32-byte seed.
    """
    return Comparison(
        raw_difference=least_raw_difference(theirs, raw, seed), code_difference=code_difference(theirs, own)
    )


def judge(comparison: Comparison, v: Verification) -> Literal["confirmed", "refuted"]:
    """Return a referee's finding: "confirmed" if both differences are within the run's tolerances."""
    within = comparison.raw_difference <= v.tolerance and comparison.code_difference <= v.code_tolerance
    return "confirmed" if within else "refuted"


def code_difference(theirs: Container, own: EncodedDelta) -> float:
    """Return D = |Q(a) - Q(b)|^2 / |Q(b)|^2 of decoded deltas, b being the own one."""
    distance2, norm2 = [], []
    for a, b in zip(theirs.decoded_chunks(), own.decoded_chunks(), strict=True):
        b64 = b.astype(np.float64)
        distance2.append(float(np.sum((a - b64) ** 2)))
        norm2.append(float(np.sum(b64**2)))
    return _relative(math.fsum(distance2), math.fsum(norm2))


def sketch_difference(a: Floats, b: Floats) -> float:
    """Return the estimate of D from two sketches under one seed, b's delta being the one that D is relative to."""
    b64 = b.astype(np.float64)
    return _relative(math.fsum(((a - b64) ** 2).tolist()), math.fsum((b64**2).tolist()))


def least_raw_difference(theirs: Container, raw: Mapping[str, Floats], seed: bytes) -> float:
    """Return |x - raw| / |raw| for the delta x nearest to `raw` that would be encoded to exactly the codes of `theirs`.

    Each element of x is confined by its code, its scale and its dither. And each block's mean magnitude is confined by
    its scale: to move a mean of n magnitudes by c takes a distance of at least c times the root of n. Of a block the
    larger of the two distances counts, so it is a lower bound, which an honest delta is never above. Always finite.

    Args:
        theirs: must have passed `check_finite`.
        raw: the referee's own delta before it was encoded, fp32, in the schema's shapes.
        seed: the unit's 32-byte seed.
    """
    stream = Stream(seed, "dither")
    codec = theirs.codec
    block = codec.block
    distance2, norm2 = [], []
    for index, spec in enumerate(theirs.schema.tensors):
        flat = np.ascontiguousarray(raw[spec.name]).reshape(-1).astype(np.float64)
        for group, (start, stop) in enumerate(chunk_ranges(spec.num_elements, DITHER_GROUP)):
            codes, scales = theirs.coded(spec.name, start, stop)
            size = scales.size * block
            numbers = codec.packing.unpack(codes, stop - start).astype(np.float64)
            blocks = _Group(
                raw=_padded(flat[start:stop], size).reshape(-1, block),
                codes=_padded(numbers, size).reshape(-1, block),
                dither=dither(stream, index, group, size, codec.width).astype(np.float64).reshape(-1, block),
                inside=_padded(np.ones(stop - start), size).reshape(-1, block) > 0.0,
            )
            distance2.append(_group_distance2(blocks, scales, codec))
            norm2.append(float(np.sum(blocks.raw**2)))
    return math.sqrt(_relative(math.fsum(distance2), math.fsum(norm2)))


def _relative(distance2: float, norm2: float) -> float:
    # A delta of zeros has no scale to measure by; the smallest that the codec knows keeps the ratio finite.
    return distance2 / max(norm2, float(SMALLEST_MEAN) ** 2)


def _padded(values: _Reals, size: int) -> _Reals:
    if values.size == size:
        return values
    longer = np.zeros(size)
    longer[: values.size] = values
    return longer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Blocks of a tensor, [G, block]: the referee's raw values, the claimed codes, the dither, what is no filling."""

    raw: _Reals
    codes: _Reals
    dither: _Reals
    inside: npt.NDArray[np.bool_]


def _group_distance2(group: _Group, scales: Scales, codec: CodecConfig) -> float:
    """Return the squared distance from the raw values to the nearest ones that would have been encoded to the codes."""
    levels = float(codec.levels)
    steps_G = bf16_to_f32(scales).astype(np.float64)[:, None]
    # floor(x / s + u) = q confines x to [(q - u) s, (q + 1 - u) s); the largest codes stand for all that is beyond.
    edge_GB = group.codes - group.dither
    low_GB = np.where(group.codes <= -levels, -np.inf, (edge_GB - _SLACK) * steps_G)
    high_GB = np.where(group.codes >= levels, np.inf, (edge_GB + 1.0 + _SLACK) * steps_G)
    # Where the mean is next to nothing, so is every element.
    silent_GB = np.broadcast_to(steps_G == 0.0, group.raw.shape)
    least = float(SMALLEST_MEAN) * codec.block
    low_GB[silent_GB], high_GB[silent_GB] = -least, least
    low_GB[~group.inside], high_GB[~group.inside] = -np.inf, np.inf
    by_codes_G = np.sum((np.clip(group.raw, low_GB, high_GB) - group.raw) ** 2, axis=1)
    return math.fsum(np.maximum(by_codes_G, _by_means(group, scales, codec)).tolist())


def _by_means(group: _Group, scales: Scales, codec: CodecConfig) -> _Reals:
    """Return the squared distance of each block to the nearest values whose mean magnitude gives its scale."""
    count_G = np.sum(group.inside, axis=1)
    mean_G = np.sum(np.abs(group.raw), axis=1) / count_G
    share = float(codec.share)
    low_G = np.maximum(bf16_to_f32(_before(scales)).astype(np.float64) / share, float(SMALLEST_MEAN))
    high_G = bf16_to_f32(scales).astype(np.float64) / share
    silent_G = scales == 0
    low_G[silent_G], high_G[silent_G] = 0.0, float(SMALLEST_MEAN)
    nearest_G = np.clip(mean_G, low_G * (1.0 - _SLACK), high_G * (1.0 + _SLACK))
    distance2_G: _Reals = (nearest_G - mean_G) ** 2 * count_G
    return distance2_G


def _before(scales: Scales) -> Scales:
    """Return the bf16 before each scale; of zero, the smallest."""
    return np.where(scales > 0, scales, 1).astype(np.uint16) - np.uint16(1)
