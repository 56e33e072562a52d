"""What comes between two steps: while a merge is weighed, while an appeal waits, and after the run's end."""

from dataclasses import replace

import pytest

from coordinator import bans
from coordinator.audits import AuditState, Scrutiny
from coordinator.owners import OwnerState
from coordinator.units import AttemptState
from protocol.documents import digest_of
from protocol.errors import DeltaNotFinite, RoundTooOld
from protocol.limits import COME_BACK_MS
from tests.coordinator.desk_harness import Opening, replicated
from tests.coordinator.desk_people import DRAWN, ESTABLISHED, LEASE_MS, ONE

# --- while a merge is weighed --------------------------------------------------------------------------------


def test_what_came_while_a_merge_was_weighed_does_not_close_a_round_with_nothing_to_merge(opening: Opening) -> None:
    office = opening(floor=0, units=3)
    first = office.deliver(office.volunteer("ada", record=ESTABLISHED))
    plan = office.plan()
    assert plan is not None
    second = office.deliver(office.volunteer("bob", record=ESTABLISHED))
    assert not office.close(outliers=[first], plan=plan)
    assert office.audit(first).reason.value == "outlier"
    assert office.publish()
    assert office.merged(1) == {digest_of(second.claim)}


def test_late_work_alone_does_not_close_a_round_while_its_own_was_not_weighed(opening: Opening) -> None:
    office = opening(floor=0, units=2)
    ada, bob = (office.volunteer(name, record=ESTABLISHED) for name in ("ada", "bob"))
    late = office.train(bob)
    office.deliver(ada)
    assert office.publish()
    for step in (office.claim, office.sketch, office.receive):
        step(late)
    own = office.deliver(ada)
    plan = office.plan()
    assert plan is not None
    assert {entry.round for entry in plan.entries} == {1, 2}
    newer = office.deliver(bob)
    assert not office.close(outliers=[own], plan=plan)
    assert office.publish()
    assert office.merged(2) == {digest_of(late.claim), digest_of(newer.claim)}


def test_what_a_referee_confirmed_while_it_was_weighed_is_not_doubted_for_how_it_looks(opening: Opening) -> None:
    office = opening(floor=0, planned=9, referee_share=ONE, units=3)
    slow, quick, other = (office.volunteer(name, record=50) for name in ("slow", "quick", "other"))
    late = office.lease(slow)
    office.wait(LEASE_MS)
    work = office.deliver(quick)
    assert work.lease.unit == late.lease.unit
    office.deliver(other)
    office.claim(late)
    office.sketch(late)
    office.compare()
    office.receive(late)
    plan = office.plan()
    assert plan is not None
    assert office.judge(office.auditor()) == ("confirmed", "confirmed")
    assert not office.close(outliers=[work], plan=plan)
    assert office.attempt(work).scrutiny is Scrutiny.CONFIRMED
    assert office.states(work) == [AuditState.PASSED]
    assert office.publish()
    assert office.code(work) == "MERGED"


