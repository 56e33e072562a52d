"""Claims that are audited though no draw asked for it; claims that come late; and leases that come to nothing."""

from collections.abc import Callable

import pytest

from coordinator.audits import AuditState
from coordinator.leasing import NoWork
from coordinator.owners import OwnerState
from coordinator.units import AttemptState, UnitState
from protocol.calls import Instruction
from protocol.documents import digest_of
from protocol.errors import DeltaNotFinite, RoundTooOld, SketchMismatch
from protocol.limits import WASTED_LEASES_PER_ROUND
from tests.coordinator.desk_harness import Office, Opening, replicated
from tests.coordinator.desk_people import DRAWN, ESTABLISHED, LEASE_MS, TRAINING_MS, Volunteer, Work

# --- other reasons -------------------------------------------------------------------------------------------


def test_a_claim_faster_than_half_its_owners_audited_time_is_audited(opening: Opening) -> None:
    office = opening(floor=0)
    ada = office.volunteer("ada", record=ESTABLISHED)
    usual = office.deliver(ada, ms=TRAINING_MS // 2)
    fast = office.deliver(ada, ms=TRAINING_MS // 2 - 1)
    assert office.audits(usual) == ()
    assert office.audit(fast).reason.value == "too-fast"


@pytest.mark.parametrize("sent", ["claimed", "sketched", "received"])
def test_two_claims_for_one_lease_are_kept_as_evidence_and_the_first_is_audited(opening: Opening, sent: str) -> None:
    office = opening(floor=0)
    work = office.lease(office.volunteer("ada", record=ESTABLISHED))
    office.clock.advance(TRAINING_MS)
    steps: list[Callable[[Work], object]] = [office.claim, office.sketch, office.receive]
    done = ["claimed", "sketched", "received"].index(sent) + 1
    for step in steps[:done]:
        step(work)
    office.claim_another(work, "another")
    assert len(office.store.evidence(office.attempt(work).lease)) == 1
    for step in steps[done:]:
        step(work)
    assert office.reasons() == {"conflict": 1}
    assert not office.publish()
    office.judge(office.auditor())
    assert office.publish()
    assert office.code(work) == "MERGED"


def test_what_stands_out_is_audited_before_it_is_merged(opening: Opening) -> None:
    office = opening(floor=0, units=2, min_window_ms=10**9)
    works = [office.deliver(office.volunteer(name, record=ESTABLISHED)) for name in ("ada", "bob")]
    assert not office.close(outliers=[works[1]])  # now the round waits for it
    assert office.audit(works[1]).reason.value == "outlier"
    assert office.unit(works[0]).state is UnitState.ASSIGNED
    office.wait(LEASE_MS // 4)
    office.judge(office.auditor())
    plan = office.plan()
    assert plan is not None
    assert {entry.claim for entry in plan.entries if entry.audited} == {digest_of(works[1].claim)}
    assert office.publish()
    assert office.merged(1) == {digest_of(work.claim) for work in works}


def test_a_round_that_can_do_without_what_stands_out_closes_without_it(opening: Opening) -> None:
    office = opening(floor=0, units=2)
    works = [office.deliver(office.volunteer(name, record=ESTABLISHED)) for name in ("ada", "bob")]
    assert office.publish(outliers=[works[1]])
    assert office.merged(1) == {digest_of(works[0].claim)}
    office.wait(LEASE_MS // 4)
    office.judge(office.auditor())
    office.deliver(works[0].by)
    assert office.publish()
    round_2 = office.store.round(2)
    assert round_2 is not None
    late = {entry.claim: entry.late for entry in round_2.merge}
    assert late[digest_of(works[1].claim)] == 0  # waiting for an audit is not lateness


# --- late claims ---------------------------------------------------------------------------------------------


def test_a_late_claim_is_a_free_replica_and_is_credited_if_it_agrees(opening: Opening) -> None:
    office = opening(floor=0)
    slow, quick = office.volunteer("slow", record=ESTABLISHED), office.volunteer("quick", record=ESTABLISHED)
    late = office.lease(slow)
    office.wait(LEASE_MS)
    work = office.deliver(quick)
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    assert office.sketch(late) is Instruction.KEEP
    assert office.audit(work).reason.value == "late"
    office.compare()
    assert office.code(late) == "REPLICA"
    assert office.owner(quick) == (OwnerState.ESTABLISHED, ESTABLISHED)  # nobody chose who was to check it
    assert office.publish()
    assert office.code(work) == "MERGED"


@pytest.mark.parametrize("owner", ["a stranger", "ada"])
def test_rubbish_that_a_stranger_or_the_owner_itself_claims_late_holds_nothing_back(
    opening: Opening, owner: str
) -> None:
    office = opening(floor=0)
    record = 50 if owner == "ada" else None
    liar = office.volunteer(owner, device="2", record=record)
    late = office.lease(liar, "rubbish")
    office.wait(LEASE_MS)
    work = office.deliver(office.volunteer("ada", record=50))
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    assert office.sketch(late) is Instruction.DONE
    assert office.compare() == 0
    plan = office.plan()
    assert plan is not None
    assert [entry.claim for entry in plan.entries] == [digest_of(work.claim)]


def test_bytes_that_come_once_everybody_knows_that_they_were_not_drawn_are_audited(opening: Opening) -> None:
    office = opening(floor=0, planned=9, staleness_bound=2)
    waiting = office.train(office.volunteer("eve", record=50), "poison")
    office.claim(waiting)
    office.sketch(waiting)
    office.deliver(office.volunteer("ada", record=50))
    office.wait(LEASE_MS)
    assert office.publish()
    office.receive(waiting)
    office.wait(LEASE_MS)  # nobody runs it again; the referee goes on alone
    assert office.judge(office.auditor()) is not None
    assert office.code(waiting) == "REPLAY_DIFFERS"


def test_a_partner_who_comes_late_does_not_get_a_drawn_claim_past_its_audit(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    partner, liar = office.volunteer("partner", record=50), office.volunteer("liar", record=50)
    late = office.lease(partner, "lie")
    office.wait(LEASE_MS)
    work = office.deliver(liar, "lie")
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    office.sketch(late)
    office.compare()
    assert not office.publish()
    office.wait(LEASE_MS)
    assert office.judge(office.auditor()) == ("refuted",)
    assert office.code(work) == "REPLAY_DIFFERS"


def test_a_late_claim_is_merged_if_nobody_elses_is_there(opening: Opening) -> None:
    office = opening(floor=0)
    slow = office.volunteer("slow", record=ESTABLISHED)
    late = office.lease(slow)
    office.wait(LEASE_MS)
    office.claim(late)
    assert office.sketch(late) is Instruction.UPLOAD
    office.receive(late)
    assert office.publish()
    assert office.code(late) == "MERGED"


def test_a_late_replica_that_disagrees_shows_its_bytes_and_a_referee_decides(opening: Opening) -> None:
    office = opening(floor=0)
    slow, quick = office.volunteer("slow", record=ESTABLISHED), office.volunteer("quick", record=ESTABLISHED)
    late = office.lease(slow)
    office.wait(LEASE_MS)
    work = office.deliver(quick, "lie")
    office.claim(late)
    office.sketch(late)
    office.compare()
    office.receive(late)
    office.judge(office.auditor())
    assert office.owner(quick)[0] is OwnerState.BANNED
    assert office.code(work) == "REPLAY_DIFFERS"
    assert office.publish()
    assert office.code(late) == "MERGED"


def test_a_claim_after_its_unit_was_merged_is_credited_and_compared_with_nothing(opening: Opening) -> None:
    office = opening(floor=0)
    slow, quick = office.volunteer("slow", record=ESTABLISHED), office.volunteer("quick", record=ESTABLISHED)
    late = office.lease(slow)
    office.wait(LEASE_MS)
    office.deliver(quick)
    office.publish()
    office.claim(late)
    assert office.sketch(late) is Instruction.DONE
    assert office.code(late) == "REPLICA"
    assert office.reasons() == {}


@pytest.mark.parametrize("result", ["honest", "lie"])
def test_one_claim_counts_once_in_its_owners_record_however_often_it_is_audited(opening: Opening, result: str) -> None:
    office = opening(floor=DRAWN)
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    late = office.lease(bob, result)
    office.wait(LEASE_MS)
    work = office.deliver(ada)
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    office.sketch(late)
    office.compare()
    if result == "lie":
        office.receive(late)
    office.wait(LEASE_MS)
    while office.judge(office.auditor()):
        pass
    assert office.states(work) == [AuditState.PASSED, AuditState.PASSED]
    assert office.owner(ada) == (OwnerState.ESTABLISHED, 51)


# --- bytes that are no delta ---------------------------------------------------------------------------------


def test_bytes_that_are_no_delta_reject_the_claim_and_leave_the_unit_to_others(opening: Opening) -> None:
    office = opening()
    ada = office.volunteer("ada")
    work = office.train(ada)
    office.refuse(work, DeltaNotFinite())
    office.refuse(work, DeltaNotFinite())  # the answer was lost, and the upload came again
    assert office.code(work) == DeltaNotFinite.code
    assert office.unit(work).state is UnitState.OPEN
    assert office.owner(ada) == (OwnerState.PROBATION, 0)
    assert office.lease(office.volunteer("bob")).lease.unit == work.lease.unit


def test_an_established_owner_whose_bytes_are_no_delta_begins_again(opening: Opening) -> None:
    office = opening(floor=0)
    ada = office.volunteer("ada", record=ESTABLISHED)
    office.refuse(office.train(ada), DeltaNotFinite())
    assert office.owner(ada) == (OwnerState.PROBATION, 0)


def test_a_replica_whose_bytes_are_not_those_of_its_sketch_leaves_the_referee_alone_with_the_claim(
    opening: Opening,
) -> None:
    office = opening(floor=DRAWN)
    work, replica = replicated(office, replica="lie")
    office.compare()
    office.refuse(replica, SketchMismatch())
    assert office.code(replica) == "SKETCH_MISMATCH"
    assert office.owner(replica.by) == (OwnerState.PROBATION, 0)
    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.publish()
    assert office.code(work) == "MERGED"


# --- old rounds ----------------------------------------------------------------------------------------------


def _replica_of_an_old_round(office: Office, steps: list[str]) -> tuple[Work, Volunteer]:
    """Bob's replica of Eve's work of round 1, which is banned in round 4: nobody needs the replica any more."""
    people = [office.volunteer(name, record=ESTABLISHED) for name in ("bob", "ada", "cleo", "dora", "emil", "fred")]
    work = office.deliver(office.volunteer("eve"))
    for bob in people:
        replica = office.lease(bob)
        if replica.lease.unit == work.lease.unit:
            break
        office.hand_back(replica)  # it is another one's turn
    assert replica.lease.unit == work.lease.unit
    ada = next(other for other in people if other is not bob)
    for _ in range(3):
        office.deliver(ada, ms=TRAINING_MS // 2)  # Bob is still at it
        assert office.publish()
    lie = office.lease(office.volunteer("eve", device="2"), "lie")
    for step in (office.claim, office.sketch, office.receive):
        step(lie)
    for step_name in steps:
        getattr(office, step_name)(replica)
    office.wait(LEASE_MS // 4)
    while office.code(lie) is None:
        office.judge(office.auditor())
    assert office.code(work) == "OWNER_BANNED"
    return replica, ada


def test_a_replica_that_nobody_needs_any_more_is_not_merged_into_a_round_that_may_not_take_it(
    opening: Opening,
) -> None:
    office = opening(floor=0, planned=9, staleness_bound=1)
    replica, ada = _replica_of_an_old_round(office, [])
    with pytest.raises(RoundTooOld):
        office.claim(replica)
    office.deliver(ada)
    plan = office.plan()
    assert plan is not None
    assert [entry.late for entry in plan.entries] == [0]


@pytest.mark.parametrize("steps", [["claim"], ["claim", "sketch"]])
def test_a_replica_that_was_claimed_before_is_credited(opening: Opening, steps: list[str]) -> None:
    office = opening(planned=9, staleness_bound=1)
    replica, _ = _replica_of_an_old_round(office, steps)
    assert office.code(replica) == "REPLICA"
    assert office.owner(replica.by)[0] is OwnerState.ESTABLISHED
    assert office.open_audits() == 0


def test_what_is_too_old_for_the_last_merge_is_taken_and_credited_but_not_merged(opening: Opening) -> None:
    office = opening(floor=0, planned=3, staleness_bound=1)
    ada, slow = office.volunteer("ada", record=ESTABLISHED), office.volunteer("slow", record=ESTABLISHED)
    late = office.lease(slow)
    office.wait(LEASE_MS)
    waiting = office.deliver(office.volunteer("eve"), "lie")  # keeps its unit from being abandoned
    assert waiting.lease.unit == late.lease.unit
    office.wait(LEASE_MS // 4)
    for _ in range(2):
        office.deliver(ada)
        assert office.publish()
    office.judge(office.auditor())
    assert office.code(waiting) == "REPLAY_DIFFERS"
    office.claim(late)  # of round 1, in round 3
    office.sketch(late)
    office.receive(late)
    assert office.code(late) == "TOO_LATE"
    assert office.plan() is None


# --- shopping ------------------------------------------------------------------------------------------------


def test_an_owner_who_gives_up_too_many_units_waits_for_the_next_round(opening: Opening) -> None:
    office = opening()
    ada, other = office.volunteer("ada"), office.volunteer("ada", device="2")
    for turn in range(WASTED_LEASES_PER_ROUND):
        if turn == 0:
            office.refuse(office.train(ada), DeltaNotFinite())
        elif turn < WASTED_LEASES_PER_ROUND // 2:
            office.hand_back(office.lease(ada if turn % 2 else other))
        else:
            office.lease(ada if turn % 2 else other)
            office.wait(LEASE_MS)
    for device in (ada, other):
        answer = office.ask(device)
        assert isinstance(answer, NoWork)
        assert "gave up 8 units of round 1" in answer.reason
    office.deliver(office.volunteer("bob"))
    office.judge(office.auditor())
    assert office.publish()
    assert office.lease(ada).lease.round == 2


def test_work_of_a_replica_is_no_part_of_the_replicas_own_unit_count(opening: Opening) -> None:
    office = opening(floor=DRAWN)
    work, replica = replicated(office)
    office.compare()
    assert office.attempt(replica).state is AttemptState.JUDGED
    office.publish()
    assert office.store.units_by_member() == {office.desk.member(work.by.session.owner): 1}
