from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.canonical import sha256_hex
from protocol.documents import Digest
from protocol.errors import RoundTooOld
from tests.verify.examples import run_config
from verify.weights import Candidate, merge_weights

RULES = replace(run_config("9e" * 32).rounds, staleness_bound=3, staleness_discount=2**23)
ONE = 2**24


def _candidate(number: int, *, round_number: int = 5, samples: int = 100) -> Candidate:
    return Candidate(claim=Digest(sha256_hex(b"%d" % number)), round=round_number, samples=samples)


def test_equal_work_weighs_equally() -> None:
    assert merge_weights([_candidate(k) for k in range(4)], merging_round=5, rules=RULES) == (ONE // 4,) * 4
    assert merge_weights([_candidate(0)], merging_round=5, rules=RULES) == (ONE,)


def test_late_work_is_discounted_once_for_each_round() -> None:
    candidates = [_candidate(0), _candidate(1, round_number=4), _candidate(2, round_number=3), _candidate(3)]
    weights = merge_weights(candidates, merging_round=5, rules=RULES)
    assert sum(weights) == ONE
    # 4 : 2 : 1 : 4 elevenths
    assert weights == pytest.approx([ONE * share / 11 for share in (4, 2, 1, 4)], abs=1)


def test_work_that_is_all_equally_late_weighs_in_full() -> None:
    late = [_candidate(k, round_number=3) for k in range(2)]
    assert merge_weights(late, merging_round=5, rules=RULES) == (ONE // 2, ONE // 2)


def test_samples_weigh_in_proportion() -> None:
    candidates = [_candidate(0, samples=100), _candidate(1, samples=300)]
    assert merge_weights(candidates, merging_round=5, rules=RULES) == (ONE // 4, 3 * ONE // 4)


def test_what_rounding_leaves_over_goes_to_the_smaller_claim_digests_whatever_the_order() -> None:
    candidates = [_candidate(k) for k in range(3)]
    weights = dict(zip(candidates, merge_weights(candidates, merging_round=5, rules=RULES), strict=True))
    assert sorted(weights.values()) == [ONE // 3, ONE // 3, ONE // 3 + 1]
    assert max(weights, key=lambda candidate: weights[candidate]) == min(candidates, key=lambda c: c.claim)
    backwards = merge_weights(candidates[::-1], merging_round=5, rules=RULES)
    assert backwards == tuple(weights[candidate] for candidate in candidates[::-1])


def test_a_discount_of_zero_leaves_late_work_without_weight() -> None:
    rules = replace(RULES, staleness_discount=0)
    candidates = [_candidate(0, round_number=4), _candidate(1)]
    assert merge_weights(candidates, merging_round=5, rules=rules) == (0, ONE)
    with pytest.raises(ValueError, match="no candidate any weight"):
        merge_weights(candidates[:1], merging_round=5, rules=rules)


def test_a_discount_of_one_is_no_discount() -> None:
    rules = replace(RULES, staleness_discount=ONE)
    candidates = [_candidate(0, round_number=2), _candidate(1)]
    assert merge_weights(candidates, merging_round=5, rules=rules) == (ONE // 2, ONE // 2)


def test_work_beyond_the_bound_is_refused_with_both_numbers() -> None:
    with pytest.raises(RoundTooOld, match="is 4 rounds late for round 5; the run merges work that is up to 3"):
        merge_weights([_candidate(0), _candidate(1, round_number=1)], merging_round=5, rules=RULES)


@pytest.mark.parametrize(
    "candidates",
    [
        [],
        [_candidate(0, round_number=6)],
        [_candidate(0, samples=0)],
        [_candidate(0), _candidate(0)],
        [_candidate(0), _candidate(0, round_number=4)],
    ],
)
def test_what_no_coordinator_asks_for_is_a_value_error(candidates: list[Candidate]) -> None:
    with pytest.raises(ValueError, match=r"a merge needs|only once"):
        merge_weights(candidates, merging_round=5, rules=RULES)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 5), st.integers(1, 2**53)), min_size=1, max_size=40),
    st.integers(1, ONE),
)
def test_weights_are_exact_to_the_last_unit(work: list[tuple[int, int]], discount: int) -> None:
    rules = replace(RULES, staleness_discount=discount)
    candidates = [_candidate(k, round_number=number, samples=samples) for k, (number, samples) in enumerate(work)]
    weights = merge_weights(candidates, merging_round=5, rules=rules)
    assert sum(weights) == ONE
    shares = [c.samples * Fraction(discount, ONE) ** (5 - c.round) for c in candidates]
    for weight, share in zip(weights, shares, strict=True):
        assert abs(weight - ONE * share / sum(shares)) < 1
