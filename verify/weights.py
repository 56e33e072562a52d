"""How much each delta counts in a merge: whole numbers that follow from the public record alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from diloco.merge import normalise_weights
from protocol.documents import Digest, Rounds
from protocol.errors import RoundTooOld

DISCOUNT_BITS = 24
"""`Rounds.staleness_discount` counts in units of 2^-24."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A delta that may be merged: the digest of its claim, the round of its unit, the samples it was trained on."""

    claim: Digest
    round: int
    samples: int


def merge_weights(candidates: Sequence[Candidate], *, merging_round: int, rules: Rounds) -> tuple[int, ...]:
    """Return the weights of a merge in units of 2^-24, in the order of the candidates; they sum to exactly one.

    A delta's share is its samples times discount^age, age being the rounds by which it is late. Shares are compared as
    exact integers; what rounding leaves over goes by largest remainder, ties by claim digest.

    Raises:
        RoundTooOld: a candidate is later than the staleness bound.
        ValueError: no candidates, one twice, one of a later round or without samples, or none with any weight.
    """
    ages = [merging_round - candidate.round for candidate in candidates]
    if not candidates or min(ages) < 0 or min(candidate.samples for candidate in candidates) < 1:
        raise ValueError("a merge needs candidates with samples, of its own round or earlier")
    if len({candidate.claim for candidate in candidates}) != len(candidates):
        raise ValueError("a claim can be merged only once")
    oldest = max(ages)
    if oldest > rules.staleness_bound:
        raise RoundTooOld(
            f"A unit of round {merging_round - oldest} is {oldest} rounds late for round {merging_round}; "
            f"the run merges work that is up to {rules.staleness_bound} rounds late."
        )
    # Every share over the same denominator, 2^(24 * oldest), so that nothing is rounded before the end.
    shares = [
        candidate.samples * rules.staleness_discount**age << DISCOUNT_BITS * (oldest - age)
        for candidate, age in zip(candidates, ages, strict=True)
    ]
    counting = [index for index, share in enumerate(shares) if share]
    if not counting:
        raise ValueError("the staleness discount leaves no candidate any weight")
    weights = [0] * len(candidates)
    normalised = normalise_weights(
        [shares[index] for index in counting], [bytes.fromhex(candidates[index].claim) for index in counting]
    )
    for index, weight in zip(counting, normalised, strict=True):
        weights[index] = weight
    return tuple(weights)
