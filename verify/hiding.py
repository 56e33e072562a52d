"""How far a cheat can move what is merged while every code stays explicable: the room that dither and tolerance leave.

An element whose raw value lies just below a rounding boundary of its own dither gets the next code for an arbitrarily
small raw difference. A poisoner who knows the dither, as everybody does, moves those codes first. `hide` finds the set
of moves that carries the decoded delta furthest in a direction for a given budget, so it is what a tolerance must be
judged by: no attack of this kind does better.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from diloco.codec import (
    DITHER_GROUP,
    ZERO_CODE,
    CodecConfig,
    Codes,
    EncodedDelta,
    Scales,
    bf16_to_f32,
    chunk_ranges,
    encode,
)
from diloco.schema import Schema
from diloco.streams import Stream
from diloco.tables import Floats

_LEVELS: Final = 7
_EXPONENT: Final = np.uint16(1 << 7)
"""Added to the bits of a bf16, it doubles the number."""
_LARGEST_SHARE: Final = 1.0 - 2.0**-6
"""Above this share of 7 scales an element may be the one that its block's scale follows from."""
_HALVINGS: Final = 20
_TINY: Final = 1e-300

_Reals = npt.NDArray[np.float64]
_Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a poisoner may spend, relative to the honest delta, and `hide` never exceeds.

    raw: norm of the raw difference that explains the moved codes, over the norm of the honest raw delta.
    code: squared norm of the decoded difference, over the squared norm of the honest decoded delta; None for no bound.
    """

    raw: float
    code: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spending:
    """What each element's move costs in one currency, and how much of it there is."""

    costs: _Reals
    budget: float


def hide(
    own: Mapping[str, Floats],
    direction: Mapping[str, Floats],
    schema: Schema,
    codec: CodecConfig,
    seed: bytes,
    room: Room,
) -> EncodedDelta:
    """Return the honest delta's codes, each moved by at most one, furthest in `direction` for what `room` allows.

    A move costs the squared distance of the raw value to its boundary, and the square of its scale in decoded distance;
    it gains its scale times the direction's component there. What comes out is the best there is, but for the last
    move that a budget leaves no room for.

    Args:
        own: the honest raw delta.
        direction: in the same shapes; its length does not matter.
        seed: the unit's seed, which the dither comes from.
    """
    honest = encode(own, schema, codec, seed)
    codes, steps, dither = _flat(honest, seed)
    x = _joined(own, schema)
    wanted = np.sign(_joined(direction, schema)).astype(np.int64)
    moved = codes + wanted
    # Distance from x to the interval of the next code: floor(x / s + u) = q confines x to [(q - u) s, (q + 1 - u) s).
    edge = np.where(wanted > 0, moved - dither, moved + 1.0 - dither) * steps
    gain = steps * np.abs(_joined(direction, schema))
    # The element that a block's scale was made for must stay: without it no encoder would have chosen that scale.
    gain[(np.abs(moved) > _LEVELS) | (np.abs(x) >= _LARGEST_SHARE * _LEVELS * steps)] = 0.0
    decoded2 = float(np.sum((codes * steps) ** 2))
    chosen = _best(
        gain,
        _Spending(costs=(edge - x) ** 2, budget=room.raw**2 * float(np.sum(x**2))),
        _Spending(costs=steps**2, budget=math.inf if room.code is None else room.code * decoded2),
    )
    return _with_codes(honest, np.where(chosen, moved, codes))


def encode_coarsely(
    own: Mapping[str, Floats], schema: Schema, codec: CodecConfig, seed: bytes, *, doublings: int
) -> EncodedDelta:
    """Return the delta coded with scales 2^doublings too large: every code explicable, and more noise than need be."""
    honest = encode(own, schema, codec, seed)
    coarse = {
        name: np.where(scales == 0, scales, scales + np.uint16(doublings) * _EXPONENT).astype(np.uint16)
        for name, scales in honest.scales.items()
    }
    widened = EncodedDelta(schema=schema, codec=codec, codes=honest.codes, scales=coarse)
    _, steps, dither = _flat(widened, seed)
    safe = np.where(steps == 0, 1.0, steps)
    codes = np.where(steps == 0, 0, np.floor(_joined(own, schema) / safe + dither)).astype(np.int64)
    return _with_codes(widened, codes)


