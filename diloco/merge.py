"""The canonical merge and outer step: accepted deltas, their integer weights and checkpoint r-1 make checkpoint r.

    g     = sum_i (w_i * 2^-24) d_i        over claims in the order of their digests
    v     = mu v + g
    step  = eta (g + mu v)                 DiLoCo's outer Nesterov step (arXiv 2311.08105, section 3)
    theta = theta - P                      P is the step and what was left of earlier ones, rounded: see `diloco.patch`

The step is linear in every delta. So one that was merged with weight w, k checkpoints before the base, and refuted
since, can be taken out again: what it did to the base, with all that its momentum did in the rounds between, is
subtracted from the round's own step. What was published stays as it is.

    step  = step - eta w (1 + mu + ... + mu^(k+1)) d
    v     = v - mu^k w d                   before the round's own g is added

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
from diloco.patch import PatchConfig, PatchWriter, round_step
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
class OuterState:
    """The files that a round starts from; momentum and residual are None for zeros (before round 1).

    weights_sha256: of the weights' file, 32 bytes; the patch says with it what it applies to.
    """

    weights: Path
    weights_sha256: bytes
    momentum: Path | None
    residual: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFiles:
    """The files that a merge writes: the new state, and the patch that leads to its weights."""

    weights: Path
    momentum: Path
    residual: Path
    patch: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """Digests of the state files that a merge wrote."""

    weights: FileDigest
    momentum: FileDigest
    residual: FileDigest


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRules:
    """What of the run config decides a merge: the outer step, how patches are rounded, the tensors of its deltas."""

    outer: OuterConfig
    patch: PatchConfig
    schema: Schema


def merge_round(
    base: OuterState,
    inputs: Sequence[MergeInput],
    rules: MergeRules,
    out: MergeFiles,
    *,
    unmerge: Sequence[UnmergeInput] = (),
) -> MergeResult:
    """Merge a round's deltas into a checkpoint; write the state that follows and the patch, all fsynced.

    Tensors of the base that the schema does not name (the position-embedding buffer) are carried through. Without any
    input the momentum moves on alone.

    Args:
        inputs: in any order; containers must have passed `check_finite`.
        out: temporary paths; the caller renames them into place.
        unmerge: deltas that are taken out, in any order.

    Raises:
        ValueError: a claim twice, weights that sum to more than one, or inputs of another schema.
        CheckpointCorrupt: weights, momentum or residual do not have the schema's tensors.
        DeltaNotFinite: the new weights would not be finite.
    """
    schema = rules.schema
    containers = [item.container for item in inputs] + [item.container for item in unmerge]
    if any(container.schema.digest != schema.digest for container in containers):
        raise ValueError("all deltas of a merge must have the run's schema")
    work = _Work(
        rules=rules,
        merged=tuple(_ordered(inputs)),
        removed=tuple((_removal(item, rules.outer), item.container) for item in _ordered_removals(unmerge, base)),
    )
    weights = _open(base.weights, schema)
    sources = _Sources(
        weights=weights,
        momentum=None if base.momentum is None else _open(base.momentum, schema),
        residual=None if base.residual is None else _open(base.residual, schema),
    )
    specs = {spec.name: spec for spec in schema.tensors}
    shapes = {spec.name: spec.shape for spec in schema.tensors}
    with (
        TensorFileWriter(out.weights, weights.shapes) as weights_out,
        TensorFileWriter(out.momentum, shapes) as momentum_out,
        TensorFileWriter(out.residual, shapes) as residual_out,
        PatchWriter(out.patch, schema, rules.patch, base.weights_sha256) as patch_out,
    ):
        targets = _Targets(weights=weights_out, momentum=momentum_out, residual=residual_out, patch=patch_out)
        for name in weights.names:
            if name in specs:
                _merge_tensor(specs[name], sources, work, targets)
            else:
                weights_out.write(name, weights.tensor(name))
    assert weights_out.digest is not None
    assert momentum_out.digest is not None
    assert residual_out.digest is not None
    return MergeResult(weights=weights_out.digest, momentum=momentum_out.digest, residual=residual_out.digest)


def outer_step(v: Floats, weighted: Iterable[tuple[int, Floats]], outer: OuterConfig) -> tuple[Floats, Floats]:
    """Return (step, v) of one chunk: by how much the weights fall, and the new momentum; `v` is not changed.

    Args:
        weighted: (weight in units of 2^-24, decoded delta) in the order of the claims' digests; deltas are overwritten.
    """
    mu, eta = np.float32(outer.momentum), np.float32(outer.lr)
    g = np.zeros_like(v)
    for weight, delta in weighted:
        np.multiply(delta, np.float32(weight) * _WEIGHT_UNIT, out=delta)
        np.add(g, delta, out=g)
    new_v = np.multiply(v, mu)
    np.add(new_v, g, out=new_v)
    step = np.multiply(new_v, mu)
    np.add(g, step, out=step)
    return np.multiply(step, eta, out=step), new_v


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """By how much of a delta the weights grow and the momentum shrinks when it is taken out."""

    weights: np.float32
    momentum: np.float32


def take_out(v: Floats, removed: Iterable[tuple[Removal, Floats]]) -> tuple[Floats, Floats]:
    """Return (back, v): by how much the weights rise, and the momentum, when deltas are taken out of one chunk.

    Args:
        v: the momentum; it is not changed.
        removed: how much of each decoded delta to take out, in the order of their units; deltas are overwritten.
    """
    back = np.zeros_like(v)
    for removal, delta in removed:
        part = np.multiply(delta, removal.momentum)
        v = np.subtract(v, part)
        np.multiply(delta, removal.weights, out=delta)
        np.add(back, delta, out=back)
    return back, v


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

    rules: MergeRules
    merged: tuple[MergeInput, ...]
    removed: tuple[tuple[Removal, Container], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sources:
    """The state that a round starts from, opened; None stands for zeros."""

    weights: TensorFile
    momentum: TensorFile | None
    residual: TensorFile | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Targets:
    """Where the new state and the patch go."""

    weights: TensorFileWriter
    momentum: TensorFileWriter
    residual: TensorFileWriter
    patch: PatchWriter


def _ordered(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    if len({item.claim_digest for item in inputs}) != len(inputs):
        raise ValueError("a claim can be merged only once")
    if any(item.weight < 0 for item in inputs) or sum(item.weight for item in inputs) > WEIGHT_ONE:
        raise ValueError(f"weights must not be negative and must sum to at most {WEIGHT_ONE}")
    return sorted(inputs, key=lambda item: item.claim_digest)


def _ordered_removals(unmerge: Sequence[UnmergeInput], base: OuterState) -> list[UnmergeInput]:
    if len({item.container.unit_id for item in unmerge}) != len(unmerge):
        raise ValueError("a unit's delta can be taken out only once")
    if any(not 0 <= item.weight <= WEIGHT_ONE or item.rounds_ago < 0 for item in unmerge):
        raise ValueError("what is taken out was merged with a weight from 0 to 1, 0 or more rounds ago")
    if unmerge and base.momentum is None:
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


def _open(path: Path, schema: Schema) -> TensorFile:
    file = TensorFile.open(path)
    for spec in schema.tensors:
        found = file.shapes.get(spec.name)
        if found != spec.shape:
            raise CheckpointCorrupt(f"{path.name} has {spec.name} as {found}; the run's model says {spec.shape}.")
    return file


def _merge_tensor(spec: TensorSpec, sources: _Sources, work: _Work, targets: _Targets) -> None:
    for start, stop in chunk_ranges(spec.num_elements):
        theta = sources.weights.read(spec.name, start, stop)
        v = np.zeros_like(theta) if sources.momentum is None else sources.momentum.read(spec.name, start, stop)
        left = np.zeros_like(theta) if sources.residual is None else sources.residual.read(spec.name, start, stop)
        removed = ((removal, container.decode(spec.name, start, stop)) for removal, container in work.removed)
        back, v = take_out(v, removed)
        weighted = ((item.weight, item.container.decode(spec.name, start, stop)) for item in work.merged)
        step, new_v = outer_step(v, weighted, work.rules.outer)
        np.add(left, np.subtract(step, back, out=step), out=left)
        rounded = round_step(left, work.rules.patch, spec.name)
        np.subtract(theta, rounded.patch, out=theta)
        if not np.all(np.isfinite(theta)):
            raise DeltaNotFinite(f"The merge would make {spec.name} infinite or NaN; the round cannot be published so.")
        targets.weights.write(spec.name, theta)
        targets.momentum.write(spec.name, new_v)
        targets.residual.write(spec.name, rounded.residual)
        targets.patch.write(rounded)
