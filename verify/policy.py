"""Who is audited how often, how much an unaudited delta counts, and what such a policy lets through.

An owner's record is `valid_in_row`, the audits that it passed without a failure in between. Units that were not audited
prove nothing and do not count. Shares and probabilities are whole numbers in units of 2^-24, so that a volunteer's
client can check every draw against the epoch's secret once that is revealed.

Why there is a floor: with a probability of 1 / record alone, whoever passed 1,000 audits could expect to merge 999
poisons before the next one.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.documents import Digest, Verification

ONE: Final = 1 << 24
"""A share or probability of one."""
_HASH_BITS: Final = 256
_SHARE_BITS: Final = 24
_TRUSTED_AT_MOST: Final = 1_000
"""Where a policy's floor is so low that no record ever reaches it, a sleeper is taken to wake after so many audits."""
_NEGLIGIBLE: Final = 1e-12
_QUANTILE: Final = 0.99


def audit_share(v: Verification, *, established: bool, valid_in_row: int) -> int:
    """Return the probability with which an owner's next claim is audited, in 2^-24: max(floor, 1 / record).

    One for an owner on probation or without a record; zero where the run replays nothing.
    """
    if v.mode == "none":
        return 0
    if not established or valid_in_row < 1:
        return ONE
    return min(ONE, max(v.floor, -(-ONE // valid_in_row)))


def by_size(share: int, *, samples: int, most: int) -> int:
    """Return the probability of an audit of a unit of so many samples, where the largest have `most`.

    In proportion, since a delta counts by its samples: else long units would be the cheap ones to poison. What is
    certain stays certain, and what is never audited stays so.
    """
    return share if share in (0, ONE) else max(1, share * samples // most)


def influence(v: Verification, *, valid_in_row: int, audited: bool) -> int:
    """Return how much a delta may count by its owner's record, in 2^-24; one if an audit confirmed the delta itself."""
    if audited or v.mode == "none":
        return ONE
    return min(ONE, valid_in_row * ONE // v.ramp)


def is_drawn(secret: bytes, claim: Digest, share: int) -> bool:
    """Return whether a claim is audited: HMAC(epoch secret, "audit", claim) / 2^256 is below the probability.

    Args:
        secret: the epoch's secret, 32 bytes, which nobody but the coordinator knows before the claim is made.
        share: the probability that the claim's receipt says, in 2^-24.
    """
    return _is_below(secret, b"audit\0", claim, share)


def is_sampled(secret: bytes, claim: Digest, share: int) -> bool:
    """Return whether a referee replays a claim although a replica agreed with it; `share` is `referee_share`."""
    return _is_below(secret, b"sample\0", claim, share)


def replica_turn(secret: bytes, claim: Digest, owner: str) -> int:
    """Return an owner's place in the order in which a claim's replica is offered, in 2^-24: the lowest come first.

    By chance, and by owner: neither many devices nor asking often gets anybody more replicas than others.

    Args:
        owner: the owner's key id, 64 hex digits.
    """
    message = b"replica\0" + bytes.fromhex(claim) + bytes.fromhex(owner)
    return int.from_bytes(hmac.digest(secret, message, hashlib.sha256)[:3], "big")


def replica_offered(turn: int, *, owners: int, waited: float) -> bool:
    """Return whether a replica is offered to an owner by now.

    At first to one in so many owners, in the end to twice as many, since whoever would be first may have no machine
    running. Never to all: then a partner without work of its own, who asks all the time, would get most replicas of
    those whom it wants to help. What nobody takes goes to an auditor.

    Args:
        turn: `replica_turn`.
        owners: how many could take it. waited: share of the wait for a replica that is over.
    """
    return turn * owners < ONE * (1.0 + waited)


def weigh_seed(secret: bytes, round_number: int) -> bytes:
    """Return the 32-byte seed of a round's weighing sketches, which nobody can know before its deltas are fixed."""
    return hmac.digest(secret, b"weigh/%d" % round_number, hashlib.sha256)


def is_taken_out(v: Verification, raw_difference: float) -> bool:
    """Return whether a merged delta that a referee refuted is taken out of the model again.

    In the place of a refuted delta there should be the honest one. Left in, it is off by what is wrong in it; taken
    out, by all of the honest work that goes with it.

    Args:
        raw_difference: what the referee found, relative to the honest delta.
    """
    return raw_difference >= v.unmerge_from


def too_fast(trained_ms: int, audited_ms: int) -> bool:
    """Return whether a unit took less than half of the shortest time in which its owner did one that was audited.

    Args:
        trained_ms: from lease to claim.
        audited_ms: the shortest such time of the owner's audited units; 0 if none is known, and then nothing is fast.
    """
    return trained_ms * 2 < audited_ms


def _is_below(secret: bytes, purpose: bytes, claim: Digest, share: int) -> bool:
    if not 0 <= share <= ONE:
        raise ValueError(f"a probability of {share} / 2^24 is not between 0 and 1")
    drawn = int.from_bytes(hmac.digest(secret, purpose + bytes.fromhex(claim), hashlib.sha256), "big")
    return drawn < share << (_HASH_BITS - _SHARE_BITS)


# --- what a policy lets through ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisoner:
    """An owner who works honestly up to a record and from then on poisons every unit until it is caught.

    Mixing honest units in between changes none of the numbers but `honest_units`: each poison runs the same risk.

    starts_at: audits passed in a row by then. honest_units: expected, that it must deliver for that.
    audit_share, influence: of its first poison, as numbers from 0 to 1.
    merged, merged_99: poisons merged before the first audit that catches it: expected, and in 99 of 100 cases at most.
    influence_merged: the same expectation with each poison counted by its influence.
    poison_per_honest_unit: `influence_merged` over `honest_units`: what poison costs, since a new key starts again.
    """

    starts_at: int
    honest_units: float
    audit_share: float
    influence: float
    merged: float
    merged_99: int
    influence_merged: float
    poison_per_honest_unit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What auditing an honest owner costs.

    units: its first so many units; None for the long run, after probation and ramp.
    audited: expected share of them that is audited.
    extra_compute: units trained again per unit: a replica for each audit, and a referee for `referee_share` of them.
    share_of_compute: the same as a share of all units trained.
    """

    units: int | None
    audited: float
    extra_compute: float
    share_of_compute: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReport:
    """What a policy lets through, and what it costs.

    detection: probability that an audit recognises a poison.
    at_once: a poisoner who starts as soon as probation ends. sleeper: one who first earns the least audits and the full
        influence that the policy has to give.
    """

    detection: float
    at_once: Poisoner
    sleeper: Poisoner
    overhead: tuple[Overhead, ...]


def assess(v: Verification, *, units: Sequence[int] = (100, 1_000), detection: float = 1.0) -> PolicyReport:
    """Return what an audit policy lets through, by the same functions that the coordinator decides with.

    Counted is what was merged before an audit caught it, though all of it is taken out again afterwards. What robust
    weights, outlier checks and the owner cap take away besides is not counted.

    Args:
        v: of a run that replays.
        units: spans of an honest owner's life for which to say what audits cost.
        detection: probability, above 0, that an audit of a poisoned unit recognises it.

    Raises:
        ValueError: the run replays nothing, or the detection is not a probability above 0.
    """
    if v.mode == "none":
        raise ValueError("this run replays nothing; nothing limits what a poisoner gets in")
    if not 0.0 < detection <= 1.0:
        raise ValueError(f"a detection of {detection} is not a probability above 0")
    spans = (*(_overhead(v, count) for count in units), _cost(v, None, _probability(v, _trusted_at(v))))
    return PolicyReport(
        detection=detection,
        at_once=_poisoner(v, v.probation, detection),
        sleeper=_poisoner(v, _trusted_at(v), detection),
        overhead=spans,
    )


def _probability(v: Verification, valid_in_row: int) -> float:
    return audit_share(v, established=valid_in_row >= v.probation, valid_in_row=valid_in_row) / ONE


def _influence(v: Verification, valid_in_row: int) -> float:
    return influence(v, valid_in_row=valid_in_row, audited=False) / ONE


def _trusted_at(v: Verification) -> int:
    """Return the record from which nothing improves any more."""
    least_audited = -(-ONE // v.floor) if v.floor else _TRUSTED_AT_MOST
    return max(v.probation, v.ramp, min(least_audited, _TRUSTED_AT_MOST))


def _poisoner(v: Verification, starts_at: int, detection: float) -> Poisoner:
    # An audit that misses a poison is one more audit passed. So many misses in a row do not happen.
    misses = 0
    while (1.0 - detection) ** misses > _NEGLIGIBLE:
        misses += 1
    records = range(starts_at, starts_at + misses + 1)
    drawn = np.array([_probability(v, record) for record in records])
    weight = np.array([_influence(v, record) for record in records])
    # At a record, before its next audit, (1 - p) / p poisons are merged by expectation, and one if the audit misses it.
    reached = (1.0 - detection) ** np.arange(len(records))
    unseen = (1.0 - drawn) / drawn
    missed = float(np.sum(reached[1:]))
    influence_merged = float(np.sum(reached * unseen * weight)) + missed
    honest = v.probation + sum(1.0 / _probability(v, record) for record in range(v.probation, starts_at))
    return Poisoner(
        starts_at=starts_at,
        honest_units=honest,
        audit_share=float(drawn[0]),
        influence=float(weight[0]),
        merged=float(np.sum(reached * unseen)) + missed,
        merged_99=_merged_at_most(drawn, detection),
        influence_merged=influence_merged,
        poison_per_honest_unit=influence_merged / honest,
    )


def _merged_at_most(drawn: npt.NDArray[np.float64], detection: float) -> int:
    """Return the smallest number that the merged poisons exceed in at most 1 case of 100; `drawn` by misses so far."""
    at = np.zeros(len(drawn))
    at[0] = 1.0
    merged = -1
    while float(np.sum(at)) > 1.0 - _QUANTILE:
        missed = at * drawn * (1.0 - detection)
        at = at * (1.0 - drawn)
        at[1:] += missed[:-1]
        merged += 1
    return merged


def _overhead(v: Verification, units: int) -> Overhead:
    """Follow the record of an honest owner, as a distribution, over its first units."""
    audited = float(min(units, v.probation))
    records = range(v.probation, _trusted_at(v) + 1)
    drawn = np.array([_probability(v, record) for record in records])
    at = np.zeros(len(drawn))
    at[0] = 1.0
    for _ in range(units - v.probation):
        passed = at * drawn
        audited += float(np.sum(passed))
        at -= passed
        at[1:] += passed[:-1]
        at[-1] += passed[-1]
    return _cost(v, units, audited / units)


def _cost(v: Verification, units: int | None, audited: float) -> Overhead:
    extra = audited * (1.0 + v.referee_share / ONE)
    return Overhead(units=units, audited=audited, extra_compute=extra, share_of_compute=extra / (1.0 + extra))