def _best(gain: _Reals, raw: _Spending, code: _Spending) -> npt.NDArray[np.bool_]:
    """Choose the moves of most gain within both budgets.

    The best set takes moves by gain over a mixture of the two costs (Lagrange). The right mixture spends both budgets
    at once, unless one is too large to be spent; it is found by bisection.
    """
    chosen, short_of_code = _affordable(gain, raw, code, 0.0)
    if not short_of_code:
        return chosen
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        candidate, short_of_code = _affordable(gain, raw, code, share)
        low, high = (share, high) if short_of_code else (low, share)
        if float(np.sum(gain[candidate])) > float(np.sum(gain[chosen])):
            chosen = candidate
    return chosen


def _affordable(gain: _Reals, raw: _Spending, code: _Spending, share: float) -> tuple[npt.NDArray[np.bool_], bool]:
    """Take moves by gain over cost until a budget is spent; say whether it was the code budget.

    Args:
        share: from 0, where only the raw cost counts, to 1, where only the decoded one does.
    """
    cost = (1.0 - share) * raw.costs / raw.budget
    if share:
        cost += share * code.costs / code.budget
    useful = np.flatnonzero(gain > 0)
    order = useful[np.argsort(-gain[useful] / np.maximum(cost[useful], _TINY), kind="stable")]
    raw_left = np.cumsum(raw.costs[order]) <= raw.budget
    code_left = np.cumsum(code.costs[order]) <= code.budget
    chosen = np.zeros(gain.size, dtype=np.bool_)
    chosen[order[raw_left & code_left]] = True
    return chosen, int(np.sum(code_left)) < int(np.sum(raw_left))


def _flat(encoded: EncodedDelta, seed: bytes) -> tuple[_Whole, _Reals, _Reals]:
    """Return code (-7 to 7), scale and dither (0 to 1) of every element, tensor after tensor."""
    stream = Stream(seed, "dither")
    block = encoded.codec.block
    codes, steps, dither = [], [], []
    for index, spec in enumerate(encoded.schema.tensors):
        size = spec.num_elements
        pairs = encoded.codes[spec.name]
        codes.append(np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:size].astype(np.int64) - ZERO_CODE)
        steps.append(np.repeat(bf16_to_f32(encoded.scales[spec.name]).astype(np.float64), block)[:size])
        for group, (start, stop) in enumerate(chunk_ranges(size, DITHER_GROUP)):
            padded = encoded.codec.num_blocks(stop - start) * block
            drawn = stream.u16(index, group, padded)[: stop - start]
            dither.append((drawn.astype(np.float64) + 0.5) * 2.0**-16)
    return np.concatenate(codes), np.concatenate(steps), np.concatenate(dither)


def _joined(delta: Mapping[str, Floats], schema: Schema) -> _Reals:
    return np.concatenate([delta[name].reshape(-1) for name in schema.names]).astype(np.float64)


def _with_codes(encoded: EncodedDelta, codes: _Whole) -> EncodedDelta:
    packed: dict[str, Codes] = {}
    scales: dict[str, Scales] = dict(encoded.scales)
    start = 0
    for spec in encoded.schema.tensors:
        stored = np.full(spec.num_elements + spec.num_elements % 2, ZERO_CODE, dtype=np.uint8)
        stored[: spec.num_elements] = codes[start : start + spec.num_elements] + ZERO_CODE
        packed[spec.name] = (stored[0::2] | (stored[1::2] << 4)).astype(np.uint8)
        start += spec.num_elements
    return EncodedDelta(schema=encoded.schema, codec=encoded.codec, codes=packed, scales=scales)
