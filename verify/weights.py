"""How much each delta counts in a merge: whole numbers that follow from the public record alone.

A delta's weight, in units of 2^-24, comes about in five steps, for deltas in the order of their claim digests:

    1 share    samples * discount^late * influence, an exact integer; deltas whose share is 0 weigh 0 and leave here
    2 clip     c = min(1, norm_bound * median norm / norm), over the deltas that are left
    3 robust   the run's rule, by the Gram matrix of the clipped sketches, with the shares as prior weights. It only
               takes away, and only from what no audit confirmed: known honest work is not thrown away
    4 cap      no owner has more than `owner_cap` of the merge, if the others can fill the rest; what is cut off goes
               to the others in proportion. Among fewer owners than that takes, all have equally much
    5 round    to whole units that sum to 2^24 by largest remainder, ties by claim digest; then each is multiplied by
               its c and rounded down, so that a merge may weigh less than one, and never more

A run that replays nothing (mode "none") has steps 1 and 5 alone, and its merges weigh exactly one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Self

import numpy as np

from diloco.merge import WEIGHT_ONE, normalise_weights
from diloco.tables import Floats
from diloco.weigh import gram
from protocol.documents import Digest, MergeEntry, Rounds, Verification
from protocol.errors import RoundTooOld
from verify.robust import robust_shares

DISCOUNT_BITS = 24
"""`Rounds.staleness_discount` and a candidate's influence count in units of 2^-24."""
_FACTOR_BITS: Final = 60
"""Robust and capped weights become whole numbers of 2^-60, far below what a weight is rounded to in the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A delta that may be merged.

    claim: the digest of its claim. samples: that it was trained on. late: rounds by which its bytes came late.
    influence: what its owner's record lets it count, in 2^-24. member: its owner's pseudonym. audited: an audit
    confirmed it.
    """

    claim: Digest
    samples: int
    late: int
    influence: int
    member: Digest
    audited: bool

    @classmethod
    def of(cls, entry: MergeEntry) -> Self:
        """Return the candidate that an entry of a manifest was."""
        return cls(
            claim=Digest(entry.claim),
            samples=entry.samples,
            late=entry.late,
            influence=entry.influence,
            member=Digest(entry.member),
            audited=entry.audited,
        )


def needs_sketches(verification: Verification) -> bool:
    """Return whether the run's weights follow from the directions of the deltas."""
    return verification.mode != "none" and verification.weighting != "mean"


def needs_norms(verification: Verification) -> bool:
    """Return whether the run's weights follow from the sizes of the deltas, and its manifests carry a seed."""
    return verification.mode != "none"


def merge_weights(
    candidates: Sequence[Candidate],
    *,
    rules: Rounds,
    verification: Verification,
    sketches: Sequence[Floats] | None,
    norms2: Sequence[float] | None,
) -> tuple[int, ...]:
    """Return the weights of a merge in units of 2^-24, in the order of the candidates.

    Args:
        sketches, norms2: of each candidate, under the round's seed (`diloco.weigh.weigh_delta`); None will do where
            `needs_sketches` and `needs_norms` say so.

    Raises:
        RoundTooOld: a candidate is later than the staleness bound.
        ValueError: no candidates, one twice, one without samples, none with any weight, or missing measurements.
    """
    _check(candidates, rules)
    shares = _shares(candidates, rules)
    order = sorted((i for i, share in enumerate(shares) if share), key=lambda i: candidates[i].claim)
    if not order:
        raise ValueError("the staleness discount and the owners' records leave no candidate any weight")
    weights = [0] * len(candidates)
    if verification.mode == "none":
        parts, clips = [shares[i] for i in order], [1.0] * len(order)
    else:
        if norms2 is None or len(norms2) != len(candidates):
            raise ValueError("this run weighs by norms: every candidate needs one")
        clips = norm_clips([norms2[i] for i in order], verification.norm_bound)
        robust = _robust(
            [shares[i] for i in order],
            [candidates[i].audited for i in order],
            None if sketches is None else [sketches[i] for i in order],
            clips,
            verification,
        )
        parts = _capped(robust, [candidates[i].member for i in order], verification.owner_cap)
    for i, whole, clip in zip(order, _rounded(parts, [candidates[i].claim for i in order]), clips, strict=True):
        weights[i] = math.floor(whole * clip)
    return tuple(weights)


