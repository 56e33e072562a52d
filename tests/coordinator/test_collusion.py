"""Partners who vouch for each other, withhold, displace and hold back: what each of it comes to."""

import pytest

from coordinator.audits import AuditReason, AuditState, Scrutiny
from coordinator.leasing import Leased, NoWork
from coordinator.owners import OwnerState
from protocol.calls import Instruction
from protocol.documents import digest_of
from protocol.errors import DeltaNotFinite
from protocol.limits import AUDIT_PATIENCE_MS
from tests.coordinator.desk_harness import Office, Opening
from tests.coordinator.desk_people import DRAWN, ESTABLISHED, LEASE_MS, ONE, TRAINING_MS, Volunteer, Work
from verify.draws import check_draws


def vouched(office: Office, eve: Volunteer, cat: Volunteer) -> tuple[Work, Work]:
    """Eve's drawn poison and the same thing of Cat, who was given the replica; both established."""
    poison = office.deliver(eve, "poison")
    office.offer_replicas_widely()
    echo = office.train(cat, "poison")
    assert echo.lease.unit == poison.lease.unit
    office.compare()
    return poison, echo


def judge_all(office: Office) -> None:
    """Let every audit come to an auditor, and be judged."""
    office.wait(LEASE_MS)
    refereed(office)


def refereed(office: Office) -> None:
    """Let an auditor judge what waits for one now."""
    while office.judge(office.auditor()) is not None:
        pass


def caught(office: Office, by: Volunteer) -> None:
    """Have an owner banned for something else."""
    lie = office.deliver(by, "another lie", ms=0)  # too fast
    judge_all(office)
    assert office.code(lie) == "REPLAY_DIFFERS"


# --- partners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banned", ["eve", "cat"])
def test_what_a_partner_vouched_for_is_looked_at_when_either_of_the_two_is_banned(
    opening: Opening, banned: str
) -> None:
    office = opening(floor=DRAWN, units=8, planned=9)
    eve, cat = office.volunteer("eve", record=50), office.volunteer("cat", record=50)
    poison, _ = vouched(office, eve, cat)
    assert office.attempt(poison).scrutiny is Scrutiny.CONFIRMED
    assert office.publish()
    caught(office, {"eve": eve, "cat": cat}[banned])
    judge_all(office)
    assert office.code(poison) == "RETRACTED"
    assert office.owner(eve)[0] is OwnerState.BANNED


def test_a_pair_that_a_single_auditor_refutes_is_looked_back_at(opening: Opening) -> None:
    office = opening(floor=0, referee_share=ONE, units=8, planned=9)
    eve, cat = office.volunteer("eve", record=ESTABLISHED), office.volunteer("cat", record=ESTABLISHED)
    older = [office.deliver(eve, "poison"), office.deliver(cat, "poison")]
    assert office.publish()
    late = office.lease(cat, "poison")
    office.wait(LEASE_MS)
    work = office.deliver(eve, "poison")
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    office.sketch(late)
    office.compare()  # they agree, and are looked at all the same
    office.receive(late)
    assert office.judge(office.auditor()) == ("refuted", "refuted")
    office.wait(AUDIT_PATIENCE_MS)
    assert (office.code(work), office.code(late)) == ("UNDECIDED", "UNDECIDED")
    assert office.reasons()["recheck"] == 2
    judge_all(office)
    assert [office.code(poison) for poison in older] == ["RETRACTED", "RETRACTED"]
    assert office.owner(eve)[0] is office.owner(cat)[0] is OwnerState.BANNED


def test_an_owner_cannot_order_its_partners_confirmation_by_being_too_fast(opening: Opening) -> None:
    office = opening(floor=0, units=8)
    eve, cat = office.volunteer("eve", record=ESTABLISHED), office.volunteer("cat", record=ESTABLISHED)
    fast = office.deliver(eve, "poison", ms=0)
    assert office.states(fast) == [AuditState.WANTS_REFEREE]
    assert office.lease(cat).lease.unit != fast.lease.unit


def test_a_refuted_replica_does_not_go_free_because_its_subject_was_banned_first(opening: Opening) -> None:
    office = opening(floor=DRAWN, units=8)
    office.volunteer("bob", record=50)
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    work = office.deliver(ada, "lie")
    other = office.train(bob, "another lie")
    assert other.lease.unit == work.lease.unit
    office.compare()
    office.receive(other)
    assert office.judge(office.auditor()) == ("refuted", "refuted")
    caught(office, office.volunteer("ada", device="2"))
    assert office.code(work) == "OWNER_BANNED"
    assert office.code(other) == "UNDECIDED"
    assert office.owner(bob) == (OwnerState.PROBATION, 0)


