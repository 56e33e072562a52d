import math
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco.streams import Stream
from diloco.tables import Floats
from diloco.weigh import ROW
from protocol.canonical import sha256_hex
from protocol.documents import Digest, MergeEntry, Verification
from protocol.errors import RoundTooOld
from tests.verify.examples import REPLAY, UNCHECKED, run_config
from verify.weights import Candidate, merge_weights, needs_norms, needs_sketches

RULES = replace(run_config("9e" * 32).rounds, staleness_bound=3, staleness_discount=2**23)
ONE = 2**24
OPEN = replace(REPLAY, weighting="mean", owner_cap=ONE)
"""Judged, but with nothing between the shares and the weights."""


def _candidate(
    number: int,
    *,
    late: int = 0,
    samples: int = 100,
    influence: int = ONE,
    member: int | None = None,
    audited: bool = False,
) -> Candidate:
    return Candidate(
        claim=Digest(sha256_hex(b"%d" % number)),
        samples=samples,
        late=late,
        influence=influence,
        member=Digest(sha256_hex(b"member %d" % (number if member is None else member))),
        audited=audited,
    )


def _weights(
    candidates: Sequence[Candidate],
    verification: Verification = UNCHECKED,
    *,
    norms: Sequence[float] | None = None,
    sketches: Sequence[Floats] | None = None,
) -> tuple[int, ...]:
    if norms is None and needs_norms(verification):
        norms = [1.0] * len(candidates)
    norms2 = None if norms is None else [norm**2 for norm in norms]
    return merge_weights(candidates, rules=RULES, verification=verification, sketches=sketches, norms2=norms2)


# --- what a delta weighs by itself ---------------------------------------------------------------------------


