"""Sketches by which a merge weighs its deltas: cheap, under a secret seed, the same bytes on every machine.

A delta is cut into rows of 1,024 elements, tensor after tensor, and these into runs of up to 4 rows; what is short in a
tensor's last row counts as zero, and no run crosses two tensors. Of every 32 runs in a row the seed draws one (in a
small model: of every few, or every single one), and nothing else is read. 16 drawn runs form a group. Row j of a group
gets the signs of row j of a table of random signs, and one more sign of its own; the rows of a group are added up, and
the sum is rotated by a random number of places and added to 1,024 buckets. All of that is contiguous, so that weighing
costs little beside merging; and a poisoner who does not know the seed can't aim at what is not looked at.

The inner product of two sketches estimates that of the drawn rows without bias, with a standard error of about 3 % of
the product of their norms. Most often it says nothing about a change confined to a few rows: that is for audits.

How large the whole delta is follows from all of its scales, which are few and all read, and from how large codes are on
the average in the drawn rows. It is at least what the scales alone say: a block's scale is `reach` times its mean
magnitude (over the levels), and no sum of squares is below that of the mean. So a loud block cannot hide, not even
among other loud ones that are silent.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from diloco.codec import CodecConfig, Scales, bf16_to_f32, chunk_ranges
from diloco.container import Container, data_starts
from diloco.packing import CELL, Signed
from diloco.schema import Schema
from diloco.streams import Stream
from diloco.tables import Floats

ROW: Final = CELL
"""Elements of a row, and buckets of a sketch."""
RUN: Final = 4
"""Rows that are drawn, and read, together: reading less at once costs more than it saves."""
MAX_RATE: Final = 32
"""In a large model one run in so many is drawn."""
_ROWS_PER_RATE: Final = 512
"""The rate rises by one with every so many rows: at least about 512 rows are drawn, or all."""
GROUP_RUNS: Final = 16
_GROUP: Final = GROUP_RUNS * RUN
"""Runs, and most rows, that are added up under one rotation."""
_LEVELS: Final = 32_767
_CHUNK: Final = 1 << 18
"""Elements whose codes are squared at once; a multiple of every block size."""

Gram = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """What a merge knows of a delta: `sketch`, fp32[1024], and `norm2`, an estimate of its sum of squares."""

    sketch: Floats
    norm2: float


def sampling_rate(rows: int) -> int:
    """Return n for "one run in n is drawn": 1 for models below 1,024 rows (a million parameters), 32 from 16,384 on."""
    return max(1, min(MAX_RATE, rows // _ROWS_PER_RATE))


def weigh_delta(container: Container, seed: bytes) -> Weighing:
    """Return a delta's sketch and size under a round's secret seed.

    Sketches can be compared only under the same seed. What is drawn is not scaled up: a sketch is in units of the drawn
    rows. `norm2` is that of the whole delta; where every run is drawn, exact up to rounding, unless the scales stand
    for more than the codes.

    Args:
        container: must have passed `check_finite`.
        seed: 32 bytes.
    """
    plan = _plan(container.schema, container.codec, seed)
    scales = _all_scales(container)
    buckets = np.zeros(ROW, dtype=np.float32)
    energies, loudnesses = [], []
    for group in plan.groups:
        steps_RK = bf16_to_f32(np.bitwise_xor(scales[group.scales_rk], group.signs_r[:, None]))
        signed_RB = _group_codes(container, group)
        np.multiply(signed_RB, plan.table_rb[: group.rows], out=signed_RB)
        energies.append(_energy(signed_RB, steps_RK))
        loudnesses.append(_loudness(steps_RK, group.elements_rk))
        total = _sum_of_rows(_decoded(signed_RB, steps_RK))
        head, tail = buckets[group.rotation :], buckets[: group.rotation]
        np.add(head, total[: ROW - group.rotation], out=head)
        np.add(tail, total[ROW - group.rotation :], out=tail)
    whole = _loudness(bf16_to_f32(scales), plan.elements)
    drawn = math.fsum(loudnesses)
    if drawn == 0.0 and whole > 0.0:
        norm2 = delta_norm2(container)  # all that was drawn is silent
    else:
        norm2 = math.fsum(energies) * (whole / drawn) if drawn else 0.0
    return Weighing(sketch=buckets, norm2=max(norm2, whole / float(container.codec.share) ** 2))


def weighing_sketch(container: Container, seed: bytes) -> Floats:
    """Return fp32[1024], the sketch of `weigh_delta` alone."""
    return weigh_delta(container, seed).sketch


def _group_codes(container: Container, group: "_Group") -> Signed:
    """Return the codes of a group's rows, int8[r, 1024]; what is short in a tensor's last row is zero."""
    parts = container.parts(*group.spans)
    packing = container.codec.packing
    if group.whole:
        return packing.unpack(np.concatenate(parts), group.rows * ROW).reshape(-1, ROW)
    codes = np.zeros(group.rows * ROW, dtype=np.int8)
    for first, elements, part in zip(group.first_rows, group.run_elements, parts, strict=True):
        codes[first * ROW : first * ROW + elements] = packing.unpack(part, elements)
    return codes.reshape(-1, ROW)


def _decoded(signed_RB: Signed, steps_RK: Floats) -> Floats:
    """Return fp32[r, 1024]; products of a 7-bit integer and a scale of 8 significant bits are exact."""
    values: Floats = signed_RB.astype(np.float32)
    blockwise = values.reshape(*steps_RK.shape, -1)
    np.multiply(blockwise, steps_RK[:, :, None], out=blockwise)
    return values


def _energy(signed_RB: Signed, steps_RK: Floats) -> float:
    """Return the sum of squares of decoded rows."""
    return _loudness(steps_RK, _sums_of_squares(signed_RB.reshape(*steps_RK.shape, -1)))


def _sums_of_squares(numbers: Signed) -> npt.NDArray[np.uint32]:
    """Return the sums over the last axis, of at most 65,536 numbers: whole, and below 2^31."""
    squares = np.multiply(numbers, numbers, dtype=np.int16).view(np.uint16)
    sums: npt.NDArray[np.uint32] = np.add.reduce(squares, axis=-1, dtype=np.uint32)
    return sums


def _loudness(steps: Floats, counts: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]) -> float:
    """Return the sum of squared steps times whole numbers."""
    values = np.multiply(steps, steps, dtype=np.float64)
    np.multiply(values, counts, out=values)
    return _fixed_sum(values.reshape(-1))


def gram(sketches: Sequence[Floats]) -> Gram:
    """Return the inner products of sketches as int64[n, n].

    All sketches are first rounded to 16-bit integers on one scale, the largest bucket of all. A sketch that dwarfs the
    others would round them to nothing: the caller clips sketches by their deltas' norms before.
    """
    stacked_NB = np.stack(sketches).astype(np.float64)
    largest = float(np.max(np.abs(stacked_NB)))
    if largest > 0.0:
        np.divide(stacked_NB, largest, out=stacked_NB)
        np.multiply(stacked_NB, float(_LEVELS), out=stacked_NB)
    rounded_NB = np.rint(stacked_NB).astype(np.int64)
    # Integers: no BLAS, no rounding, and 1,024 products of 2^30 stay far below 2^63.
    products: Gram = np.matmul(rounded_NB, rounded_NB.T)
    return products


def delta_norm2(container: Container) -> float:
    """Return the sum of squares of the whole decoded delta.

    Each block's codes are squared and added as integers, times its squared scale, which is exact in float64; blocks are
    added in one fixed order. It reads every code: merges are weighed by the estimate of `weigh_delta`, which does not.
    """
    parts: list[float] = []
    block = container.codec.block
    for spec in container.schema.tensors:
        for start, stop in chunk_ranges(spec.num_elements, _CHUNK):
            codes, scales = container.coded(spec.name, start, stop)
            numbers = container.codec.packing.unpack(codes, stop - start)
            squares = _block_squares(numbers, block).astype(np.float64)
            steps = bf16_to_f32(scales).astype(np.float64)
            np.multiply(squares, steps, out=squares)
            np.multiply(squares, steps, out=squares)
            parts.append(_fixed_sum(squares))
    return math.fsum(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Up to 16 runs, and what is done to them.

    spans: where each run's codes lie in a container's data section. first_rows, run_elements: where they go, and how
        many they are. whole: no row is short.
    scales_rk: which scales each row has, counted over all tensors; the one after the last stands for none.
    signs_r: 0 or the sign bit of a bf16 scale. rotation: in places.
    """

    rows: int
    spans: tuple[tuple[int, int], ...]
    first_rows: tuple[int, ...]
    run_elements: tuple[int, ...]
    whole: bool
    scales_rk: npt.NDArray[np.intp]
    elements_rk: npt.NDArray[np.uint16]
    signs_r: npt.NDArray[np.uint16]
    rotation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a seed draws.

    table_rb: int8[64, 1024], 1 or -1, shared by all groups. elements: of each scale of all tensors, and 0 at the end.
    """

    groups: tuple[_Group, ...]
    table_rb: npt.NDArray[np.int8]
    elements: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Where a run lies: codes in bytes of the data section, scales counted over all tensors, elements that it has."""

    codes: int
    scales: int
    elements: int

    @property
    def rows(self) -> int:
        return -(-self.elements // ROW)


@lru_cache(maxsize=2)
def _plan(schema: Schema, codec: CodecConfig, seed: bytes) -> _Plan:
    """Draw once for all deltas of a round. Steps of the stream: 0 which runs, 1 the table, 2 signs, 3 rotations."""
    stream = Stream(seed, "weigh")
    runs = list(_runs(schema, codec))
    rate = sampling_rate(sum(run.rows for run in runs))
    draws = stream.words(0, 0, -(-len(runs) // rate)) % np.uint64(rate)
    chosen = [rate * stratum + int(draw) for stratum, draw in enumerate(draws)]
    drawn = [runs[number] for number in chosen if number < len(runs)]
    table = np.unpackbits(_bytes(stream.words(1, 0, _GROUP * ROW // 64)), bitorder="little")
    groups = [drawn[start : start + GROUP_RUNS] for start in range(0, len(drawn), GROUP_RUNS)]
    signs = np.unpackbits(_bytes(stream.words(2, 0, len(groups))), bitorder="little").reshape(-1, _GROUP)
    rotations = stream.words(3, 0, len(groups)) % np.uint64(ROW)
    elements = _elements(schema, codec)
    return _Plan(
        groups=tuple(
            _group(members, signs[number], int(rotations[number]), codec, elements.size - 1)
            for number, members in enumerate(groups)
        ),
        table_rb=np.subtract(1, table.astype(np.int8) * np.int8(2)).reshape(_GROUP, ROW),
        elements=elements,
    )


def _runs(schema: Schema, codec: CodecConfig) -> Iterator[_Run]:
    starts = data_starts(schema, codec)
    scales = 0
    for spec in schema.tensors:
        for start, stop in chunk_ranges(spec.num_elements, RUN * ROW):
            first = scales + start // codec.block
            codes = starts[f"{spec.name}.codes"] + codec.packing.num_bytes(start)
            yield _Run(codes=codes, scales=first, elements=stop - start)
        scales += codec.num_blocks(spec.num_elements)


def _group(
    members: Sequence[_Run], signs: npt.NDArray[np.uint8], rotation: int, codec: CodecConfig, nothing: int
) -> _Group:
    rows = [run.rows for run in members]
    block, packing = codec.block, codec.packing
    piece = min(block, ROW)  # what has one scale and is of one row
    scales_RK = np.full((sum(rows), ROW // piece), nothing, dtype=np.intp)
    elements_RK = np.zeros(scales_RK.shape, dtype=np.uint16)
    first_rows = [sum(rows[:number]) for number in range(len(rows))]
    for run, first in zip(members, first_rows, strict=True):
        offsets = np.arange(0, run.elements, piece)
        # A run starts with a block or, where blocks are longer, lies within one.
        scales_RK[first:].reshape(-1)[: offsets.size] = run.scales + offsets // block
        elements_RK[first:].reshape(-1)[: offsets.size] = np.minimum(piece, run.elements - offsets)
    return _Group(
        rows=sum(rows),
        spans=tuple((run.codes, packing.num_bytes(run.elements)) for run in members),
        first_rows=tuple(first_rows),
        run_elements=tuple(run.elements for run in members),
        whole=all(run.elements % ROW == 0 for run in members),
        scales_rk=scales_RK,
        elements_rk=elements_RK,
        signs_r=np.left_shift(signs[: sum(rows)], 15, dtype=np.uint16),
        rotation=rotation,
    )


def _elements(schema: Schema, codec: CodecConfig) -> npt.NDArray[np.uint32]:
    """Return how many elements each scale of each tensor has, and 0 for the zero after them."""
    counts = [np.full(codec.num_blocks(spec.num_elements), codec.block, dtype=np.uint32) for spec in schema.tensors]
    for spec, blocks in zip(schema.tensors, counts, strict=True):
        blocks[-1] = spec.num_elements - (blocks.size - 1) * codec.block
    return np.concatenate([*counts, np.zeros(1, dtype=np.uint32)])


def _all_scales(container: Container) -> Scales:
    """Return the scales of all tensors, one after another, and a zero after them."""
    count = sum(container.codec.num_blocks(spec.num_elements) for spec in container.schema.tensors)
    (raw,) = container.parts((0, 2 * count))
    scales = np.zeros(count + 1, dtype=np.uint16)
    scales[:count] = raw.view("<u2")
    return scales


def _bytes(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    return words.astype("<u8", copy=False).view(np.uint8)


def _sum_of_rows(rows_RB: Floats) -> Floats:
    """Add up rows by halves, in place: the same order of additions for every machine."""
    count = len(rows_RB)
    while count > 1:
        half = (count + 1) // 2
        upper = rows_RB[half:count]
        lower = rows_RB[: len(upper)]
        np.add(lower, upper, out=lower)
        count = half
    total: Floats = rows_RB[0]
    return total


def _block_squares(numbers: Signed, block: int) -> npt.NDArray[np.uint32]:
    """Return each block's sum of squared codes."""
    size = -(-numbers.size // block) * block
    if numbers.size < size:
        numbers = np.concatenate([numbers, np.zeros(size - numbers.size, dtype=np.int8)])
    return _sums_of_squares(numbers.reshape(-1, block))


def _fixed_sum(values: npt.NDArray[np.float64]) -> float:
    """Add up float64 values by halves, in one order for every machine; quicker than `math.fsum` for many values."""
    while values.size > 1:
        half = (values.size + 1) // 2
        upper = values[half:]
        np.add(values[: upper.size], upper, out=values[: upper.size])
        values = values[:half]
    return float(values[0])
