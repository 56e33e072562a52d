import random
from collections import Counter
from dataclasses import replace

import pytest

from protocol.canonical import sha256_hex
from protocol.documents import Digest, Verification
from tests.verify.examples import REPLAY, UNCHECKED
from verify.policy import (
    ONE,
    Poisoner,
    assess,
    audit_share,
    by_size,
    influence,
    is_drawn,
    is_sampled,
    is_taken_out,
    replica_offered,
    replica_turn,
    too_fast,
    weigh_seed,
)

SECRET = bytes(range(32))
CLAIMS = [Digest(sha256_hex(b"%d" % number)) for number in range(4_000)]


def test_everything_of_a_newcomer_is_audited_and_a_share_of_a_veteran() -> None:
    assert audit_share(REPLAY, established=False, valid_in_row=18) == ONE
    assert audit_share(REPLAY, established=False, valid_in_row=1_000) == ONE  # after a failure, say
    assert audit_share(REPLAY, established=True, valid_in_row=0) == ONE
    assert audit_share(REPLAY, established=True, valid_in_row=19) == -(-ONE // 19)
    assert audit_share(REPLAY, established=True, valid_in_row=20) == REPLAY.floor == -(-ONE // 20)
    assert audit_share(REPLAY, established=True, valid_in_row=10**6) == REPLAY.floor
    assert audit_share(replace(REPLAY, floor=0), established=True, valid_in_row=1_000) == -(-ONE // 1_000)
    assert audit_share(UNCHECKED, established=False, valid_in_row=0) == 0


@pytest.mark.parametrize(
    ("share", "samples", "expected"), [(ONE, 40, ONE), (0, 40, 0), (1200, 40, 400), (1200, 120, 1200), (1, 40, 1)]
)
def test_audits_are_as_probable_as_units_are_large_unless_they_are_certain(
    share: int, samples: int, expected: int
) -> None:
    assert by_size(share, samples=samples, most=120) == expected


def test_a_record_counts_up_to_the_ramp_and_a_confirmed_delta_always() -> None:
    assert [influence(REPLAY, valid_in_row=n, audited=False) for n in (0, 10, 40, 99)] == [0, ONE // 4, ONE, ONE]
    assert influence(REPLAY, valid_in_row=0, audited=True) == ONE
    assert influence(UNCHECKED, valid_in_row=0, audited=False) == ONE


@pytest.mark.parametrize("share", [ONE // 20, ONE // 2])
def test_draws_come_as_often_as_the_receipt_says_and_the_two_draws_are_independent(share: int) -> None:
    drawn = {claim for claim in CLAIMS if is_drawn(SECRET, claim, share)}
    sampled = {claim for claim in CLAIMS if is_sampled(SECRET, claim, share)}
    expected = len(CLAIMS) * share / ONE
    for found in (drawn, sampled):
        assert abs(len(found) - expected) < 4 * expected**0.5
    assert abs(len(drawn & sampled) - expected * share / ONE) < 4 * expected**0.5
    assert drawn != {claim for claim in CLAIMS if is_drawn(SECRET[::-1], claim, share)}


def test_a_probability_of_one_draws_all_and_one_of_zero_none() -> None:
    assert all(is_drawn(SECRET, claim, ONE) and not is_drawn(SECRET, claim, 0) for claim in CLAIMS[:100])
    # The golden draw: HMAC-SHA256 over b"audit\0" and the claim's bytes, read as a big-endian number.
    found = [is_drawn(SECRET, claim, ONE // 2) for claim in CLAIMS[:8]]
    assert found == [True, False, False, True, False, False, False, False]
    with pytest.raises(ValueError, match="not between 0 and 1"):
        is_drawn(SECRET, CLAIMS[0], ONE + 1)


def test_every_round_is_weighed_under_another_seed() -> None:
    seeds = {weigh_seed(SECRET, number) for number in range(10)} | {weigh_seed(SECRET[::-1], 0)}
    assert len(seeds) == 11
    assert all(len(seed) == 32 for seed in seeds)


def test_half_the_usual_time_is_too_fast_and_nothing_is_without_a_usual_time() -> None:
    assert too_fast(499, 1_000)
    assert not too_fast(500, 1_000)
    assert not too_fast(0, 0)


# --- what a policy lets through ------------------------------------------------------------------------------


def test_the_defaults_cost_at_most_six_per_cent_in_the_long_run() -> None:
    hundred, thousand, long_run = assess(REPLAY).overhead
    assert long_run.audited == pytest.approx(0.05, abs=1e-6)
    assert long_run.share_of_compute < long_run.extra_compute < 0.06
    assert hundred.audited > thousand.audited > long_run.audited
    # 19 of probation, then one in 20.
    assert thousand.audited * 1_000 == pytest.approx(19 + 981 / 20, abs=0.1)


def test_who_strikes_at_once_merges_as_many_poisons_as_one_over_p_and_at_half_influence() -> None:
    report = assess(REPLAY)
    p = audit_share(REPLAY, established=True, valid_in_row=19) / ONE
    assert report.at_once.merged == pytest.approx((1 - p) / p)
    assert report.at_once.merged_99 == 85
    assert report.at_once.influence_merged == pytest.approx(report.at_once.merged * 19 / 40, rel=1e-6)
    assert report.sleeper.starts_at == 40
    assert report.sleeper.honest_units == pytest.approx(19 + 19 + 20 * 20, rel=1e-3)
    assert report.sleeper.merged == pytest.approx(19, abs=1e-3)
    assert report.sleeper.merged_99 == 89
    assert report.sleeper.poison_per_honest_unit < report.at_once.poison_per_honest_unit < 1


def test_without_a_floor_a_long_record_buys_a_thousand_free_poisons() -> None:
    sleeper = assess(replace(REPLAY, floor=0)).sleeper
    assert sleeper.starts_at == 1_000
    assert sleeper.merged == pytest.approx(999, rel=1e-3)


def test_a_floor_of_one_lets_nothing_through() -> None:
    report = assess(replace(REPLAY, floor=ONE))
    assert (report.at_once.merged, report.at_once.merged_99, report.sleeper.merged) == (0.0, 0, 0.0)


@pytest.mark.parametrize("detection", [1.0, 0.3])
def test_the_expectations_are_those_of_poisoners_who_are_played_out(detection: float) -> None:
    report = assess(REPLAY, detection=detection)
    for poisoner in (report.at_once, report.sleeper):
        _played(REPLAY, poisoner, detection)


def _played(v: Verification, poisoner: Poisoner, detection: float) -> None:
    chance = random.Random(5)
    counts, influences = [], []
    for _ in range(3_000):
        record, merged, counted = poisoner.starts_at, 0, 0.0
        while True:
            drawn = chance.random() < audit_share(v, established=True, valid_in_row=record) / ONE
            if drawn and chance.random() < detection:
                break
            merged += 1
            counted += influence(v, valid_in_row=record, audited=drawn) / ONE
            record += drawn
        counts.append(merged)
        influences.append(counted)
    error = 4 * poisoner.merged / 3_000**0.5
    assert sum(counts) / 3_000 == pytest.approx(poisoner.merged, abs=error)
    assert sum(influences) / 3_000 == pytest.approx(poisoner.influence_merged, abs=error)
    assert sum(count <= poisoner.merged_99 for count in counts) / 3_000 == pytest.approx(0.99, abs=0.01)


def test_nothing_can_be_said_of_a_run_that_replays_nothing() -> None:
    with pytest.raises(ValueError, match="replays nothing"):
        assess(UNCHECKED)
    with pytest.raises(ValueError, match="not a probability"):
        assess(REPLAY, detection=0.0)


def test_a_refuted_delta_is_taken_out_if_more_is_wrong_in_it_than_the_run_allows() -> None:
    assert [is_taken_out(REPLAY, difference) for difference in (0.04, 0.499, 0.5, 2.0)] == [False, False, True, True]


def test_the_order_in_which_a_replica_is_offered_favours_nobody() -> None:
    owners = [f"{number:064x}" for number in range(4)]
    claims = [Digest(f"{number:064x}") for number in range(400)]
    first = Counter(min(owners, key=lambda owner: replica_turn(SECRET, claim, owner)) for claim in claims)
    assert all(70 < first[owner] < 130 for owner in owners)


def test_a_replica_is_offered_to_one_in_so_many_owners_and_in_the_end_to_twice_as_many() -> None:
    turns = range(0, ONE, ONE // 64)
    counts = [sum(replica_offered(turn, owners=4, waited=waited) for turn in turns) for waited in (0.0, 0.5, 0.75, 1.0)]
    assert counts == [16, 24, 28, 32]
    assert all(replica_offered(turn, owners=1, waited=0.0) for turn in turns)
