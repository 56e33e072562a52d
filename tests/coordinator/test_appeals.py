"""Appeals: who may make one, who judges it, and what it takes back."""

import pytest

from coordinator.audits import AuditState
from coordinator.owners import OwnerState
from protocol.errors import AppealRefused, ClaimUnknown
from protocol.limits import APPEAL_MS
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import ESTABLISHED, LEASE_MS, ONE, Volunteer, Work


def caught(office: Office, by: Volunteer) -> Work:
    """Have an established owner's lie found: too fast a claim is audited."""
    lie = office.deliver(by, "lie", ms=0)
    office.wait(LEASE_MS // 4)
    assert office.judge(office.auditor()) == ("refuted",)
    return lie


def refuted(office: Office, name: str = "eve") -> Work:
    """A newcomer's claim that a referee refuted."""
    work = office.deliver(office.volunteer(name), "lie")
    assert office.judge(office.auditor()) == ("refuted",)
    return work


def test_an_appeal_goes_to_another_auditor_who_restores_the_claim_and_clears_the_owner(opening: Opening) -> None:
    office = opening()
    first, second = office.auditor("first"), office.auditor("second")
    ada = office.volunteer("ada")
    work = office.deliver(ada)
    office.judge(first, believes="nonsense")
    assert office.owner(ada)[0] is OwnerState.BANNED

    office.appeal(work)
    assert office.take(first) is None
    assert office.judge(second) == ("confirmed",)
    assert office.owner(ada) == (OwnerState.PROBATION, 0)
    verdict = office.verdict(work)
    assert verdict is not None
    assert (verdict.outcome, verdict.code, verdict.checkpoint) == ("accepted", "RESTORED", None)
    assert office.lease(ada)
    assert [body["event"] for body in office.log("owner")] == ["banned", "cleared"]
    assert [body["code"] for body in office.log("verdict")] == ["REPLAY_DIFFERS", "RESTORED"]


def test_a_refutation_that_a_second_auditor_repeats_stands_for_good(opening: Opening) -> None:
    office = opening()
    work = refuted(office)
    office.appeal(work)
    assert office.judge(office.auditor("second")) == ("refuted",)
    verdict = office.verdict(work)
    assert verdict is not None
    assert (verdict.code, verdict.outcome) == ("REPLAY_DIFFERS", "rejected")
    assert "a second referee found the same" in verdict.sentence
    assert office.owner(work.by)[0] is OwnerState.BANNED
    with pytest.raises(AppealRefused):
        office.appeal(work)


def test_an_appeal_can_be_repeated_without_effect_while_it_waits(opening: Opening) -> None:
    office = opening()
    work = refuted(office)
    office.appeal(work)
    office.appeal(work)
    assert office.states(work) == [AuditState.WANTS_SECOND]
    assert len(office.log("appeal")) == 1


def test_only_a_refutation_can_be_appealed_and_only_by_its_device_and_in_time(opening: Opening) -> None:
    office = opening(units=8)
    ada = office.volunteer("ada")
    waiting = office.deliver(ada)
    with pytest.raises(AppealRefused):
        office.appeal(waiting)
    office.judge(office.auditor())
    with pytest.raises(AppealRefused):
        office.appeal(waiting)
    work = refuted(office)
    with pytest.raises(ClaimUnknown):
        office.appeal(work, by=office.volunteer("eve", device="2"))
    with pytest.raises(ClaimUnknown):
        office.appeal(work, by=ada)
    office.clock.advance(APPEAL_MS)
    with pytest.raises(AppealRefused):
        office.appeal(work)


def test_who_loses_a_claim_to_the_ban_alone_cannot_appeal_that_claim(opening: Opening) -> None:
    office = opening()
    other = office.deliver(office.volunteer("eve", device="2"))
    lie = office.deliver(office.volunteer("eve"), "lie")
    referee = office.auditor()
    order = office.take(referee)
    assert order is not None
    office.clock.advance(2 * LEASE_MS)
    office.judge(referee, believes="lie")
    assert office.code(other) == "REPLAY_DIFFERS"
    assert office.code(lie) == "OWNER_BANNED"
    with pytest.raises(AppealRefused):
        office.appeal(lie)
    office.appeal(other)


def test_one_restored_claim_of_two_refuted_ones_ends_no_ban(opening: Opening) -> None:
    office = opening(floor=0)
    eve = office.volunteer("eve", record=ESTABLISHED)
    poison = office.deliver(eve, "poison")
    office.publish()
    lie = caught(office, eve)
    assert office.judge(office.auditor()) == ("refuted",)
    assert (office.code(lie), office.code(poison)) == ("REPLAY_DIFFERS", "RETRACTED")
    office.appeal(lie)
    assert office.judge(office.auditor("second"), believes="lie") == ("confirmed",)
    assert office.code(lie) == "RESTORED"
    assert office.owner(eve)[0] is OwnerState.BANNED
    office.appeal(poison)
    assert office.judge(office.auditor("second"), believes="poison") == ("confirmed",)
    assert office.owner(eve) == (OwnerState.PROBATION, 0)


def _retracted(office: Office) -> tuple[Work, Volunteer]:
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    work = office.deliver(eve, "odd")
    office.publish()
    caught(office, eve)
    assert office.judge(office.auditor()) == ("refuted",)
    assert office.code(work) == "RETRACTED"
    return work, ada


def test_a_merged_claim_that_is_restored_in_time_stays_in_its_checkpoint(opening: Opening) -> None:
    office = opening(floor=0)
    work, ada = _retracted(office)
    office.appeal(work)
    office.judge(office.auditor("second"), believes="odd")
    verdict = office.verdict(work)
    assert verdict is not None
    assert (verdict.code, verdict.checkpoint) == ("RESTORED", 1)
    office.deliver(ada)
    office.publish()
    assert office.unmerged(2) == set()
    assert office.store.units_by_member()[office.desk.member(work.by.session.owner)] == 1


def test_a_claim_that_is_restored_after_it_was_taken_out_stays_out(opening: Opening) -> None:
    office = opening(floor=0)
    work, ada = _retracted(office)
    office.deliver(ada)
    office.publish()
    office.appeal(work)
    office.judge(office.auditor("second"), believes="odd")
    verdict = office.verdict(work)
    assert verdict is not None
    assert (verdict.code, verdict.checkpoint) == ("RESTORED", None)
    assert office.unit(work).unmerged_in == 2


def test_a_claim_that_is_restored_while_it_is_being_taken_out_stays_out(opening: Opening) -> None:
    office = opening(floor=0)
    work, ada = _retracted(office)
    office.deliver(ada)
    assert office.close()
    office.appeal(work)
    office.judge(office.auditor("second"), believes="odd")
    office.finish()
    verdict = office.verdict(work)
    assert verdict is not None
    assert (verdict.code, verdict.checkpoint) == ("RESTORED", None)
    assert office.unit(work).unmerged_in == 2


def test_a_replica_that_was_refuted_can_be_appealed_too(opening: Opening) -> None:
    office = opening(floor=ONE)
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    office.deliver(ada)
    replica = office.train(bob, "odd")
    office.compare()
    office.receive(replica)
    assert office.judge(office.auditor()) == ("confirmed", "refuted")
    assert office.owner(bob)[0] is OwnerState.BANNED
    office.appeal(replica)
    assert office.judge(office.auditor("second"), believes="odd") == ("confirmed",)
    assert office.code(replica) == "RESTORED"
    assert office.owner(bob) == (OwnerState.PROBATION, 0)


def test_after_two_auditors_have_refuted_a_claim_its_appeal_goes_to_a_third(opening: Opening) -> None:
    office = opening(floor=ONE)
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    work = office.deliver(ada, "odd")
    replica = office.train(bob, "even")
    office.compare()
    office.receive(replica)
    auditors = [office.auditor(name) for name in ("first", "second", "third")]
    for auditor in auditors[:2]:
        assert office.judge(auditor) == ("refuted", "refuted")
    office.appeal(work)
    assert [office.judge(auditor) for auditor in auditors[:2]] == [None, None]
    assert office.judge(auditors[2], believes="odd") == ("confirmed",)
    assert office.code(work) == "RESTORED"
