"""What came of a simulated run for the honest and for each attacker, by the database and by the truth."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.simulation.people import Player
from benchmarks.simulation.physics import HONEST
from coordinator.owners import OwnerState
from coordinator.store import Store
from diloco.merge import WEIGHT_ONE
from protocol.documents import Digest, MergeEntry, Verdict, parse_payload
from protocol.envelope import parse_envelope
from protocol.keys import KeyId


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What the simulation knows of a claim and the coordinator does not. `in_order` counts the claims of its owner."""

    owner: str
    kind: str
    worked: bool
    replica: bool
    in_order: int


@dataclass(slots=True, kw_only=True)
class Meter:
    """What was spent so far: units trained, and bytes that devices fetched or sent, by purpose."""

    units: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def share(self, spent: "Counter[str]") -> float:
        """Return the share of audits (replicas and referees) in what was spent."""
        total = sum(spent.values())
        return (spent["replica"] + spent["referee"]) / total if total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerOutcome:
    """What an owner did and what became of it.

    poisons: claims of its own units that were not honest work. merged: those that went into a checkpoint, with their
    summed weight (one is a whole merge) and influence; `before_drawn` of them were claimed before the first poison that
    was to be audited, the others while that audit was on its way.
    unmerged: those taken out again. poisons_until_ban: how many it had claimed by then; None if it was not banned.
    credited: merged units. unworked: accepted claims, replicas among them, that it did not work for. rejected: its
    claims, by verdict code.
    """

    owner: str
    behaviour: str
    hostile: bool
    claims: int
    poisons: int
    merged: int
    before_drawn: int
    merged_weight: float
    merged_influence: float
    unmerged: int
    poisons_until_ban: int | None
    credited: int
    unworked: int
    valid_in_row: int
    rejected: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A simulated run in numbers. `units`: merged ones; `honest_rejected`, by verdict code; shares are of audits."""

    rounds: int
    units: int
    hours: float
    owners: tuple[OwnerOutcome, ...]
    honest_banned: int
    honest_rejected: Mapping[str, int]
    compute_share: float
    byte_share: float
    trained: Mapping[str, int]
    moved_bytes: Mapping[str, int]
    audits: Mapping[str, int]
    refusals: Mapping[str, int]

    @property
    def hostile(self) -> tuple[OwnerOutcome, ...]:
        """Return the attackers."""
        return tuple(owner for owner in self.owners if owner.hostile)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON would hold it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its standard error, over `n` values."""

    mean: float
    error: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values and its standard error; that of a single value is not known (NaN)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean=mean, error=math.nan, n=len(values))
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Interval(mean=mean, error=math.sqrt(variance / len(values)), n=len(values))


class Tally:
    """Counts what an ended (or stopped) simulation left in the store."""

    def __init__(
        self,
        store: Store,
        players: Sequence[Player],
        truths: Mapping[Digest, Truth],
        owner_ids: Mapping[str, KeyId],
        banned_after: Mapping[str, int],
    ) -> None:
        self._store = store
        self._players = {player.owner: player for player in players}
        self._truths = truths
        self._ids = owner_ids
        self._banned_after = banned_after
        entries = self._merged_entries()
        self._weights = {Digest(entry.claim): entry.weight / WEIGHT_ONE for entry in entries}
        self._influence = {Digest(entry.claim): entry.influence / WEIGHT_ONE for entry in entries}

    def _merged_entries(self) -> list[MergeEntry]:
        last = self._store.latest_round()
        rounds = [self._store.round(number) for number in range(1, 1 + (0 if last is None else last.round))]
        return [entry for found in rounds if found is not None and found.manifest_sha256 for entry in found.merge]

    def merged_units(self) -> int:
        """Return how many deltas were merged."""
        return len(self._weights)

    def owner(self, name: str) -> OwnerOutcome:
        """Return what became of an owner."""
        claims = {claim: truth for claim, truth in self._truths.items() if truth.owner == name}
        own = {claim: truth for claim, truth in claims.items() if not truth.replica}
        poisons = [claim for claim, truth in own.items() if truth.kind != HONEST]
        merged = [claim for claim in poisons if self._weights.get(claim, 0.0) > 0.0]
        drawn = [self._truths[claim].in_order for claim in poisons if self._audited(claim)]
        first = min(drawn, default=math.inf)
        verdicts = {claim: self._verdict(claim) for claim in claims}
        credited = [claim for claim in own if claim in self._weights]
        stored = self._store.owner(self._ids[name])
        return OwnerOutcome(
            owner=name,
            behaviour=self._players[name].behaviour.name,
            hostile=self._players[name].behaviour.hostile,
            claims=len(own),
            poisons=len(poisons),
            merged=len(merged),
            before_drawn=sum(self._truths[claim].in_order < first for claim in merged),
            merged_weight=math.fsum(self._weights[claim] for claim in merged),
            merged_influence=math.fsum(self._influence[claim] for claim in merged),
            unmerged=sum(self._is_unmerged(claim) for claim in merged),
            poisons_until_ban=self._banned_after.get(name),
            credited=len(credited),
            unworked=sum(
                outcome == "accepted" and not self._truths[claim].worked for claim, (_, outcome) in verdicts.items()
            ),
            valid_in_row=0 if stored is None else stored.valid_in_row,
            rejected=dict(Counter(code for code, outcome in verdicts.values() if outcome == "rejected")),
        )

    def honest_banned(self) -> int:
        """Return how many honest owners are banned."""
        stored = [
            self._store.owner(self._ids[name]) for name, player in self._players.items() if not player.behaviour.hostile
        ]
        return sum(owner is not None and owner.state is OwnerState.BANNED for owner in stored)

    def honest_rejected(self) -> dict[str, int]:
        """Return the rejected claims that honest volunteers made, by verdict code."""
        codes: Counter[str] = Counter()
        for claim, truth in self._truths.items():
            if not self._players[truth.owner].behaviour.hostile:
                code, outcome = self._verdict(claim)
                codes[code] += outcome == "rejected"
        return {code: count for code, count in codes.items() if count}

    def _verdict(self, claim: Digest) -> tuple[str, str]:
        attempt = self._store.attempt_of_claim(claim)
        if attempt is None or attempt.verdict_envelope is None:
            return "", ""
        verdict = parse_payload(Verdict, parse_envelope(attempt.verdict_envelope).payload)
        return verdict.code, verdict.outcome

    def _audited(self, claim: Digest) -> bool:
        attempt = self._store.attempt_of_claim(claim)
        return attempt is not None and attempt.reason is not None

    def _is_unmerged(self, claim: Digest) -> bool:
        attempt = self._store.attempt_of_claim(claim)
        unit = None if attempt is None else self._store.unit(attempt.unit)
        return unit is not None and unit.unmerged_in is not None
