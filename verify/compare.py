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

from diloco.codec import DITHER_GROUP, ZERO_PAIR, Codes, EncodedDelta, Scales, bf16_to_f32, chunk_ranges
from diloco.container import Container
from diloco.streams import Stream
from diloco.tables import Floats
from protocol.documents import Verification

_SLACK: Final = 2.0**-19
"""In units of a scale: how far the encoder's fp32 roundings of x / scale + u may move the edge of an interval."""
_SILENT: Final = 2.0**-100
"""The encoder writes a block below this as zero."""
_LEVELS: Final = 7.0

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

    Each element of x is confined by its code, its scale and its dither; and in each block one element must be large
    enough for the block's scale. Where no element's code allows that, no encoder wrote the block: then the element that
    is nearest to it counts as moved there, whatever its code. Always finite.

    Args:
        theirs: must have passed `check_finite`.
        raw: the referee's own delta before it was encoded, fp32, in the schema's shapes.
        seed: the unit's 32-byte seed.
    """
    stream = Stream(seed, "dither")
    block = theirs.codec.block
    distance2, norm2 = [], []
    for index, spec in enumerate(theirs.schema.tensors):
        flat = np.ascontiguousarray(raw[spec.name]).reshape(-1).astype(np.float64)
        for group, (start, stop) in enumerate(chunk_ranges(spec.num_elements, DITHER_GROUP)):
            codes, scales = theirs.coded(spec.name, start, stop)
            size = scales.size * block
            dither = (stream.u16(index, group, size).astype(np.float64) + 0.5) * 2.0**-16
            raw_GB = _padded(flat[start:stop], size).reshape(-1, block)
            code_GB = _unpacked(codes, size).reshape(-1, block)
            inside = _padded(np.ones(stop - start), size).reshape(-1, block) > 0.0
            distance2.append(_group_distance2(raw_GB, code_GB, scales, dither.reshape(-1, block), inside))
            norm2.append(float(np.sum(raw_GB**2)))
    return math.sqrt(_relative(math.fsum(distance2), math.fsum(norm2)))


def _relative(distance2: float, norm2: float) -> float:
    # A delta of zeros has no scale to measure by; the smallest that the codec knows keeps the ratio finite.
    return distance2 / max(norm2, _SILENT**2)


def _padded(values: _Reals, size: int) -> _Reals:
    if values.size == size:
        return values
    longer = np.zeros(size)
    longer[: values.size] = values
    return longer


def _unpacked(codes: Codes, size: int) -> _Reals:
    """Return the codes, -7 to 7, filled up with zeros."""
    pairs = np.full(size // 2, ZERO_PAIR, dtype=np.uint8)
    pairs[: codes.size] = codes
    return np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1).astype(np.float64) - 8.0


def _group_distance2(
    raw_GB: _Reals, code_GB: _Reals, scales: Scales, dither_GB: _Reals, inside_GB: npt.NDArray[np.bool_]
) -> float:
    """Return the squared distance from `raw_GB` to the nearest values that would have been encoded to these blocks."""
    steps_G = bf16_to_f32(scales).astype(np.float64)[:, None]
    # floor(x / s + u) = q confines x to [(q - u) s, (q + 1 - u) s); the block's largest magnitude is at most 7 s.
    most_G = _LEVELS * (1.0 + _SLACK) * steps_G
    low_GB = np.maximum((code_GB - dither_GB - _SLACK) * steps_G, -most_G)
    high_GB = np.minimum((code_GB + 1.0 - dither_GB + _SLACK) * steps_G, most_G)
    silent_G = steps_G == 0.0
    low_GB = np.where(inside_GB, np.where(silent_G, -_SILENT, low_GB), 0.0)
    high_GB = np.where(inside_GB, np.where(silent_G, _SILENT, high_GB), 0.0)
    nearest_GB = np.clip(raw_GB, low_GB, high_GB)
    cost_GB = (nearest_GB - raw_GB) ** 2
    # The scale is the smallest bf16 that is at least largest / 7: some element lies above 7 times the bf16 before it.
    needed_G = np.where(silent_G, 0.0, _LEVELS * (1.0 - _SLACK) * _bf16_before(scales)[:, None])
    short = np.flatnonzero(np.max(np.abs(nearest_GB), axis=1) < needed_G[:, 0])
    extra = [
        _reach_cost(raw_GB[i], cost_GB[i], low_GB[i], high_GB[i], float(needed_G[i, 0]), inside_GB[i]) for i in short
    ]
    return float(np.sum(cost_GB)) + math.fsum(extra)


def _bf16_before(scales: Scales) -> _Reals:
    before = np.where(scales > 0, scales, 1).astype(np.uint16) - np.uint16(1)
    return bf16_to_f32(before).astype(np.float64)


def _reach_cost(
    raw_B: _Reals, cost_B: _Reals, low_B: _Reals, high_B: _Reals, needed: float, inside_B: npt.NDArray[np.bool_]
) -> float:
    """Return the least extra squared distance for one element of a block to have the magnitude that its scale needs."""
    upward = np.where(inside_B & (high_B >= needed), (needed - raw_B) ** 2 - cost_B, np.inf)
    downward = np.where(inside_B & (low_B <= -needed), (-needed - raw_B) ** 2 - cost_B, np.inf)
    least = min(float(np.min(upward)), float(np.min(downward)))
    if math.isinf(least):
        least = float(np.min(np.where(inside_B, (needed - np.abs(raw_B)) ** 2 - cost_B, np.inf)))
    return max(0.0, least)
