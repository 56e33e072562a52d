"""What a refutation leads to: the ban, the audit back, taking out again; and how an appeal takes it back."""

import pytest

from coordinator.audits import AuditState, Scrutiny
from coordinator.owners import OwnerState
from coordinator.units import UnitState
from protocol.documents import digest_of
from protocol.errors import AppealRefused, OwnerBanned
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


# --- the ban -------------------------------------------------------------------------------------------------


def test_a_banned_owner_gets_no_unit_and_claims_none_on_any_device(opening: Opening) -> None:
    office = opening()
    eve, other = office.volunteer("eve"), office.volunteer("eve", device="2")
    started = office.lease(other)
    refuted(office)
    assert office.owner(eve) == (OwnerState.BANNED, 0)
    for device in (eve, other):
        with pytest.raises(OwnerBanned):
            office.ask(device)
    with pytest.raises(OwnerBanned):
        office.claim(started)
    assert office.unit(started).state is UnitState.OPEN


def test_what_a_banned_owner_had_under_way_is_rejected_and_its_units_are_open_again(opening: Opening) -> None:
    office = opening(floor=0, units=8)
    works = []
    for device, steps in (("2", ["claim"]), ("3", ["claim", "sketch"]), ("4", ["claim", "sketch", "receive"])):
        works.append(office.lease(office.volunteer("eve", device=device, record=ESTABLISHED)))
        for step in steps:
            getattr(office, step)(works[-1])
    office.wait(LEASE_MS // 4)
    lie = office.deliver(office.volunteer("eve", device="5", record=ESTABLISHED), "lie", ms=0)
    while office.code(lie) is None:
        office.judge(office.auditor())

    assert office.code(lie) == "REPLAY_DIFFERS"
    assert [office.code(work) for work in works] == ["OWNER_BANNED"] * 3
    assert {office.unit(work).state for work in works} == {UnitState.OPEN}
    assert office.open_audits() == 0
    assert not office.publish()


def test_a_ban_hits_no_other_owner(opening: Opening) -> None:
    office = opening()
    ada = office.volunteer("ada")
    work = office.deliver(ada)
    lie = office.deliver(office.volunteer("eve"), "lie")
    referee = office.auditor()
    assert [office.judge(referee), office.judge(referee)] == [("confirmed",), ("refuted",)]
    assert office.owner(ada) == (OwnerState.PROBATION, 1)
    assert office.publish()
    assert (office.code(work), office.code(lie)) == ("MERGED", "REPLAY_DIFFERS")
    assert [body["event"] for body in office.log("owner")] == ["audit-passed", "banned"]


def test_a_banned_owners_wrong_replica_does_not_stop_the_audit_that_it_served(opening: Opening) -> None:
    office = opening(floor=ONE)
    ada, eve = office.volunteer("ada", record=50), office.volunteer("eve", record=50)
    lie = office.deliver(office.volunteer("eve", device="2"), "lie")
    office.wait(LEASE_MS // 4)
    work = office.deliver(ada)
    replica = office.train(eve)
    assert office.audit(work).state is AuditState.REPLICATED
    office.judge(office.auditor())
    assert office.code(lie) == "REPLAY_DIFFERS"
    assert office.code(replica) == "OWNER_BANNED"
    assert office.compare() == 0
    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.publish()
    assert office.code(work) == "MERGED"


def test_a_replica_of_a_banned_owners_work_keeps_its_credit(opening: Opening) -> None:
    office = opening(floor=ONE)
    ada, eve = office.volunteer("ada", record=50), office.volunteer("eve", record=50)
    lie = office.deliver(office.volunteer("eve", device="2"), "lie")
    office.wait(LEASE_MS // 4)
    work = office.deliver(eve)
    replica = office.train(ada)
    assert replica.lease.unit == work.lease.unit
    office.judge(office.auditor())
    assert (office.code(lie), office.code(work)) == ("REPLAY_DIFFERS", "OWNER_BANNED")
    assert office.audit(work).state is AuditState.DROPPED
    assert office.code(replica) == "REPLICA"
    assert office.compare() == 0


# --- the audit back ------------------------------------------------------------------------------------------


def test_what_was_merged_from_a_banned_owner_is_audited_back_taken_out_and_its_credit_taken_back(
    opening: Opening,
) -> None:
    office = opening(floor=0)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    honest, poison = office.deliver(eve), office.deliver(eve, "poison")
    office.deliver(ada)
    assert office.publish()
    member = office.desk.member(eve.session.owner)
    assert office.store.units_by_member()[member] == 2

    caught(office, eve)
    assert office.reasons() == {"too-fast": 1, "recheck": 2}
    referee = office.auditor()
    assert [office.judge(referee), office.judge(referee)] == [("confirmed",), ("refuted",)]
    assert (office.code(honest), office.code(poison)) == ("MERGED", "RETRACTED")
    verdict = office.verdict(poison)
    assert verdict is not None
    assert (verdict.outcome, verdict.weight) == ("rejected", 0)
    assert office.store.units_by_member()[member] == 1

    office.deliver(ada)
    assert office.publish()
    assert office.unmerged(2) == {digest_of(poison.claim)}
    assert office.unit(poison).unmerged_in == 2
    (told,) = office.log("unmerged")
    assert told == {"checkpoint": 1, "claim": digest_of(poison.claim), "in": 2}
    office.deliver(ada)
    assert office.publish()
    assert office.unmerged(3) == set()  # once is enough


def test_what_is_nearly_honest_work_loses_its_credit_and_stays_in_the_model(opening: Opening) -> None:
    office = opening(floor=0)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    lazy, poison = office.deliver(eve, "a step less"), office.deliver(eve, "poison")
    office.deliver(ada)
    assert office.publish()
    caught(office, eve)
    referee = office.auditor()
    assert office.judge(referee, raw_difference=0.49) == ("refuted",)
    assert office.judge(referee, raw_difference=0.5) == ("refuted",)
    verdicts = [office.verdict(work) for work in (lazy, poison)]
    assert [verdict.code for verdict in verdicts if verdict] == ["RETRACTED", "RETRACTED"]
    assert [verdict.sentence.rpartition(". ")[2] for verdict in verdicts if verdict] == [
        "It is so near to honest work that it stays in the model, without credit.",
        "What was merged of it is taken out again.",
    ]
    assert office.store.units_by_member() == {office.desk.member(ada.session.owner): 1}
    office.deliver(ada)
    assert office.publish()
    assert office.unmerged(2) == {digest_of(poison.claim)}


def test_what_is_taken_out_goes_in_portions_the_oldest_first(opening: Opening) -> None:
    office = opening(floor=0, planned=9)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    poisons = [office.deliver(eve, f"poison {number}") for number in range(3)]
    office.deliver(ada)
    office.publish()  # a quarter of the merge each
    lie = office.deliver(office.volunteer("eve"), "lie", ms=0)
    office.wait(LEASE_MS // 4)
    while office.judge(office.auditor()):
        pass
    assert office.code(lie) == "REPLAY_DIFFERS"
    taken_out = []
    for number in range(2, 6):
        office.deliver(ada)
        assert office.publish()
        taken_out.append(office.unmerged(number))
    assert taken_out == [*({digest_of(poison.claim)} for poison in poisons), set()]


def test_what_is_kept_as_a_digest_only_cannot_be_taken_out_any_more(opening: Opening) -> None:
    office = opening(floor=0, retain_rounds=2, planned=9)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    poison = office.deliver(eve, "poison")
    office.publish()
    caught(office, eve)
    office.deliver(ada)
    office.publish()
    office.deliver(ada)
    assert office.close()
    assert office.judge(office.auditor()) == ("refuted",)  # too late for round 3, whose end is that of the delta
    office.finish()
    office.deliver(ada)
    assert office.publish()
    assert office.unmerged(4) == set()
    assert office.code(poison) == "RETRACTED"


def test_an_audit_back_whose_delta_is_kept_no_longer_is_dropped_and_stops_no_other(opening: Opening) -> None:
    office = opening(floor=0, retain_rounds=2, planned=9)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    poison = office.deliver(eve, "poison")
    office.publish()
    caught(office, eve)
    order = office.take(office.auditor())
    assert order is not None
    for _ in range(2):
        office.deliver(ada)
        office.publish()
    assert office.audit(poison).state is AuditState.DROPPED
    assert office.code(poison) == "MERGED"
    other = office.deliver(ada, ms=0)
    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.attempt(other).scrutiny is Scrutiny.CONFIRMED


def test_what_is_taken_out_is_named_with_the_weight_and_the_checkpoint_that_it_was_merged_with(
    opening: Opening,
) -> None:
    office = opening(floor=0)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    poison = office.deliver(eve, "poison")
    office.deliver(ada)
    office.publish()
    caught(office, eve)
    office.judge(office.auditor())
    office.deliver(ada)
    assert office.close()
    first, second = office.store.round(1), office.store.round(2)
    assert first is not None
    assert second is not None
    (entry,) = (entry for entry in first.merge if entry.claim == digest_of(poison.claim))
    (out,) = second.unmerge
    assert (out.claim, out.unit, out.checkpoint, out.weight) == (entry.claim, entry.unit, 1, entry.weight)
    assert (out.blob_sha256, out.content_sha256, out.size) == (entry.blob_sha256, entry.content_sha256, entry.size)
    assert out.member == entry.member


def test_what_an_audit_had_confirmed_is_not_audited_back(opening: Opening) -> None:
    office = opening(floor=0)
    eve = office.volunteer("eve", record=ESTABLISHED)
    office.volunteer("bob", record=ESTABLISHED)
    fast = office.deliver(eve, ms=0)
    office.wait(LEASE_MS // 4)
    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.publish()
    assert office.code(fast) == "MERGED"
    lie = office.deliver(eve, "lie", ms=0)
    office.claim_another(lie, "another lie")  # its mean time is shorter by now
    office.wait(LEASE_MS // 4)
    assert office.judge(office.auditor()) == ("refuted",)
    assert office.reasons() == {"too-fast": 1, "conflict": 1}


def test_an_audit_back_reaches_as_far_as_deltas_are_kept(opening: Opening) -> None:
    office = opening(floor=0, retain_rounds=2, planned=9)
    eve, ada = office.volunteer("eve", record=ESTABLISHED), office.volunteer("ada", record=ESTABLISHED)
    old = [office.deliver(eve)]
    office.publish()
    for _ in range(3):
        old.append(office.deliver(eve))
        office.publish()
    office.deliver(ada)
    caught(office, eve)
    rechecked = [bool(office.audits(work)) for work in old]
    assert rechecked == [False, False, False, True]  # in round 5, two rounds kept: those of checkpoints 4 and 5


def test_a_claim_that_is_refuted_while_its_merge_is_under_way_is_taken_out_at_the_next_close(
    opening: Opening,
) -> None:
    office = opening(floor=0, referee_share=ONE)
    partner, eve = office.volunteer("partner", record=ESTABLISHED), office.volunteer("eve", record=ESTABLISHED)
    late = office.lease(partner, "poison")
    office.wait(LEASE_MS)
    poison = office.deliver(eve, "poison")
    assert poison.lease.unit == late.lease.unit
    office.claim(late)
    office.sketch(late)
    office.compare()  # they agree, and are looked at all the same
    office.receive(late)
    assert office.close()
    assert office.merged(1) == {digest_of(poison.claim)}
    assert office.judge(office.auditor()) == ("refuted", "refuted")
    assert office.judge(office.auditor("second")) == ("refuted", "refuted")
    assert office.owner(eve)[0] is office.owner(partner)[0] is OwnerState.BANNED
    assert office.code(late) == "REPLAY_DIFFERS"
    with pytest.raises(AppealRefused):
        office.appeal(poison)  # there is no verdict yet
    office.finish()
    assert office.code(poison) == "RETRACTED"
    assert office.store.units_by_member() == {}
    office.deliver(office.volunteer("ada", record=ESTABLISHED))
    assert office.publish()
    assert office.unmerged(2) == {digest_of(poison.claim)}