def _check(candidates: Sequence[Candidate], rules: Rounds) -> None:
    if not candidates or min(candidate.samples for candidate in candidates) < 1:
        raise ValueError("a merge needs candidates with samples")
    if any(candidate.late < 0 or not 0 <= candidate.influence <= WEIGHT_ONE for candidate in candidates):
        raise ValueError("a candidate is late by 0 rounds or more, and its influence is between 0 and 1")
    if len({candidate.claim for candidate in candidates}) != len(candidates):
        raise ValueError("a claim can be merged only once")
    oldest = max(candidate.late for candidate in candidates)
    if oldest > rules.staleness_bound:
        raise RoundTooOld(
            f"A delta came {oldest} rounds late; the run merges work that is up to {rules.staleness_bound} rounds late."
        )


def _shares(candidates: Sequence[Candidate], rules: Rounds) -> list[int]:
    # All over the same denominator, 2^(24 (oldest + 1)), so that nothing is rounded before the end.
    oldest = max(candidate.late for candidate in candidates)
    return [
        candidate.samples * candidate.influence * rules.staleness_discount**candidate.late
        << DISCOUNT_BITS * (oldest - candidate.late)
        for candidate in candidates
    ]


def norm_clips(norms2: Sequence[float], bound: float) -> list[float]:
    """Return the factor, at most one, that brings each delta's norm within `bound` times the median norm."""
    norms = [math.sqrt(norm2) for norm2 in norms2]
    ordered = sorted(norms)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2.0
    largest = bound * median
    # A median of zero measures nothing: more than half of the deltas are empty.
    return [1.0 if norm <= largest or median == 0.0 else largest / norm for norm in norms]


def _robust(
    shares: list[int],
    audited: Sequence[bool],
    sketches: Sequence[Floats] | None,
    clips: Sequence[float],
    verification: Verification,
) -> list[int]:
    """Return whole numbers in proportion to the weights that the run's rule leaves."""
    if not needs_sketches(verification) or all(audited):
        return shares
    if sketches is None:
        raise ValueError(f"the weighting {verification.weighting!r} needs a sketch of every candidate")
    clipped = [np.multiply(sketch, np.float32(clip)) for sketch, clip in zip(sketches, clips, strict=True)]
    factors = robust_shares(verification.weighting, gram(clipped), shares, hostile_share=verification.hostile_share)
    whole = [(share << _FACTOR_BITS) // sum(shares) for share in shares]
    left = [math.floor(math.ldexp(factor, _FACTOR_BITS)) for factor in factors]
    return [full if known else min(full, rest) for full, rest, known in zip(whole, left, audited, strict=True)]


def _capped(parts: Sequence[int], members: Sequence[Digest], cap: int) -> list[int]:
    """Return whole numbers in proportion to the parts after no member has more than `cap` / 2^24 of their sum.

    Members are filled like vessels: whoever would be over the cap is held to it, and what is left is shared out among
    the others as before, which may bring the next one over it.
    """
    sums: dict[Digest, int] = {}
    for member, part in zip(members, parts, strict=True):
        sums[member] = sums.get(member, 0) + part
    filled = sorted((member for member in sums if sums[member]), key=lambda member: (-sums[member], member))
    limit = max(Fraction(cap, WEIGHT_ONE), Fraction(1, len(filled)))
    left, rest = Fraction(1), sum(sums.values())
    scale: dict[Digest, Fraction] = {member: Fraction(0) for member in sums}
    for position, member in enumerate(filled):
        if sums[member] * left <= limit * rest:
            for other in filled[position:]:
                scale[other] = left / rest
            break
        scale[member] = limit / sums[member]
        left -= limit
        rest -= sums[member]
    return [math.floor(part * scale[member] * 2**_FACTOR_BITS) for part, member in zip(parts, members, strict=True)]


def _rounded(parts: Sequence[int], claims: Sequence[Digest]) -> list[int]:
    """Return the parts as weights that sum to 2^24; a part of 0 stays 0."""
    counting = [i for i, part in enumerate(parts) if part]
    weights = [0] * len(parts)
    normalised = normalise_weights([parts[i] for i in counting], [bytes.fromhex(claims[i]) for i in counting])
    for i, weight in zip(counting, normalised, strict=True):
        weights[i] = weight
    return weights
