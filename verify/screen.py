"""Which deltas of a merge stand out so far that they are audited before they may be merged.

Looks at a round's deltas, each against the others of the same round:

    few         deltas of fewer than three owners: nothing to compare with, so each is audited
    norm        over `norm_bound` times the median norm, or under its inverse; or far from it by the cohort's spread
    duplicate   closer to another delta than chance allows (`verify.robust.near_duplicates`); both are meant
    direction   points elsewhere than the mean of the others, far more so than is usual in this cohort
    loss        makes held-out loss worse than the others do, over all timesteps or in one quarter of them; or worse
                by a tenth of the loss itself

An outlier is a question, not a finding: only a replay answers it. Every honest delta that is asked about costs an
audit, so thresholds lie where honest deltas of real small units practically never come, and widen for small cohorts,
whose spread is known badly, unless a difference is large by itself: by a fifth of the norm, by a tenth of the loss.
Measured on 816 honest deltas of two small runs (0.08 million parameters, 10 steps), the looks that do not widen
on 320 of two more, drawn into cohorts of 3 to 24: fewer than 1 in 1,000 were flagged.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from diloco.evaluate import TripleLoss
from protocol.documents import Digest, Verification
from verify.robust import near_duplicates

Reason = Literal["few", "norm", "duplicate", "direction", "loss"]

STRATA: Final = 4
"""Quarters of the timesteps, in which losses are compared one by one: poison may sit in some timesteps only."""
_FEWEST: Final = 4
_FEWEST_OWNERS: Final = 3
_NORM_SPREADS: Final = 3.0
_NORM_CLEAR: Final = math.log(1.22)
"""Of a norm over the median, as a logarithm: closer than that is honest, however alike the others are. Honest norms
vary by 2 to 4 %; half of the steps make a delta shorter by 27 to 40 %."""
_LOSS_CLEAR: Final = 0.1
"""Of the held-out loss: no honest delta makes it worse by so much more than the others do."""
_LOSS_CLEAR_SPREADS: Final = 3.0
_DIRECTION_SPREADS: Final = 3.5
_LOSS_SPREADS: Final = 5.0
_SMALL_COHORT: Final = 8.0
"""Spreads count 1 + this / (n - 2) times as many: of four deltas, the spread is hardly known."""
_LEAST_SPREAD: Final = 0.03
"""Of a cosine: the error of a sketch, below which no spread is believed."""
_PAIRED_ERRORS: Final = 4.0
_GROWTH: Final = 0.6
"""How a delta grows with the samples of its unit: half of the steps make its norm 0.59 to 0.74 of what it would be."""
_SIGMA: Final = 1.4826
"""Median absolute deviation to standard deviation, for normal numbers."""


def loss_changes(before: Sequence[TripleLoss], after: Sequence[TripleLoss]) -> tuple[float, ...]:
    """Return by how much each triple's loss rose, in the order of the timesteps.

    Args:
        before: `diloco.evaluate.heldout_losses` of the base.
        after: the same of the base less one delta: the base's own next step if there were no other.
    """
    if [triple.t for triple in before] != [triple.t for triple in after]:
        raise ValueError("losses can be compared only on the same triples")
    return tuple(b.loss - a.loss for a, b in zip(before, after, strict=True))


def outliers(
    claims: Sequence[Digest],
    *,
    members: Sequence[str],
    norms2: Sequence[float],
    samples: Sequence[int],
    gram: npt.NDArray[np.int64],
    audited: Collection[str],
    changes: Mapping[Digest, Sequence[float]] | None,
    base_loss: float,
    verification: Verification,
) -> dict[Digest, Reason]:
    """Return the unaudited deltas that stand out among the deltas of a merge, and by what.

    Deltas that an audit confirmed are part of the cohort and never outliers. Not canonical where losses are compared;
    nothing but audits follows from it.

    Args:
        members: the owner of each delta, by its pseudonym.
        norms2: squared norm of each delta (`diloco.weigh.weigh_delta`).
        samples: that each was trained on. Norms and losses are compared as if all had the same.
        gram: inner products of their sketches (`diloco.weigh.gram`), clipped to `norm_bound` as for the weights.
        changes: `loss_changes` of each delta that was tried on held-out triples; None where the run tries none.
        base_loss: mean held-out loss of the base on the same triples; anything where none are tried.
    """
    if not len(claims) == len(members) == len(norms2) == len(samples) == len(gram):
        raise ValueError(f"{len(claims)} claims, {len(norms2)} norms and {len(gram)} sketches do not belong together")
    if len(set(members)) < _FEWEST_OWNERS:
        return {claim: "few" for claim in claims if claim not in audited}
    growth = [(max(samples) / count) ** _GROWTH for count in samples]
    norms2 = [norm2 * factor**2 for norm2, factor in zip(norms2, growth, strict=True)]
    tried = [_grown(changes, claim, factor) for claim, factor in zip(claims, growth, strict=True)]
    looks: tuple[tuple[Reason, Callable[[Sequence[int]], Sequence[bool]]], ...] = (
        ("norm", lambda rows: _norm_outliers([norms2[i] for i in rows], verification.norm_bound)),
        ("duplicate", lambda rows: _duplicates(gram[np.ix_(rows, rows)], verification.hostile_share)),
        ("direction", lambda rows: _direction_outliers(gram[np.ix_(rows, rows)].astype(np.float64))),
        ("loss", lambda rows: _loss_outliers([tried[i] for i in rows], base_loss)),
    )
    found: dict[Digest, Reason] = {}
    left = list(range(len(claims)))
    for reason, look in looks:
        # What one look has found must not bend the cohort that the next one compares with.
        flagged = {i for i, flag in zip(left, look(left), strict=True) if flag and claims[i] not in audited}
        found.update((claims[i], reason) for i in sorted(flagged))
        left = [i for i in left if i not in flagged]
    return found


def _grown(changes: Mapping[Digest, Sequence[float]] | None, claim: Digest, factor: float) -> Sequence[float] | None:
    change = None if changes is None else changes.get(claim)
    return None if change is None else [value * factor for value in change]


def _norm_outliers(norms2: Sequence[float], bound: float) -> list[bool]:
    norms = [math.sqrt(norm2) for norm2 in norms2]
    median = float(np.median(norms))
    far = [norm > bound * median or norm * bound < median for norm in norms]
    if median == 0.0:
        return far
    # Logarithms: a third of the median is as far from it as three times the median is. What is far already must not
    # widen the spread.
    logs = np.log(np.array([norm / median for norm, is_far in zip(norms, far, strict=True) if not is_far]))
    limit = max(_NORM_CLEAR, _NORM_SPREADS * _spread(logs))
    return [is_far or abs(math.log(norm / median)) > limit for norm, is_far in zip(norms, far, strict=True)]


def _direction_outliers(products: npt.NDArray[np.float64]) -> list[bool]:
    if len(products) < _FEWEST:
        return [False] * len(products)
    own = np.diagonal(products)
    towards = products.sum(axis=1) - own
    others = np.sqrt(np.maximum(products.sum() - 2.0 * towards - own, 0.0))
    lengths = np.sqrt(own) * others
    cosines = np.divide(towards, lengths, out=np.zeros(len(own)), where=lengths > 0.0)
    median = float(np.median(cosines))
    spread = max(_LEAST_SPREAD, _spread(cosines))
    far = cosines < median - _DIRECTION_SPREADS * _widening(len(own)) * spread
    # A wide spread alone is no reason: what still points halfway along with the others is not flagged.
    return [bool(flag) for flag in far & (cosines < 0.5 * median)]


def _duplicates(gram: npt.NDArray[np.int64], hostile_share: int) -> list[bool]:
    if len(gram) < _FEWEST:
        return [False] * len(gram)
    near = near_duplicates(gram, hostile_share=hostile_share)
    return [int(count) > 1 for count in np.count_nonzero(near, axis=1)]


def _loss_outliers(changes: Sequence[Sequence[float] | None], base_loss: float) -> list[bool]:
    # What makes a loss that is no number stands out by that, and must not make the others' medians one.
    flags = [change is not None and not all(map(math.isfinite, change)) for change in changes]
    tried = [index for index, change in enumerate(changes) if change is not None and not flags[index]]
    if len(tried) < _FEWEST:
        return flags
    table_NT = np.array([changes[index] for index in tried], dtype=np.float64)
    excess_NT = table_NT - np.median(table_NT, axis=0)
    worse = _worse(table_NT, excess_NT) | _clearly_worse(table_NT, excess_NT, _LOSS_CLEAR * base_loss)
    for part_NT, excess in zip(
        np.array_split(table_NT, STRATA, axis=1), np.array_split(excess_NT, STRATA, axis=1), strict=True
    ):
        worse |= _worse(part_NT, excess)
    for index, flag in zip(tried, worse.tolist(), strict=True):
        flags[index] = flag
    return flags


def _worse(changes_NT: npt.NDArray[np.float64], excess_NT: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return whose mean change is far above the cohort's, by the cohort's spread and by its own triples' error."""
    means = changes_NT.mean(axis=1)
    return _surely_above(excess_NT, means, _LOSS_SPREADS * _widening(len(means)) * _spread(means))


def _clearly_worse(
    changes_NT: npt.NDArray[np.float64], excess_NT: npt.NDArray[np.float64], clear: float
) -> npt.NDArray[np.bool_]:
    """Return whose mean change is above the cohort's by `clear`, and by the cohort's spread without any widening."""
    means = changes_NT.mean(axis=1)
    return _surely_above(excess_NT, means, max(clear, _LOSS_CLEAR_SPREADS * _spread(means)))


def _surely_above(
    excess_NT: npt.NDArray[np.float64], means: npt.NDArray[np.float64], limit: float
) -> npt.NDArray[np.bool_]:
    count, triples = excess_NT.shape
    if triples < 2:
        return np.zeros(count, dtype=bool)
    far: npt.NDArray[np.bool_] = means - np.median(means) > limit
    errors = excess_NT.std(axis=1, ddof=1) / math.sqrt(triples)
    sure: npt.NDArray[np.bool_] = excess_NT.mean(axis=1) > _PAIRED_ERRORS * errors
    return np.logical_and(far, sure)


def _spread(values: npt.NDArray[np.float64]) -> float:
    return _SIGMA * float(np.median(np.abs(values - np.median(values))))


def _widening(count: int) -> float:
    return 1.0 + _SMALL_COHORT / (count - 2)