# --- withholding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sends", ["a sketch", "the bytes"])
def test_a_drawn_claim_that_comes_only_when_others_have_done_the_unit_is_forfeit(opening: Opening, sends: str) -> None:
    office = opening(floor=DRAWN, planned=9)
    eve, ada = office.volunteer("eve", record=50), office.volunteer("ada", record=50)
    withheld = office.lease(eve, "poison")
    office.clock.advance(TRAINING_MS)
    office.claim(withheld)
    if sends == "the bytes":
        office.sketch(withheld)
    office.wait(LEASE_MS)
    done = office.deliver(ada)
    assert done.lease.unit == withheld.lease.unit
    judge_all(office)
    if sends == "the bytes":
        office.receive(withheld)
    else:
        assert office.sketch(withheld) is Instruction.DONE
    assert office.code(withheld) == "FORFEIT"
    assert office.owner(eve) == (OwnerState.PROBATION, 0)


def test_a_newcomer_who_is_late_with_audited_work_forfeits_nothing(opening: Opening) -> None:
    office = opening(floor=0, planned=9)
    slow, ada = office.volunteer("slow"), office.volunteer("ada", record=ESTABLISHED)
    late = office.lease(slow)
    office.claim(late)
    office.wait(LEASE_MS)
    assert office.deliver(ada).lease.unit == late.lease.unit
    office.sketch(late)
    assert office.code(late) == "REPLICA"


def test_what_an_owner_has_on_its_way_is_audited_when_its_record_is_gone(opening: Opening) -> None:
    office = opening(floor=0, units=8, planned=9)
    eve = [office.volunteer("eve", device=str(number), record=ESTABLISHED) for number in range(4)]
    on_its_way = [office.deliver(device, "poison") for device in eve[:2]]
    unsent = office.train(eve[2], "poison")
    office.refuse(office.train(eve[3]), DeltaNotFinite())
    assert office.owner(eve[0]) == (OwnerState.PROBATION, 0)
    plan = office.plan()
    assert plan is None or plan.entries == ()
    office.receive(unsent)
    assert office.reasons() == {"distrusted": 3}
    judge_all(office)
    assert office.code(on_its_way[0]) == "REPLAY_DIFFERS"


# --- displacing and holding back -----------------------------------------------------------------------------


def test_rubbish_of_a_newcomer_does_not_displace_finished_work(opening: Opening) -> None:
    office = opening(floor=0, planned=9)
    sybil, ada = office.volunteer("sybil"), office.volunteer("ada", record=ESTABLISHED)
    late = office.lease(sybil, "rubbish")
    office.wait(LEASE_MS)
    work = office.train(ada)
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    office.sketch(late)
    office.receive(late)  # while Ada is uploading
    office.receive(work)
    assert office.publish()
    assert office.code(work) == "MERGED"
    judge_all(office)
    assert office.code(late) == "REPLAY_DIFFERS"


def test_rubbish_of_a_newcomer_does_not_cost_another_newcomer_its_audit(opening: Opening) -> None:
    office = opening(floor=0, planned=9)
    sybil, new = office.volunteer("sybil"), office.volunteer("new")
    late = office.lease(sybil, "rubbish")
    office.wait(LEASE_MS)
    mine = office.lease(new)
    assert mine.lease.unit == late.lease.unit
    for step in (office.claim, office.sketch, office.receive):
        step(late)
    for step in (office.claim, office.sketch, office.receive):
        step(mine)
    judge_all(office)
    assert office.code(late) == "REPLAY_DIFFERS"
    assert office.owner(new) == (OwnerState.PROBATION, 1)
    assert office.publish()
    assert office.code(mine) == "MERGED"


def test_claims_that_nothing_follows_hold_an_eighth_of_a_round_and_soon_count_as_given_up(opening: Opening) -> None:
    office = opening(floor=0, units=32, planned=9)
    held = []
    for number in range(20):
        device = office.volunteer("eve", device=str(number))
        if isinstance(office.ask(device), Leased):
            work = office.lease(device, "nothing")
            office.claim(work)
            held.append(work)
    assert len(held) == 4
    office.wait(LEASE_MS)
    again = 0
    for number in range(20, 60):
        device = office.volunteer("eve", device=str(number))
        if isinstance(office.ask(device), Leased):
            office.claim(office.lease(device, "nothing"))
            again += 1
    assert again == 4
    office.wait(LEASE_MS)
    answer = office.ask(office.volunteer("eve", device="last"))
    assert isinstance(answer, NoWork)
    assert "gave up" in answer.reason


