"""The canonical merge and outer step: accepted deltas, their integer weights and checkpoint r-1 make checkpoint r.

    g     = sum_i (w_i * 2^-24) d_i        over claims in the order of their digests
    v     = mu v + g
    theta = theta - eta (g + mu v)         DiLoCo's outer Nesterov step (arXiv 2311.08105, section 3)

The step is linear in every delta. So one that was merged with weight w, k checkpoints before the base, and refuted
since, can be taken out again: what it did to the base, with all that its momentum did in the rounds between, is
subtracted before the round's own merge. What was published stays as it is.

    theta = theta + eta w (1 + mu + ... + mu^(k+1)) d
    v     = v - mu^k w d

Every operation is one separate numpy fp32 call, so the result is the same bytes on every machine; the chunk size only
bounds memory, it does not touch the result. Memory does not grow with the number of deltas: one chunk of one tensor of
one delta is in memory at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from diloco.checkpoint import FileDigest, TensorFile, TensorFileWriter
from diloco.codec import chunk_ranges
from diloco.container import Container
from diloco.schema import Schema, TensorSpec
from diloco.tables import Floats
from protocol.errors import CheckpointCorrupt, DeltaNotFinite

WEIGHT_ONE: Final = 1 << 24
"""A weight of one. fp32 holds every integer up to it, so w * 2^-24 is exact."""
_WEIGHT_UNIT: Final = np.float32(2.0**-24)


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterConfig:
    """The outer optimiser: Nesterov with learning rate `lr` and momentum `momentum`, both rounded to fp32 for use."""

    lr: float
    momentum: float

    def __post_init__(self) -> None:
        if not 0.0 < self.lr <= 10.0:
            raise ValueError(f"outer lr is {self.lr}; it must be above 0 and at most 10")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"outer momentum is {self.momentum}; it must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInput:
    """One accepted delta: its claim's digest (which orders the sum), its container, its weight in units of 2^-24."""

    claim_digest: bytes
    container: Container
    weight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergeInput:
    """A delta that is taken out again. Its unit, of which no other delta was merged, orders the subtractions.

    weight: with which it was merged, in 2^-24.
    rounds_ago: the base's number less that of the checkpoint it was merged into; 0 if that is the base itself.
    """

    container: Container
    weight: int
    rounds_ago: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """Digests of the two files that a merge wrote."""

    weights: FileDigest
    momentum: FileDigest


def merge_round(
    base_path: Path,
    momentum_path: Path | None,
    inputs: Sequence[MergeInput],
    outer: OuterConfig,
    out_weights: Path,
    out_momentum: Path,
    *,
    unmerge: Sequence[UnmergeInput] = (),
    schema: Schema | None = None,
) -> MergeResult:
    """Merge a round's deltas into the checkpoint at `base_path`; write weights and outer momentum, both fsynced.

    Tensors of the base that the schema does not name (the position-embedding buffer) are carried through.

    Args:
        momentum_path: the outer momentum that goes with the base; None stands for zeros (round 1).
        inputs: in any order; containers must have passed `check_finite`.
        out_weights, out_momentum: temporary paths; the caller renames them into place.
        unmerge: deltas that are taken out before the merge, in any order.
        schema: the tensors of the run's deltas. Only needed if there are no inputs; then the momentum moves on alone.

    Raises:
        ValueError: nothing to do, a claim twice, weights that sum to more than one, or inputs of different schemas.
        CheckpointCorrupt: base or momentum does not have the schema's tensors.
        DeltaNotFinite: the new weights would not be finite.
    """
    schema = _schema_of(inputs, unmerge, schema)
    work = _Work(
        outer=outer,
        merged=tuple(_ordered(inputs)),
        removed=tuple((_removal(item, outer), item.container) for item in _ordered_removals(unmerge, momentum_path)),
    )
    base = TensorFile.open(base_path)
    _require_tensors(base, schema, base_path)
    momentum = None if momentum_path is None else TensorFile.open(momentum_path)
    if momentum is not None and momentum_path is not None:
        _require_tensors(momentum, schema, momentum_path)
    specs = {spec.name: spec for spec in schema.tensors}
    momentum_shapes = {spec.name: spec.shape for spec in schema.tensors}
    with (
        TensorFileWriter(out_weights, base.shapes) as weights_out,
        TensorFileWriter(out_momentum, momentum_shapes) as momentum_out,
    ):
        for name in base.names:
            if name in specs:
                _merge_tensor(specs[name], base, momentum, work, weights_out, momentum_out)
            else:
                weights_out.write(name, base.tensor(name))
    assert weights_out.digest is not None
    assert momentum_out.digest is not None
    return MergeResult(weights=weights_out.digest, momentum=momentum_out.digest)


def merge_chunk(
    theta: Floats, v: Floats, weighted: Iterable[tuple[int, Floats]], outer: OuterConfig
) -> tuple[Floats, Floats]:
    """Return (theta, v) after the outer step, for one chunk; the arguments are not changed.

    Args:
        weighted: (weight in units of 2^-24, decoded delta) in the order of the claims' digests; deltas are overwritten.
    """
    mu, eta = np.float32(outer.momentum), np.float32(outer.lr)
    g = np.zeros_like(theta)
    for weight, delta in weighted:
        np.multiply(delta, np.float32(weight) * _WEIGHT_UNIT, out=delta)
        np.add(g, delta, out=g)
    new_v = np.multiply(v, mu)
    np.add(new_v, g, out=new_v)
    step = np.multiply(new_v, mu)
    np.add(g, step, out=step)
    np.multiply(step, eta, out=step)
    return np.subtract(theta, step, out=step), new_v


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """By how much of a delta the weights grow and the momentum shrinks when it is taken out."""

    weights: np.float32
    momentum: np.float32


