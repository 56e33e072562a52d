"""The lifecycle of a round, and the rule that says when it closes.

Round r trains from checkpoint r - 1 and publishes checkpoint r. What it merges is fixed at its close. Pure rules: the
time is passed in. Source: PROTOCOL.md section 6.
"""

from dataclasses import dataclass, replace
from enum import Enum, unique
from typing import Final, TypeAlias

from protocol.documents import Digest, MergeEntry, Rounds, UnmergeEntry
from protocol.errors import IllegalTransition


@unique
class RoundState(Enum):
    """Where a round stands."""

    COLLECTING = "collecting"  # its units are leased and claimed
    CLOSED = "closed"  # the merge set is fixed
    MERGING = "merging"  # the new checkpoint is being computed
    PUBLISHED = "published"  # end: the checkpoint's manifest is out


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round. Times are UTC milliseconds; `manifest_sha256` comes with the end.

    Fixed by the close: what is merged, what is taken out again (`unmerge`), and the seed of the sketches that
    weighed it (None where nothing was weighed by sketch).
    """

    round: int
    opened_ms: int
    state: RoundState = RoundState.COLLECTING
    closed_ms: int | None = None
    merge: tuple[MergeEntry, ...] = ()
    unmerge: tuple[UnmergeEntry, ...] = ()
    weigh_seed: Digest | None = None
    manifest_sha256: Digest | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The round takes nothing more into its merge, which is `merge`, weights included, and `unmerge`."""

    now_ms: int
    merge: tuple[MergeEntry, ...]
    unmerge: tuple[UnmergeEntry, ...]
    weigh_seed: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStarted:
    """A process computes the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInterrupted:
    """That process died or gave up; nothing was published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The checkpoint's signed manifest has its name; `manifest_sha256` is the digest of its payload."""

    manifest_sha256: Digest


RoundEvent: TypeAlias = Closed | MergeStarted | MergeInterrupted | Published

TRANSITIONS: Final[dict[tuple[RoundState, type[RoundEvent]], RoundState]] = {
    (RoundState.COLLECTING, Closed): RoundState.CLOSED,
    (RoundState.CLOSED, MergeStarted): RoundState.MERGING,
    # The merge set is fixed, so merging again gives the same bytes: an interruption costs time only.
    (RoundState.MERGING, MergeInterrupted): RoundState.CLOSED,
    (RoundState.MERGING, Published): RoundState.PUBLISHED,
}
"""Every legal move of a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRound:
    """Compute and publish the checkpoint of `round`."""

    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRound:
    """Open `round`, unless the run has no more rounds planned."""

    round: int


Instruction: TypeAlias = MergeRound | OpenRound


def advance(thing: Round, event: RoundEvent) -> tuple[Round, tuple[Instruction, ...]]:
    """Return the round after `event`, and what the caller must do now; raise `IllegalTransition`."""
    state = TRANSITIONS.get((thing.state, type(event)))
    if state is None:
        raise IllegalTransition(f"Round {thing.round} is {thing.state.value}; {type(event).__name__} does not fit.")
    moved = replace(thing, state=state)
    match event:
        case Closed():
            closed = replace(
                moved,
                closed_ms=event.now_ms,
                merge=event.merge,
                unmerge=event.unmerge,
                weigh_seed=event.weigh_seed,
            )
            return closed, (MergeRound(round=thing.round),)
        case MergeInterrupted():
            return moved, (MergeRound(round=thing.round),)
        case Published():
            return replace(moved, manifest_sha256=event.manifest_sha256), (OpenRound(round=thing.round + 1),)
        case MergeStarted():
            return moved, ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFacts:
    """What the closing rule looks at.

    `ready`: units of the round whose result may be merged now: confirmed by an audit, or of an established owner and
    not drawn. `ended`: units of the round that came to an end without a merge. `total`: units of the round.
    """

    now_ms: int
    ready: int
    ended: int
    total: int


def is_due(thing: Round, rules: Rounds, facts: RoundFacts) -> bool:
    """Say whether a collecting round must close now.

    Either every unit is ready or has ended, or the minimum window has passed and enough units are ready. Only work that
    is confirmed or of established owners counts: else those who skip work and finish first would own the round. A round
    never closes with nothing to merge.
    """
    if thing.state is not RoundState.COLLECTING or facts.ready == 0:
        return False
    if facts.ready + facts.ended >= facts.total:
        return True
    return facts.now_ms - thing.opened_ms >= rules.min_window_ms and facts.ready >= rules.min_units


def suits_short(rules: Rounds, long_ms: int | None) -> bool:
    """Say whether a machine had better get a short unit, if there is one.

    It had if a long one takes it more than half of a round's window, since most of its work would come late then; and
    if nobody knows how long one takes it, since a newcomer's work is audited, whatever its size.

    Args:
        long_ms: how long a long unit took it, or would have taken it; None if it has claimed none yet.
    """
    return long_ms is None or 2 * long_ms > rules.min_window_ms


def gives_units(thing: Round, rules: Rounds) -> bool:
    """Say whether open units of a round, the newest one, may be leased.

    While it collects, and while it is merged too: a merge takes minutes, in which nobody can train from what comes of
    it. What comes of such a unit is one round late, discounted for that, and worth more than idle machines; unless no
    later merge may take it.
    """
    if thing.state is RoundState.COLLECTING:
        return True
    return thing.state is not RoundState.PUBLISHED and rules.staleness_bound >= 1 and thing.round < rules.planned
