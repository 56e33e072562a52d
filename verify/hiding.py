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

from diloco.codec import DITHER_GROUP, CodecConfig, EncodedDelta, Scales, bf16_to_f32, chunk_ranges, dither, encode
from diloco.packing import Packed
from diloco.schema import Schema
from diloco.streams import Stream
from diloco.tables import Floats

_EXPONENT: Final = np.uint16(1 << 7)
"""Added to the bits of a bf16, it doubles the number."""
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
    codes, steps, uniform = _flat(honest, seed)
    x = _joined(own, schema)
    wanted = np.sign(_joined(direction, schema)).astype(np.int64)
    moved = codes + wanted
    # Distance from x to the interval of the next code: floor(x / s + u) = q confines x to [(q - u) s, (q + 1 - u) s).
    edge = np.where(wanted > 0, moved - uniform, moved + 1.0 - uniform) * steps
    gain = steps * np.abs(_joined(direction, schema))
    gain[np.abs(moved) > codec.levels] = 0.0
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
    _, steps, uniform = _flat(widened, seed)
    safe = np.where(steps == 0, 1.0, steps)
    codes = np.where(steps == 0, 0, np.floor(_joined(own, schema) / safe + uniform))
    return _with_codes(widened, np.clip(codes, -codec.levels, codec.levels).astype(np.int64))


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
    """Return code, scale and dither (0 to 1) of every element, tensor after tensor."""
    stream = Stream(seed, "dither")
    packing, block = encoded.codec.packing, encoded.codec.block
    codes, steps, uniform = [], [], []
    for index, spec in enumerate(encoded.schema.tensors):
        size = spec.num_elements
        codes.append(packing.unpack(encoded.codes[spec.name], size).astype(np.int64))
        steps.append(np.repeat(bf16_to_f32(encoded.scales[spec.name]).astype(np.float64), block)[:size])
        for group, (start, stop) in enumerate(chunk_ranges(size, DITHER_GROUP)):
            padded = encoded.codec.num_blocks(stop - start) * block
            uniform.append(dither(stream, index, group, padded, encoded.codec.width)[: stop - start].astype(np.float64))
    return np.concatenate(codes), np.concatenate(steps), np.concatenate(uniform)


def _joined(delta: Mapping[str, Floats], schema: Schema) -> _Reals:
    return np.concatenate([delta[name].reshape(-1) for name in schema.names]).astype(np.float64)


def _with_codes(encoded: EncodedDelta, codes: _Whole) -> EncodedDelta:
    packed: dict[str, Packed] = {}
    scales: dict[str, Scales] = dict(encoded.scales)
    start = 0
    for spec in encoded.schema.tensors:
        packed[spec.name] = encoded.codec.packing.pack(codes[start : start + spec.num_elements].astype(np.int8))
        start += spec.num_elements
    return EncodedDelta(schema=encoded.schema, codec=encoded.codec, codes=packed, scales=scales)
