"""What the simulation asks of the world of numbers: results, sketches, comparisons, weights, merges."""

from dataclasses import dataclass
from typing import Final, Protocol

from coordinator.claims import Expected
from coordinator.replicas import ComparisonDue
from coordinator.rounds import Round
from coordinator.settling import MergePlan, Weighed
from protocol.documents import Artifact, Digest, UnitId
from verify.compare import Comparison

HONEST: Final = "honest"
"""What a volunteer delivers who does its work; every other kind is an attack's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A unit: the `index`-th of `round`."""

    unit: UnitId
    round: int
    index: int


class Physics(Protocol):
    """Where deltas come from and what becomes of them."""

    def first_weights(self) -> Digest:
        """Return the digest of checkpoint 0's weights, before anything else is asked."""
        ...

    def deliver(self, task: Task, kind: str, team: str, /) -> Artifact:
        """Return what a volunteer claims who delivers `kind`; who are of one team send the same forgeries."""
        ...

    def sketch(self, task: Task, artifact: Artifact, seed: Digest, /) -> bytes:
        """Return the sketch of a delivered delta under a receipt's seed, 4,096 bytes."""
        ...

    def admit(self, task: Task, expected: Expected, /) -> None:
        """Raise the `BytesRefused` that fits unless the uploaded delta may be stored."""
        ...

    def difference(self, due: ComparisonDue) -> float:
        """Return D between a stored delta and a replica's sketch."""
        ...

    def replay(self, task: Task, artifact: Artifact, /) -> Comparison:
        """Return what a referee finds who runs the unit again."""
        ...

    def weigh(self, plan: MergePlan) -> Weighed:
        """Return outliers and weights of a planned merge."""
        ...

    def merge(self, closed: Round) -> Digest:
        """Compute the round's checkpoint; return the digest of its weights."""
        ...