def test_replicas_count_among_what_an_owner_may_hold(opening: Opening) -> None:
    office = opening(floor=0, units=16, planned=9)
    devices = [office.volunteer("cat", device=str(number), record=ESTABLISHED) for number in range(12)]
    for number in range(12):
        office.deliver(office.volunteer(f"newcomer {number}"))
    office.offer_replicas_widely()
    assert sum(isinstance(office.ask(device), Leased) for device in devices) == 4


# --- the log -------------------------------------------------------------------------------------------------


def draws(office: Office) -> None:
    """Read the whole log as an outsider does."""
    entries = office.store.log_entries(1, office.store.log_head()[0])
    check_draws(entries, office.desk.config.verification, office.desk.config.training)


def test_a_drawn_replica_that_a_referee_confirmed_and_a_merge_took_is_in_order(opening: Opening) -> None:
    office = opening(floor=DRAWN, probation=1, units=8, planned=9)
    ada, bob = office.volunteer("ada"), office.volunteer("bob")
    for by in (ada, bob):
        office.deliver(by)
        judge_all(office)
        assert office.owner(by)[0] is OwnerState.ESTABLISHED
    lie = office.deliver(ada, "lie")
    office.offer_replicas_widely()
    replica = office.train(bob)
    assert replica.lease.unit == lie.lease.unit
    office.compare()
    office.receive(replica)
    assert office.judge(office.auditor()) == ("refuted", "confirmed")
    assert office.publish()
    assert digest_of(replica.claim) in office.merged(1)
    office.reveal()
    assert office.log("epoch-revealed")
    draws(office)


def test_overdue_bytes_go_to_an_auditor_since_everybody_can_compute_who_would_replicate_them(opening: Opening) -> None:
    office = opening(floor=0, planned=9, staleness_bound=2)
    overdue = office.train(office.volunteer("slow", record=50))
    ada, bob = office.volunteer("ada", record=50), office.volunteer("bob", record=50)
    office.deliver(ada)
    office.wait(LEASE_MS)
    assert office.publish()
    office.receive(overdue)
    audit = office.audit(overdue)
    assert (audit.reason, audit.state) == (AuditReason.OVERDUE, AuditState.WANTS_REFEREE)
    office.offer_replicas_widely()
    assert office.train(bob).lease.unit != overdue.lease.unit
    assert office.judge(office.auditor()) == ("confirmed",)
    assert office.attempt(overdue).scrutiny is Scrutiny.CONFIRMED
    office.deliver(ada)
    assert office.publish()
    assert office.code(overdue) == "MERGED"


def test_who_claims_late_and_stays_away_does_not_make_the_log_of_the_honest_fail(opening: Opening) -> None:
    office = opening(
        floor=DRAWN, referee_share=ONE, probation=1, units=8, planned=12, staleness_bound=2, upload_ms=5 * LEASE_MS,
        retain_rounds=1,
    )  # fmt: skip
    ada, bob, mallory = (office.volunteer(name) for name in ("ada", "bob", "mallory"))
    for by in (ada, bob, mallory):
        office.deliver(by)
        judge_all(office)
    assert office.publish()
    late = office.lease(mallory)
    office.wait(LEASE_MS)
    work = office.deliver(ada)
    assert work.lease.unit == late.lease.unit
    office.claim(late)
    office.sketch(late)
    assert office.compare() == 1
    office.wait(LEASE_MS // 4)
    refereed(office)
    assert office.publish()
    for _ in range(4):
        office.deliver(bob)
        office.wait(LEASE_MS // 4)
        refereed(office)
        office.publish()
    office.deliver(bob)
    office.wait(LEASE_MS // 4)
    refereed(office)
    office.wait(5 * LEASE_MS)  # what Mallory promised never came, and by now its unit's delta is not kept any more
    office.publish()
    refereed(office)
    office.reveal()
    assert "late" in {audit.reason.value for audit in office.audits(work)}
    assert office.code(work) == "MERGED"
    assert len(office.log("epoch-revealed")) >= 2
    draws(office)
