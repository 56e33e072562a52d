"""Pictures that were taken down: which rounds leave out which, and that a list only grows."""

from dataclasses import replace

import pytest

from protocol.documents import Takedown, Takedowns, digest_of, sign
from protocol.errors import PayloadInvalid, SignatureInvalid, TakedownsDiffer, WrongRun
from protocol.keys import PrivateKey
from protocol.takedowns import check_grown, check_takedowns, samples_taken_down
from protocol.trust import RunTrust
from tests.protocol.examples import CONFIG, COORDINATOR, DELEGATION, NOW_MS, ROOT, RUN

FIRST, SECOND = (shard.sha256 for shard in CONFIG.data.shards[:2])


def taken(shard: str, sample: int, from_round: int) -> Takedown:
    return Takedown(shard=shard, sample=sample, from_round=from_round, reason="asked for")


def listed(*entries: Takedown) -> Takedowns:
    return Takedowns(run=RUN, entries=entries)


OLD = listed(taken(FIRST, 7, 3), taken(SECOND, 1, 3))
NEW = listed(*OLD.entries, taken(FIRST, 2, 5))


def test_a_picture_is_left_out_from_its_round_on_and_not_before() -> None:
    assert samples_taken_down(None, 9, FIRST) == ()
    assert [samples_taken_down(NEW, number, FIRST) for number in (2, 3, 4, 5, 6)] == [(), (7,), (7,), (2, 7), (2, 7)]
    assert [samples_taken_down(NEW, number, SECOND) for number in (2, 3, 5)] == [(), (1,), (1,)]


def test_a_newer_list_says_the_same_of_every_round_that_an_older_one_holds_for() -> None:
    for number in range(1, 5):
        for shard in (FIRST, SECOND):
            assert samples_taken_down(OLD, number, shard) == samples_taken_down(NEW, number, shard)


def test_a_list_that_grows_holds_and_one_that_rewrites_the_past_does_not() -> None:
    check_grown(None, OLD, 1)
    check_grown(OLD, OLD, 2)
    check_grown(OLD, NEW, 3)
    for rewritten in (
        None,
        listed(OLD.entries[0]),
        listed(*reversed(OLD.entries)),
        listed(replace(OLD.entries[0], reason="another"), *NEW.entries[1:]),
    ):
        with pytest.raises(TakedownsDiffer, match="was rewritten since"):
            check_grown(OLD, rewritten, 3)
    with pytest.raises(TakedownsDiffer, match="leased before that"):
        check_grown(OLD, NEW, 4)  # units of round 5 were leased under the old list
    with pytest.raises(TakedownsDiffer, match="leased before that"):
        check_grown(None, OLD, 2)


def test_a_list_names_samples_of_the_run_once_each_in_the_order_of_their_rounds() -> None:
    check_takedowns(NEW, CONFIG, 4)
    samples = CONFIG.data.shards[0].samples
    for entries, words in (
        ([taken("ee" * 32, 0, 2)], "no sample of the run"),
        ([taken(FIRST, samples, 2)], "no sample of the run"),
        ([taken(FIRST, 1, 2), taken(FIRST, 1, 3)], "taken down twice"),
        ([taken(FIRST, 1, 3), taken(FIRST, 2, 2)], "out of order"),
        ([taken(FIRST, 1, 6)], "out of order"),
        ([taken(FIRST, number, 2) for number in range(samples)], "nothing is left of shard"),
    ):
        with pytest.raises(PayloadInvalid, match=words):
            check_takedowns(listed(*entries), CONFIG, 4)
    check_takedowns(listed(*(taken(FIRST, number, 2) for number in range(samples - 1))), CONFIG, 4)


def test_a_list_must_be_the_coordinators_of_this_run_and_the_one_that_was_named() -> None:
    trust = RunTrust(RUN)
    trust.admit_root(ROOT.public.raw)
    trust.admit_delegation(sign(DELEGATION, ROOT), now_ms=NOW_MS)
    assert trust.takedowns(sign(OLD, COORDINATOR), digest_of(OLD)) == OLD
    with pytest.raises(SignatureInvalid):
        trust.takedowns(sign(OLD, PrivateKey.generate()), digest_of(OLD))
    with pytest.raises(WrongRun):
        trust.takedowns(sign(replace(OLD, run="0a" * 32), COORDINATOR))
    with pytest.raises(TakedownsDiffer, match="as named"):
        trust.takedowns(sign(NEW, COORDINATOR), digest_of(OLD))
