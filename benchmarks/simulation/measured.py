"""Physics without training: measured probabilities say what a referee and a replica find.

A delivered delta is a number; its sketch carries that number in its first bucket. Deltas of one unit that are honest
agree, and so do the forgeries of one team; everything else agrees or not as the table says.
"""

import hashlib
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from benchmarks.simulation.physics import HONEST, Task
from coordinator.claims import Expected
from coordinator.replicas import ComparisonDue
from coordinator.rounds import Round
from coordinator.settling import MergePlan, Weighed
from protocol.canonical import sha256_hex
from protocol.documents import Artifact, Digest, RunConfig
from protocol.errors import DeltaNotFinite
from protocol.limits import SKETCH_FLOATS
from verify.compare import Comparison
from verify.weights import Candidate, merge_weights

_FAR: Final = 1.0
_NEAR: Final = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Odds:
    """What becomes of a kind of delta, as shares of units.

    refuted: a referee's replay is outside of the tolerance. disagrees: an honest replica's sketch differs too much.
    stands_out: the look at a merge's deltas asks for an audit. admitted: the bytes are a delta at all.
    """

    refuted: float = 1.0
    disagrees: float = 1.0
    stands_out: float = 0.0
    admitted: bool = True


HONEST_ODDS: Final = Odds(refuted=0.0, disagrees=0.0)
REFUSED: Final = Odds(admitted=False)
"""Of bytes that no encoder writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delta:
    number: int
    kind: str
    team: str
    refuted: bool
    disagrees: bool
    stands_out: bool


class MeasuredPhysics:
    """A `Physics` of probabilities.

    Args:
        config: of the run; its weighting is left out, since there is nothing to sketch.
        odds: by kind; kinds that are not in it are always found out by replicas and referees, and never at the merge.
        delta_bytes: what every delta counts.
        seed: of all draws.
    """

    def __init__(self, config: RunConfig, odds: Mapping[str, Odds], *, delta_bytes: int, seed: bytes) -> None:
        self._config = config
        self._plain = replace(config.verification, weighting="mean")
        self._odds = {HONEST: HONEST_ODDS, **odds}
        self._delta_bytes = delta_bytes
        self._random = random.Random(seed + b"measured")
        self._deltas: list[_Delta] = []
        self._by_blob: dict[str, _Delta] = {}

    def first_weights(self) -> Digest:
        """See `Physics`."""
        return _digest("weights/0")

    def deliver(self, _task: Task, kind: str, team: str, /) -> Artifact:
        """See `Physics`."""
        odds = self._odds_of(kind)
        delta = _Delta(
            number=len(self._deltas) + 1,
            kind=kind,
            team=team,
            refuted=self._random.random() < odds.refuted,
            disagrees=self._random.random() < odds.disagrees,
            stands_out=self._random.random() < odds.stands_out,
        )
        blob = _digest(f"delta/{delta.number}")
        self._deltas.append(delta)
        self._by_blob[blob] = delta
        return Artifact(role="delta", content_sha256=blob, blob_sha256=blob, size=self._delta_bytes)

    def sketch(self, _task: Task, artifact: Artifact, _seed: Digest, /) -> bytes:
        """See `Physics`."""
        number = self._by_blob[artifact.blob_sha256].number
        return struct.pack(f"<{SKETCH_FLOATS}f", float(number), *([0.0] * (SKETCH_FLOATS - 1)))

    def admit(self, _task: Task, expected: Expected, /) -> None:
        """See `Physics`."""
        if not self._odds_of(self._by_blob[expected.artifact.blob_sha256].kind).admitted:
            raise DeltaNotFinite

    def difference(self, due: ComparisonDue) -> float:
        """See `Physics`."""
        (number,) = struct.unpack("<f", due.sketch[:4])
        one, other = self._by_blob[due.blob_sha256], self._deltas[int(number) - 1]
        if one.kind == other.kind and (one.kind == HONEST or one.team == other.team):
            return _NEAR
        if HONEST not in (one.kind, other.kind):
            return _FAR
        cheat = other if one.kind == HONEST else one
        return _FAR if cheat.disagrees else _NEAR

    def replay(self, _task: Task, artifact: Artifact, /) -> Comparison:
        """See `Physics`."""
        difference = _FAR if self._by_blob[artifact.blob_sha256].refuted else _NEAR
        return Comparison(raw_difference=difference, code_difference=difference)

    def weigh(self, plan: MergePlan) -> Weighed:
        """See `Physics`."""
        outliers = {
            entry.claim: "direction"
            for entry in plan.entries
            if not entry.audited and self._by_blob[entry.blob_sha256].stands_out
        }
        kept = tuple(entry for entry in plan.entries if entry.claim not in outliers)
        if not any(entry.influence for entry in kept):
            return Weighed(outliers=outliers, weights={entry.claim: 0 for entry in kept})
        weights = merge_weights(
            [Candidate.of(entry) for entry in kept],
            rules=self._config.rounds,
            verification=self._plain,
            sketches=None,
            norms2=[1.0] * len(kept),
        )
        return Weighed(
            outliers=outliers,
            weights={entry.claim: weight for entry, weight in zip(kept, weights, strict=True)},
        )

    def merge(self, closed: Round) -> Digest:
        """See `Physics`."""
        return _digest(f"weights/{closed.round}")

    def _odds_of(self, kind: str) -> Odds:
        return self._odds.get(kind, Odds())


def _digest(text: str) -> Digest:
    return Digest(sha256_hex(hashlib.sha256(b"benchmarks/measured\0" + text.encode()).digest()))