def unmerge_chunk(theta: Floats, v: Floats, removed: Iterable[tuple[Removal, Floats]]) -> tuple[Floats, Floats]:
    """Return (theta, v) after deltas were taken out of one chunk; theta and v are not changed, the deltas are.

    Args:
        removed: how much of each decoded delta to take out, in the order of their units.
    """
    for removal, delta in removed:
        part = np.multiply(delta, removal.momentum)
        v = np.subtract(v, part)
        np.multiply(delta, removal.weights, out=delta)
        theta = np.add(theta, delta)
    return theta, v


def normalise_weights(shares: Sequence[int], digests: Sequence[bytes]) -> tuple[int, ...]:
    """Turn positive integer shares (samples trained, say) into weights that sum to exactly 2^24, by largest remainder.

    Args:
        digests: the claims' digests, in the order of the shares; the smaller digest wins a tie.
    """
    if not shares or len(shares) != len(digests) or len(set(digests)) != len(digests):
        raise ValueError("every share needs its own claim digest, and there must be at least one")
    if min(shares) < 1:
        raise ValueError(f"shares must be positive, the smallest is {min(shares)}")
    total = sum(shares)
    weights = [share * WEIGHT_ONE // total for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (-(shares[i] * WEIGHT_ONE % total), digests[i]))
    for i in by_remainder[: WEIGHT_ONE - sum(weights)]:
        weights[i] += 1
    return tuple(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A round's deltas: those that go in, by claim digest, and those that are taken out, by unit."""

    outer: OuterConfig
    merged: tuple[MergeInput, ...]
    removed: tuple[tuple[Removal, Container], ...]


def _schema_of(inputs: Sequence[MergeInput], unmerge: Sequence[UnmergeInput], schema: Schema | None) -> Schema:
    given = [item.container.schema for item in inputs] + [item.container.schema for item in unmerge]
    if schema is not None:
        given.append(schema)
    if not given:
        raise ValueError("a merge needs at least one delta, or the schema of those that it could have had")
    if len({each.digest for each in given}) != 1:
        raise ValueError("all deltas of a merge must have one schema")
    return given[0]


def _ordered(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    if len({item.claim_digest for item in inputs}) != len(inputs):
        raise ValueError("a claim can be merged only once")
    if any(item.weight < 0 for item in inputs) or sum(item.weight for item in inputs) > WEIGHT_ONE:
        raise ValueError(f"weights must not be negative and must sum to at most {WEIGHT_ONE}")
    return sorted(inputs, key=lambda item: item.claim_digest)


def _ordered_removals(unmerge: Sequence[UnmergeInput], momentum_path: Path | None) -> list[UnmergeInput]:
    if len({item.container.unit_id for item in unmerge}) != len(unmerge):
        raise ValueError("a unit's delta can be taken out only once")
    if any(not 0 <= item.weight <= WEIGHT_ONE or item.rounds_ago < 0 for item in unmerge):
        raise ValueError("what is taken out was merged with a weight from 0 to 1, 0 or more rounds ago")
    if unmerge and momentum_path is None:
        raise ValueError("nothing was merged before the first round that could be taken out")
    return sorted(unmerge, key=lambda item: item.container.unit_id)


def _removal(item: UnmergeInput, outer: OuterConfig) -> Removal:
    # Multiplications and additions of Python floats one by one, from the values that the merges used: no pow, no fma.
    mu, weight = float(np.float32(outer.momentum)), item.weight * float(_WEIGHT_UNIT)
    power = 1.0
    for _ in range(item.rounds_ago):
        power *= mu
    total, term = 1.0, 1.0
    for _ in range(item.rounds_ago + 1):
        term *= mu
        total += term
    return Removal(
        weights=np.float32(float(np.float32(outer.lr)) * weight * total), momentum=np.float32(power * weight)
    )


def _require_tensors(file: TensorFile, schema: Schema, path: Path) -> None:
    for spec in schema.tensors:
        found = file.shapes.get(spec.name)
        if found != spec.shape:
            raise CheckpointCorrupt(f"{path.name} has {spec.name} as {found}; the run's model says {spec.shape}.")


def _merge_tensor(
    spec: TensorSpec,
    base: TensorFile,
    momentum: TensorFile | None,
    work: _Work,
    weights_out: TensorFileWriter,
    momentum_out: TensorFileWriter,
) -> None:
    for start, stop in chunk_ranges(spec.num_elements):
        theta = base.read(spec.name, start, stop)
        v = np.zeros_like(theta) if momentum is None else momentum.read(spec.name, start, stop)
        removed = ((removal, container.decode(spec.name, start, stop)) for removal, container in work.removed)
        theta, v = unmerge_chunk(theta, v, removed)
        weighted = ((item.weight, item.container.decode(spec.name, start, stop)) for item in work.merged)
        new_theta, new_v = merge_chunk(theta, v, weighted, work.outer)
        if not np.all(np.isfinite(new_theta)):
            raise DeltaNotFinite(f"The merge would make {spec.name} infinite or NaN; the round cannot be published so.")
        weights_out.write(spec.name, new_theta)
        momentum_out.write(spec.name, new_v)