def test_equal_work_weighs_equally() -> None:
    assert _weights([_candidate(k) for k in range(4)]) == (ONE // 4,) * 4
    assert _weights([_candidate(0)]) == (ONE,)


def test_weights_follow_samples_and_what_rounding_leaves_over_is_not_lost() -> None:
    weights = _weights([_candidate(k, samples=samples) for k, samples in enumerate([1, 2, 4])])
    assert sum(weights) == ONE
    assert [round(weight * 7 / ONE) for weight in weights] == [1, 2, 4]


def test_each_round_of_lateness_halves_the_weight_if_the_run_says_so() -> None:
    assert _weights([_candidate(0, late=3, samples=800), _candidate(1)]) == (ONE // 2, ONE // 2)
    assert _weights([_candidate(0, late=1, samples=200), _candidate(1)]) == (ONE // 2, ONE // 2)
    assert _weights([_candidate(0, late=2, samples=400), _candidate(1)]) == (ONE // 2, ONE // 2)


def test_a_short_record_counts_for_less() -> None:
    assert _weights([_candidate(0, influence=ONE // 3), _candidate(1)], OPEN) == (ONE // 4, 3 * ONE // 4)


def test_who_has_no_weight_leaves_the_others_as_they_were_and_is_no_error() -> None:
    candidates = [_candidate(0, influence=0), _candidate(1), _candidate(2)]
    assert _weights(candidates, OPEN, norms=[1e9, 1.0, 1.0]) == (0, ONE // 2, ONE // 2)
    with pytest.raises(ValueError, match="no candidate any weight"):
        _weights(candidates[:1], OPEN)
    rules = replace(RULES, staleness_discount=0)
    late = [_candidate(0, late=1), _candidate(1)]
    assert merge_weights(late, rules=rules, verification=UNCHECKED, sketches=None, norms2=None) == (0, ONE)


def test_work_beyond_the_bound_is_refused_with_both_numbers() -> None:
    with pytest.raises(RoundTooOld, match="came 4 rounds late; the run merges work that is up to 3"):
        _weights([_candidate(0), _candidate(1, late=4)])


@pytest.mark.parametrize(
    "candidates",
    [
        [],
        [_candidate(0, late=-1)],
        [_candidate(0, samples=0)],
        [_candidate(0, influence=ONE + 1)],
        [_candidate(0), _candidate(0)],
        [_candidate(0), _candidate(0, late=1)],
    ],
)
def test_what_no_coordinator_asks_for_is_a_value_error(candidates: list[Candidate]) -> None:
    with pytest.raises(ValueError, match=r"a merge needs|only once|late by 0 rounds or more"):
        _weights(candidates)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2**53), st.integers(1, ONE)), min_size=1, max_size=40),
    st.integers(1, ONE),
    st.booleans(),
)
def test_weights_are_exact_to_the_last_unit(work: list[tuple[int, int, int]], discount: int, judged: bool) -> None:
    rules = replace(RULES, staleness_discount=discount)
    candidates = [_candidate(k, late=a, samples=b, influence=c) for k, (a, b, c) in enumerate(work)]
    weights = merge_weights(
        candidates,
        rules=rules,
        verification=OPEN if judged else UNCHECKED,
        sketches=None,
        norms2=[1.0] * len(work) if judged else None,
    )
    assert sum(weights) == ONE
    shares = [c.samples * c.influence * Fraction(discount, ONE) ** c.late for c in candidates]
    for weight, share in zip(weights, shares, strict=True):
        assert abs(weight - ONE * share / sum(shares)) < 1


# --- norms and owners ----------------------------------------------------------------------------------------


def test_a_delta_over_the_norm_bound_counts_as_if_it_were_at_the_bound() -> None:
    weights = _weights([_candidate(k) for k in range(4)], OPEN, norms=[1.0, 1.0, 1.0, 12.0])
    assert weights == (ONE // 4, ONE // 4, ONE // 4, ONE // 16)
    assert _weights([_candidate(k) for k in range(4)], OPEN, norms=[1.0, 0.0, 1.0, 3.0]) == (ONE // 4,) * 4
    # More than half of all deltas empty: there is no measure to clip by.
    assert _weights([_candidate(k) for k in range(3)], OPEN, norms=[0.0, 0.0, 9.0])[2] == ONE // 3


def test_nothing_is_clipped_or_capped_in_a_run_that_replays_nothing() -> None:
    candidates = [_candidate(k, member=0) for k in range(4)]
    unchecked = replace(UNCHECKED, owner_cap=1)
    assert _weights(candidates, unchecked, norms=[1.0, 1.0, 1.0, 50.0]) == (ONE // 4,) * 4


def _of_members(weights: Sequence[int], members: Sequence[int]) -> dict[int, float]:
    return {m: sum(w for w, of in zip(weights, members, strict=True) if of == m) / ONE for m in set(members)}


@pytest.mark.parametrize(
    ("members", "cap", "expected"),
    [
        ([0] * 6 + [1, 2], 0.5, {0: 0.5, 1: 0.25, 2: 0.25}),
        ([0] * 6 + [1] * 3 + [2, 3], 0.4, {0: 0.4, 1: 0.36, 2: 0.12, 3: 0.12}),
        # Cutting off the first brings the second over the cap.
        ([0] * 6 + [1] * 3 + [2, 3], 0.3, {0: 0.3, 1: 0.3, 2: 0.2, 3: 0.2}),
        # Three owners cannot each have at most a quarter: they have a third.
        ([0] * 6 + [1] * 3 + [2], 0.25, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        ([0] * 5, 0.25, {0: 1.0}),
        ([0, 1, 2, 3], 1.0, {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}),
    ],
)
def test_no_owner_has_more_than_its_cap_where_others_can_fill_the_rest(
    members: list[int], cap: float, expected: dict[int, float]
) -> None:
    candidates = [_candidate(k, member=member) for k, member in enumerate(members)]
    weights = _weights(candidates, replace(OPEN, owner_cap=int(cap * ONE)))
    assert sum(weights) == ONE
    assert _of_members(weights, members) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 1000)), min_size=1, max_size=40), st.integers(1, ONE))
def test_the_cap_keeps_the_order_of_owners_and_is_never_passed(work: list[tuple[int, int]], cap: int) -> None:
    members = [member for member, _ in work]
    candidates = [_candidate(k, member=member, samples=samples) for k, (member, samples) in enumerate(work)]
    weights = _weights(candidates, replace(OPEN, owner_cap=cap))
    assert sum(weights) == ONE
    capped = _of_members(weights, members)
    limit = max(cap / ONE, 1 / len(capped))
    assert max(capped.values()) <= limit + len(work) / ONE
    plain = _of_members(_weights(candidates, OPEN), members)
    ordered = sorted(plain, key=lambda member: plain[member])
    assert all(capped[a] <= capped[b] + len(work) / ONE for a, b in pairwise(ordered))


# --- robust rules --------------------------------------------------------------------------------------------


def _sketches(count: int, *, flipped: int = 0) -> list[Floats]:
    shared = Stream(bytes(32), "init/shared").normal(0, 0, ROW)
    signs = [-1.0 if k < flipped else 1.0 for k in range(count)]
    return [np.float32(signs[k]) * shared + Stream(bytes(32), f"init/{k}").normal(0, 0, ROW) for k in range(count)]


RULE_NAMES = ("geometric-median", "multi-krum", "nnm-clip")


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_robust_rules_need_a_sketch_of_every_delta_and_the_mean_none(rule: str) -> None:
    robust = replace(OPEN, weighting=rule)  # type: ignore[arg-type]
    assert needs_sketches(robust)
    assert not needs_sketches(OPEN)
    assert not needs_sketches(replace(robust, mode="none"))
    assert not needs_norms(replace(robust, mode="none"))
    with pytest.raises(ValueError, match="needs a sketch"):
        _weights([_candidate(0)], robust)
    with pytest.raises(ValueError, match="every candidate needs one"):
        merge_weights([_candidate(0)], rules=RULES, verification=OPEN, sketches=None, norms2=None)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_robust_weights_do_not_depend_on_the_order_of_the_candidates(rule: str) -> None:
    robust = replace(REPLAY, weighting=rule)  # type: ignore[arg-type]
    candidates = [_candidate(k, late=k % 2, influence=ONE - k, member=k % 5) for k in range(9)]
    sketches, norms = _sketches(9, flipped=2), [1.0 + 0.1 * k for k in range(8)] + [7.0]
    plain = _weights(candidates, robust, norms=norms, sketches=sketches)
    order = list(range(9))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        again = _weights(
            [candidates[k] for k in order],
            robust,
            norms=[norms[k] for k in order],
            sketches=[sketches[k] for k in order],
        )
        assert again == tuple(plain[k] for k in order)


def test_the_weights_of_a_merge_are_the_same_integers_on_every_machine() -> None:
    candidates = [_candidate(k, late=k % 2, influence=ONE - 1000 * k, member=k % 5) for k in range(9)]
    norms = [1.0 + 0.1 * k for k in range(8)] + [7.0]
    found = _weights(candidates, replace(REPLAY, owner_cap=ONE // 4), norms=norms, sketches=_sketches(9, flipped=2))
    assert sum(found) <= ONE
    assert found == (249698, 124842, 3302056, 1398379, 3301662, 1650733, 3301268, 652653, 1677554)


def test_the_rule_takes_nothing_from_what_an_audit_confirmed_and_only_that_is_spared() -> None:
    rules = replace(REPLAY, owner_cap=ONE)
    sketches = _sketches(8, flipped=1)
    distrusted = [_candidate(k) for k in range(8)]
    flipped = min(range(8), key=lambda k: _weights(distrusted, rules, norms=[1.0] * 8, sketches=sketches)[k])
    known = [_candidate(k, audited=True) for k in range(8)]

    assert _weights(distrusted, rules, norms=[1.0] * 8, sketches=sketches)[flipped] < ONE // 40
    assert _weights(known, rules, norms=[1.0] * 8, sketches=sketches) == (ONE // 8,) * 8


def test_a_loud_delta_does_not_round_the_others_sketches_to_nothing() -> None:
    sketches = [*_sketches(5), np.float32(1e6) * _sketches(6)[5]]
    norms = [math.sqrt(float(np.sum(sketch.astype(np.float64) ** 2))) for sketch in sketches]
    weights = _weights(
        [_candidate(k) for k in range(6)], replace(REPLAY, owner_cap=ONE), norms=norms, sketches=sketches
    )
    assert min(weights[:5]) > 0
    assert weights[5] < 100


def test_a_candidate_is_read_off_its_entry() -> None:
    entry = MergeEntry(
        claim="c1" * 32,
        unit="a1" * 32,
        round=4,
        blob_sha256="b1" * 32,
        content_sha256="ca" * 32,
        size=9,
        weight=7,
        samples=240,
        member="3e" * 32,
        audited=True,
        influence=ONE // 2,
        late=1,
    )
    expected = Candidate(
        claim=Digest("c1" * 32), samples=240, late=1, influence=ONE // 2, member=Digest("3e" * 32), audited=True
    )
    assert Candidate.of(entry) == expected
