"""Robust weighting: from the inner products of a merge's deltas alone, one weight for each of them.

The rules (sources in brackets) see deltas through the Gram matrix of their sketches and name how much of each delta the
merge should take; none of them ever touches a coordinate, which is why robustness can be as cheap as the plain mean.

    mean              what every delta weighs anyhow
    geometric-median  Weiszfeld's iteration (Pillutla et al., arXiv 1912.13445)
    multi-krum        the n - f deltas whose n - f - 2 nearest neighbours are nearest (Blanchard et al., 2017)
    nnm-clip          near-duplicates count as one; every delta is mixed with its nearest neighbours that together make
                      up the honest share (Allouah et al., arXiv 2302.01772); centered clipping of the mixtures
                      (Karimireddy et al., arXiv 2012.10333)

Canonical: float64, separate numpy calls on elements, `math.fsum`, and ties to the delta that stands first. Callers give
deltas in the order of their claim digests, so that all machines break ties alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

_ONE: Final = 1 << 24
_WEISZFELD_STEPS: Final = 32
_CLIPPING_STEPS: Final = 8
_FEWEST: Final = 4
"""Of two deltas nobody can say which is the odd one; among three, a rule would throw away a third of honest work."""
_NEAR: Final = 2.0**-20
"""Distances count as at least this share of the typical one, so that a delta on the median does not divide by zero."""

Matrix = npt.NDArray[np.float64]


def robust_shares(
    rule: str, gram: npt.NDArray[np.int64] | Sequence[Sequence[int]], shares: Sequence[int], *, hostile_share: int
) -> tuple[float, ...]:
    """Return one weight for each delta, at least 0, summing to one up to rounding.

    Args:
        rule: "mean", "geometric-median", "multi-krum" or "nnm-clip".
        gram: inner products of the deltas' sketches, in the order of their claim digests.
        shares: what each delta weighs by itself (samples, discount, influence), positive, on any common scale.
        hostile_share: share of the deltas that may be hostile, in 2^-24, below one half.

    Raises:
        ValueError: no deltas, a share that is not positive, a Gram matrix of another size, or an unknown rule.
    """
    if not shares or min(shares) < 1:
        raise ValueError("robust weights need at least one delta, and every delta a positive share")
    products = np.array(gram, dtype=np.int64).astype(np.float64)
    if products.shape != (len(shares), len(shares)):
        raise ValueError(f"{len(shares)} deltas have a Gram matrix of shape {products.shape}")
    if rule not in _RULES:
        raise ValueError(f"there is no weighting {rule!r}")
    cohort = _cohort(products, shares, hostile_share)
    return tuple(cohort.prior if len(shares) < _FEWEST else _normalised(_RULES[rule](cohort)))


def near_duplicates(gram: Matrix | npt.NDArray[np.int64], *, hostile_share: int) -> npt.NDArray[np.bool_]:
    """Return bool[n, n]: which two deltas are closer than chance, the diagonal included.

    Honest deltas of different units resemble each other, and all to about the same degree; copies differ by their
    dither alone. Two deltas are near-duplicates if the cosine between them exceeds the typical one by more than half of
    what is left to one. The median of all pairs would not be typical: with 3 hostile deltas of 8, only 10 of 28 pairs
    are honest. So it is the cosine in that place, from the top, where an honest pair stands whether the hostile ones
    are copies of each other (and stand above) or not. Deltas of zero are duplicates of each other. Needs four deltas.

    Args:
        hostile_share: share of the deltas that may be hostile, in 2^-24, below one half.
    """
    products = gram.astype(np.float64)
    count = len(products)
    if count < _FEWEST:
        return np.eye(count, dtype=bool)
    cosines = _cosines(products)
    pairs = sorted((float(cosines[i, j]) for i in range(count) for j in range(i + 1, count)), reverse=True)
    hostile = count * hostile_share // _ONE
    place = (math.comb(hostile, 2) + math.comb(count - hostile, 2) - 1) // 2
    typical = max(0.0, pairs[place])
    close: npt.NDArray[np.bool_] = cosines > typical + 0.5 * (1.0 - typical)
    return np.eye(count, dtype=bool) | close


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cohort:
    """What a rule sees: inner products, what each delta weighs by itself (exact, and as weights), the hostile share."""

    products: Matrix
    shares: Sequence[int]
    prior: Sequence[float]
    hostile_share: int


def _mean(cohort: _Cohort) -> Sequence[float]:
    return cohort.prior


def _geometric_median(cohort: _Cohort) -> Sequence[float]:
    weights = cohort.prior
    for _ in range(_WEISZFELD_STEPS):
        distances = _distances(cohort.products, weights)
        least = _NEAR * _median(sorted(distances))
        if least == 0.0:
            break  # more than half of the deltas are one and the same, and the median is that one
        pulls = [share / max(least, distance) for share, distance in zip(cohort.prior, distances, strict=True)]
        weights = _normalised(pulls)
    return weights


def _multi_krum(cohort: _Cohort) -> Sequence[float]:
    count = len(cohort.prior)
    hostile = min(count * cohort.hostile_share // _ONE, (count - 3) // 2)
    nearest = np.sort(_pair_distances2(cohort.products), axis=1)[:, 1 : count - hostile - 1]  # without itself
    scores = [math.fsum(row) for row in nearest.tolist()]
    chosen = set(sorted(range(count), key=lambda i: (scores[i], i))[: count - hostile])
    return [prior if i in chosen else 0.0 for i, prior in enumerate(cohort.prior)]


def _nnm_clip(cohort: _Cohort) -> Sequence[float]:
    # A group of copies has the say of one delta.
    near = near_duplicates(cohort.products, hostile_share=cohort.hostile_share)
    copies = [int(count) for count in np.count_nonzero(near, axis=1)]
    whole = math.lcm(*copies)
    single = _cohort(
        cohort.products,
        [share * (whole // copy) for share, copy in zip(cohort.shares, copies, strict=True)],
        cohort.hostile_share,
    )
    mixing = _neighbour_mixing(single)
    centre = _clipped_centre(_product(_product(mixing, single.products), mixing.T), single.prior)
    taken = np.multiply(mixing, np.array(centre)[:, None])
    return [math.fsum(column) for column in taken.T.tolist()]


_RULES: Final[dict[str, Callable[[_Cohort], Sequence[float]]]] = {
    "mean": _mean,
    "geometric-median": _geometric_median,
    "multi-krum": _multi_krum,
    "nnm-clip": _nnm_clip,
}


def _cohort(products: Matrix, shares: Sequence[int], hostile_share: int) -> _Cohort:
    total = sum(shares)
    # Python's division of integers rounds correctly, however large they are.
    prior = tuple(share / total for share in shares)
    return _Cohort(products=products, shares=shares, prior=prior, hostile_share=hostile_share)


def _neighbour_mixing(cohort: _Cohort) -> Matrix:
    """Return float64[n, n]: how each delta is mixed from its nearest ones, up to the honest share of all weight."""
    count = len(cohort.prior)
    honest = (_ONE - cohort.hostile_share) * sum(cohort.shares)
    mixing = np.zeros((count, count))
    for i, order in enumerate(np.argsort(_pair_distances2(cohort.products), axis=1, kind="stable").tolist()):
        reached = 0
        taken = []
        for j in order:
            taken.append(j)
            reached += cohort.shares[j]
            if reached * _ONE >= honest:
                break
        total = math.fsum(cohort.prior[j] for j in taken)
        for j in taken:
            mixing[i, j] = cohort.prior[j] / total
    return mixing


def _clipped_centre(products: Matrix, prior: Sequence[float]) -> list[float]:
    """Return the centre of centered clipping as weights of its points.

    It starts from the point with the least total distance to all, and pulls towards every point at most as far as the
    median distance.
    """
    count = len(prior)
    between = np.sqrt(_pair_distances2(products))
    totals = [math.fsum(row) for row in np.multiply(between, np.array(prior)).tolist()]
    start = min(range(count), key=lambda i: (totals[i], i))
    weights = [1.0 if i == start else 0.0 for i in range(count)]
    for _ in range(_CLIPPING_STEPS):
        distances = _distances(products, weights)
        radius = _median(sorted(distances))
        pulls = [
            share * (1.0 if distance <= radius else radius / distance)
            for share, distance in zip(prior, distances, strict=True)
        ]
        left = max(0.0, 1.0 - math.fsum(pulls))
        weights = [weight * left + pull for weight, pull in zip(weights, pulls, strict=True)]
    return weights


def _distances(products: Matrix, weights: Sequence[float]) -> list[float]:
    """Return each delta's distance from the weighted mean of all of them."""
    coefficients = np.array(weights)
    towards = [math.fsum(row) for row in np.multiply(products, coefficients).tolist()]
    norm2 = math.fsum(np.multiply(np.array(towards), coefficients).tolist())
    own = np.diagonal(products).tolist()
    return [math.sqrt(max(0.0, math.fsum((own[i], -2.0 * towards[i], norm2)))) for i in range(len(own))]


def _pair_distances2(products: Matrix) -> Matrix:
    """Return the squared distances between deltas; exactly 0 on the diagonal."""
    own = np.diagonal(products)
    total = np.add(own[:, None], own[None, :])
    twice = np.multiply(products, 2.0)
    distances2: Matrix = np.maximum(np.subtract(total, twice), 0.0)
    np.fill_diagonal(distances2, 0.0)
    return distances2


def _cosines(products: Matrix) -> Matrix:
    """Return the cosines between deltas; between two deltas of zero it is 1, between one and another delta 0."""
    norms = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    scale = np.multiply(norms[:, None], norms[None, :])
    cosines: Matrix = np.divide(products, np.where(scale > 0.0, scale, 1.0))
    silent = norms == 0.0
    return np.where(silent[:, None] & silent[None, :], 1.0, cosines)


def _product(a: Matrix, b: Matrix) -> Matrix:
    """Return the matrix product as a fixed chain of elementwise operations, which a BLAS would order as it likes."""
    total = np.zeros((len(a), b.shape[1]))
    term = np.empty_like(total)
    for k in range(len(b)):
        np.multiply(a[:, k, None], b[k], out=term)
        np.add(total, term, out=total)
    return total


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2.0


def _normalised(weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