# --- while an appeal waits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("raw_difference", "goes"), [(0.1, False), (0.9, True)])
def test_an_appeal_that_waits_leaves_in_what_was_to_stay_and_takes_out_what_was_to_go(
    opening: Opening, raw_difference: float, goes: bool
) -> None:
    office = opening(floor=0)
    eve, ada = (office.volunteer(name, record=ESTABLISHED) for name in ("eve", "ada"))
    merged = office.deliver(eve, "nearly")
    office.deliver(ada)
    assert office.publish()
    caught = office.deliver(eve, "lie", ms=0)
    office.wait(LEASE_MS // 4)
    referee = office.auditor()
    while office.code(caught) is None:
        office.judge(referee)
    while office.code(merged) == "MERGED":
        office.judge(referee, raw_difference=raw_difference)
    office.appeal(merged)
    office.deliver(ada)
    assert office.publish()
    assert (digest_of(merged.claim) in office.unmerged(2)) == goes


def test_an_appeal_that_waits_is_heard_though_the_rounds_deltas_are_thrown_away_meanwhile(opening: Opening) -> None:
    office = opening(floor=0, planned=12, retain_rounds=2)
    eve, ada = (office.volunteer(name, record=ESTABLISHED) for name in ("eve", "ada"))
    merged = office.deliver(eve)
    assert office.publish()
    office.refuse(office.train(eve), DeltaNotFinite())  # a fault of a disk: what it had merged is looked back at
    broken = office.auditor("broken")
    while office.judge(broken, believes="nonsense"):
        pass
    assert office.owner(eve)[0] is OwnerState.BANNED
    office.appeal(merged)
    for _ in range(3):
        office.deliver(ada)
        assert office.publish()
    assert bans.newest_pruned(office.desk, office.round - 1) >= 1
    assert bans.appealed_blobs(office.desk) == {merged.claim.artifacts[0].blob_sha256}
    assert office.judge(office.auditor("second")) == ("confirmed",)
    assert office.code(merged) == "RESTORED"
    assert office.owner(eve)[0] is OwnerState.PROBATION
    assert bans.appealed_blobs(office.desk) == frozenset()


# --- while the operator keeps more or less -------------------------------------------------------------------


@pytest.mark.parametrize("retain_rounds", [0, 10])
def test_what_was_thrown_away_is_not_taken_out_when_the_operator_decides_to_keep_more(
    opening: Opening, retain_rounds: int
) -> None:
    office = opening(floor=0, planned=12, retain_rounds=2)
    eve, ada = (office.volunteer(name, record=ESTABLISHED) for name in ("eve", "ada"))
    poison = office.deliver(eve, "poison")
    assert office.publish()
    caught = office.deliver(eve, "lie", ms=0)
    office.wait(LEASE_MS // 4)
    office.judge(office.auditor())
    assert office.code(caught) == "REPLAY_DIFFERS"
    office.deliver(ada)
    assert office.publish()
    office.deliver(ada)
    assert office.close()
    office.judge(office.auditor())  # too late for this merge, and before the next one it is thrown away
    office.finish()
    assert office.code(poison) == "RETRACTED"
    office.desk = replace(office.desk, retain_rounds=retain_rounds)
    office.deliver(ada)
    assert office.publish()
    assert office.unmerged(4) == set()


# --- while bytes travel --------------------------------------------------------------------------------------


def test_rounds_that_pass_while_the_bytes_of_a_drawn_claim_may_still_come_cost_its_owner_nothing(
    opening: Opening,
) -> None:
    office = opening(floor=DRAWN, staleness_bound=0, planned=9)
    slow, ada = (office.volunteer(name, record=50) for name in ("slow", "ada"))
    referee = office.auditor()
    work = office.train(slow)
    office.deliver(ada, ms=5_000)
    office.wait(LEASE_MS // 4)
    while office.judge(referee):
        pass
    assert office.publish()
    assert office.code(work) == "TOO_LATE"
    assert office.owner(slow)[0] is OwnerState.ESTABLISHED


# --- while the coordinator is away ---------------------------------------------------------------------------


@pytest.mark.parametrize("away_ms", [10_000, LEASE_MS + 1, 10 * LEASE_MS])
def test_the_time_that_the_coordinator_is_away_counts_against_nobody(opening: Opening, away_ms: int) -> None:
    office = opening(floor=DRAWN, referee_share=ONE, planned=9)
    work, replica = replicated(office)
    office.compare()
    assert office.audit(work).state is AuditState.WANTS_BYTES
    lease = office.lease(office.volunteer("other", record=ESTABLISHED))
    left_ms = [office.attempt(one).deadline_ms - office.clock.now_ms() for one in (replica, lease)]

    stopped_ms = office.clock.now_ms()
    office.clock.advance(away_ms)
    office.resume(stopped_ms)
    office.wait(0)

    now_left = [office.attempt(one).deadline_ms - office.clock.now_ms() for one in (replica, lease)]
    assert now_left == [left + min(away_ms, COME_BACK_MS) for left in left_ms]
    office.receive(replica)
    assert office.attempt(lease).state is AttemptState.LEASED
    assert office.owner(replica.by)[0] is OwnerState.ESTABLISHED


def test_what_was_over_before_the_coordinator_went_stays_over(opening: Opening) -> None:
    office = opening(floor=0)
    lease = office.lease(office.volunteer("ada", record=ESTABLISHED))
    office.clock.advance(LEASE_MS)
    stopped_ms = office.clock.now_ms()
    office.clock.advance(1)
    office.resume(stopped_ms)
    office.wait(0)
    assert office.attempt(lease).state is AttemptState.EXPIRED


# --- after the run's end -------------------------------------------------------------------------------------


def test_after_the_last_checkpoint_no_claim_is_taken_whose_draw_everybody_could_know(opening: Opening) -> None:
    office = opening(floor=0, planned=1, units=4)
    late = office.lease(office.volunteer("newcomer"))
    office.deliver(office.volunteer("ada", record=ESTABLISHED))
    assert office.publish()
    with pytest.raises(RoundTooOld, match="The run has ended with checkpoint 1"):
        office.claim(late)
    office.wait(LEASE_MS)
    office.reveal()
    assert office.log("epoch-revealed")
